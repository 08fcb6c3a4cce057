"""From logits to tokens, for all requests of a step at once; and the choice of drafts.

Where every request is greedy and asks for nothing else, the largest logit is all there is to it.
Otherwise: distributions of every place, then which drafts stand (speculation.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fourge.engine.distributions import Row, describe, target_distributions, tempered
from fourge.engine.grammar import bitmasks
from fourge.engine.randomness import ACCEPT, CHOOSE, DRAFT, draw, uniform
from fourge.engine.request import Chunk, Request, TokenLogprobs
from fourge.engine.speculation import verify

__all__ = ["Choice", "Drafter", "choose", "describe", "end"]

# B requests, K drafts, P = K + 1 places, N places of all requests, V vocabulary


class Choice(NamedTuple):
    """What follows a request's tokens: the drafts that stand, and one more."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    error: str | None = None


def choose(chunks: Sequence[Chunk], logits_NV: torch.Tensor, *, block: bool) -> list[Choice]:
    """``logits_NV`` has the places after each chunk's newest token and after each of its drafts;
    it is changed.
    """
    best_N = logits_NV.max(-1)  # of a row with a NaN, that
    finite = (~best_N.values.isnan()).tolist()
    raw_NV = logits_NV.clone() if any(_wants_logprobs(one.request) for one in chunks) else None
    bitmask = bitmasks(chunks, logits_NV.shape[1])
    token_lists: Sequence[list[int] | None]
    if bitmask is None and all(_is_plain(one.request) for one in chunks):
        token_lists = _greedy(chunks, best_N.indices.tolist())
    else:
        token_lists = _sample(chunks, logits_NV, bitmask, block=block)
    choices, place = [], 0
    for chunk, tokens in zip(chunks, token_lists, strict=True):
        places = slice(place, place + len(chunk.drafts) + 1)
        place = places.stop
        if not all(finite[places]):
            choices.append(Choice([], [], "the model's output is not finite"))
            continue
        if tokens is None:
            choices.append(Choice([], [], "what the request allows leaves no token to choose"))
            continue
        logprobs: list[TokenLogprobs] = []
        if raw_NV is not None and chunk.request.params.logprobs is not None:
            rows = raw_NV[places.start : places.start + len(tokens)]
            logprobs = describe(rows, tokens, chunk.request.params.logprobs)
        choices.append(_follow(chunk.request, Choice(tokens, logprobs)))
    return choices


def end(request: Request, token: int) -> str | None:
    """Why the request ends with its last ``token``; None if it goes on."""
    if token in request.stop_tokens and request.num_output >= request.params.min_tokens:
        return "stop"
    return "length" if len(request.tokens) >= request.max_length else None


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
        positions = np.array([len(one.tokens) + number for one in self._requests])
        return draw(probs_BV, uniform(_seeds(self._requests), positions, DRAFT))

    def hand_over(self, drafts_BK: torch.Tensor) -> None:
        """Give the requests their drafts; no more than they could still use."""
        probs_BKV = torch.stack(self._probs, 1) if self._probs else None
        for number, (request, drafts) in enumerate(
            zip(self._requests, drafts_BK.tolist(), strict=True)
        ):
            most = min(len(drafts), request.max_length - len(request.tokens) - 1)
            request.drafts = drafts[:most]
            if probs_BKV is not None:
                request.draft_probs_KV = probs_BKV[number, :most]


def _wants_logprobs(request: Request) -> bool:
    return request.params.logprobs is not None


def _is_plain(request: Request) -> bool:
    """Greedy, without anything that changes logits."""
    params = request.params
    if params.temperature or params.logit_bias or params.has_penalties or params.forbids_tokens:
        return False
    return request.num_output + len(request.drafts) >= params.min_tokens or not request.stop_tokens


def _greedy(chunks: Sequence[Chunk], best: Sequence[int]) -> list[list[int]]:
    """``best``: the token of the largest logit of every place."""
    place, found = 0, []
    for chunk in chunks:
        tokens = [best[place]]
        for number, draft in enumerate(chunk.drafts, start=1):
            if draft != tokens[-1]:
                break
            tokens.append(best[place + number])
        found.append(tokens)
        place += len(chunk.drafts) + 1
    return found


def _sample(
    chunks: Sequence[Chunk], logits_NV: torch.Tensor, bitmask: torch.Tensor | None, *, block: bool
) -> list[list[int] | None]:
    """None where no token is left to choose."""
    requests = [chunk.request for chunk in chunks]
    counts = [len(chunk.drafts) for chunk in chunks]
    num_drafts, device = max(counts), logits_NV.device
    rows = [Row(chunk.request, place) for chunk in chunks for place in range(len(chunk.drafts) + 1)]
    probs_NV = target_distributions(logits_NV, rows, bitmask)
    if min(counts) == num_drafts:
        target_BPV = probs_NV.unflatten(0, (len(chunks), num_drafts + 1))
    else:
        target_BPV = probs_NV.new_zeros(len(chunks), num_drafts + 1, probs_NV.shape[1])
        for own_PV, part in zip(target_BPV, probs_NV.split([n + 1 for n in counts]), strict=True):
            own_PV[: len(part)] = part
    padded = [[*chunk.drafts, *[-1] * (num_drafts - len(chunk.drafts))] for chunk in chunks]
    draft_BK = torch.tensor(padded, dtype=torch.int64, device=device).view(len(chunks), num_drafts)
    lengths = np.array([[len(one.tokens)] for one in requests])
    position_BP = lengths + np.arange(num_drafts + 1)
    seeds = _seeds(requests)[:, None]
    verdict = verify(
        target_BPV,
        draft_BK,
        _draft_probs(chunks, draft_BK, probs_NV.shape[1]),
        uniform(seeds, position_BP[:, :-1], ACCEPT),
        uniform(seeds, position_BP, CHOOSE),
        block=block,
    )
    own_B = torch.arange(len(chunks), device=device)
    nothing_B = target_BPV[own_B, verdict.accepted_B, 0].isnan()
    found_3B = torch.stack([verdict.accepted_B, verdict.token_B, nothing_B.long()]).tolist()
    return [
        None if nothing else [*chunk.drafts[:count], token]
        for chunk, count, token, nothing in zip(chunks, *found_3B, strict=True)
    ]


def _draft_probs(chunks: Sequence[Chunk], draft_BK: torch.Tensor, vocab: int) -> torch.Tensor:
    """float32 [B, K, V]; 0 where there is no draft."""
    probs_BKV = torch.zeros(*draft_BK.shape, vocab, device=draft_BK.device)
    if not draft_BK.numel():
        return probs_BKV
    probs_BKV.scatter_(2, draft_BK.clamp(min=0).unsqueeze(-1), (draft_BK >= 0).float()[..., None])
    for own_KV, chunk in zip(probs_BKV, chunks, strict=True):
        known = chunk.request.draft_probs_KV
        if known is not None:
            own_KV[: len(chunk.drafts)] = known[: len(chunk.drafts)]
    return probs_BKV


def _seeds(requests: Sequence[Request]) -> np.ndarray:
    return np.array([request.seed for request in requests], dtype=np.int64)


def _follow(request: Request, choice: Choice) -> Choice:
    """Let the request's grammar take the tokens, up to one that ends the request."""
    matcher = request.matcher
    for token in choice.token_ids if matcher is not None else ():
        assert matcher is not None
        if matcher.is_terminated():
            break
        if not matcher.accept_token(token):
            return Choice([], [], f"the grammar allows no token {token} here")
        if token in request.stop_tokens:
            break
    return choice
