"""What the model itself thinks of tokens, before any sampling parameter."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fourge.engine.request import TokenLogprobs
from fourge.engine.transfers import to_device

# N places, V vocabulary, A alternatives


class Logprobs(NamedTuple):
    """Of one token at each place, and of the best there."""

    token_N: torch.Tensor
    chosen_N: torch.Tensor
    best_NA: torch.Tensor
    best_ids_NA: torch.Tensor


def look_up(logits_NV: torch.Tensor, token_N: torch.Tensor, num_best: int) -> Logprobs:
    """On the logits' device."""
    logprobs_NV = logits_NV.float().log_softmax(-1)
    chosen_N = logprobs_NV.gather(1, token_N[:, None]).squeeze(-1)
    return Logprobs(token_N, chosen_N, *logprobs_NV.topk(num_best, dim=-1))


def listed(found: Logprobs) -> list[TokenLogprobs]:
    """For the host."""
    return [
        TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, values, ids in zip(*(one.tolist() for one in found), strict=True)
    ]


def describe(logits_NV: torch.Tensor, tokens: Sequence[int], num_best: int) -> list[TokenLogprobs]:
    """Of known tokens, at once."""
    return listed(look_up(logits_NV, to_device(np.array(tokens), logits_NV.device), num_best))
