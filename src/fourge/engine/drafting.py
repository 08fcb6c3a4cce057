"""The choice of drafts, and what they were drawn from."""

from collections.abc import Sequence

import numpy as np
import torch

from fourge.engine.distributions import tempered
from fourge.engine.randomness import DRAFT, draw, seeds_of, uniform
from fourge.engine.request import Request

# B requests, K drafts, V vocabulary


class Drafter:
    """Chooses the drafts of some requests and remembers what they were drawn from."""

    def __init__(self, requests: Sequence[Request], *, greedy: bool) -> None:
        self._requests = requests
        self._greedy = greedy or not any(one.params.temperature for one in requests)
        self._probs: list[torch.Tensor] = []

    def choose(self, logits_BV: torch.Tensor, number: int) -> torch.Tensor:
        """int64 [B]: the draft ``number`` of each."""
        logits_BV = logits_BV.nan_to_num_(nan=0.0)  # a damaged draft layer only drafts badly
        if self._greedy:
            return logits_BV.argmax(-1)
        probs_BV = tempered(logits_BV, [one.params.temperature or 0.0 for one in self._requests])
        self._probs.append(probs_BV)
        positions = np.array([one.length + number for one in self._requests])
        u_B = uniform(seeds_of(self._requests), positions, DRAFT, logits_BV.device)
        return draw(probs_BV, u_B)

    def hand_over(self, drafts_BK: torch.Tensor) -> None:
        """Give the requests their drafts; no more than they could still use."""
        probs_BKV = torch.stack(self._probs, 1) if self._probs else None
        for number, (request, drafts) in enumerate(
            zip(self._requests, drafts_BK.tolist(), strict=True)
        ):
            most = min(len(drafts), request.max_length - request.length - 1)
            request.drafts = drafts[:most]
            if probs_BKV is not None:
                request.draft_probs_KV = probs_BKV[number, :most]
