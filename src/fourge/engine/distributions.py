"""From logits to the distribution that a request samples from.

    logits   grammar's mask, logit_bias, penalties, tokens that are not allowed, min_tokens
    softmax  of logits / temperature; temperature 0: certainty of the largest
    cut      min_p, then top_k, then top_p, and divided by what is left
A row is one position of one request; under speculation a request has several, each after more of
its drafts. Rows never depend on each other.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import DTypeLike

from fourge.engine.request import Request
from fourge.engine.transfers import to_device

# N rows, V vocabulary


class Row(NamedTuple):
    """The position after a request's tokens and the first ``drafts`` of its drafts."""

    request: Request
    drafts: int


def target_distributions(
    logits_NV: torch.Tensor, rows: Sequence[Row], bitmask: torch.Tensor | None
) -> torch.Tensor:
    """float32 [N, V]; changes ``logits_NV``. ``bitmask``: int32 [N, ceil(V / 32)], 1 is allowed.
    A row is NaN where no token is left.
    """
    if bitmask is not None:
        mask_tokens(logits_NV, bitmask)
    for number, row in enumerate(rows):
        _adjust(logits_NV[number], row)
    nothing_N1 = logits_NV.amax(-1, keepdim=True) == -torch.inf
    probs_NV = cut(
        logits_NV,
        temperature=[row.request.params.temperature or 0.0 for row in rows],
        min_p=[row.request.params.min_p for row in rows],
        top_k=[row.request.params.top_k or 0 for row in rows],
        top_p=[row.request.params.top_p or 1.0 for row in rows],
    )
    return probs_NV.masked_fill_(nothing_N1, torch.nan)


def mask_tokens(logits_NV: torch.Tensor, bitmask: torch.Tensor) -> None:
    """-inf where a token's bit is 0."""
    bits = bitmask.to(logits_NV.device).unsqueeze(-1) >> torch.arange(
        32, dtype=torch.int32, device=logits_NV.device
    )
    allowed = (bits & 1).bool().flatten(1)[:, : logits_NV.shape[1]]
    logits_NV.masked_fill_(~allowed, -torch.inf)


def certain(logits_NV: torch.Tensor) -> torch.Tensor:
    """float32 [N, V]: 1 at the largest."""
    best_N1 = logits_NV.argmax(-1, keepdim=True)
    return torch.zeros_like(logits_NV, dtype=torch.float32).scatter_(1, best_N1, 1.0)


def tempered(logits_NV: torch.Tensor, temperature: Sequence[float]) -> torch.Tensor:
    """softmax(logits / temperature) of each row; at 0, certainty of the largest."""
    if not any(temperature):
        return certain(logits_NV)
    heat_N1 = _column(temperature, logits_NV.device)
    # From the largest down, so that a temperature close to 0 divides no large number.
    shifted_NV = logits_NV - logits_NV.amax(-1, keepdim=True)
    probs_NV = (shifted_NV / torch.where(heat_N1 == 0, 1.0, heat_N1)).softmax(-1)
    if all(temperature):
        return probs_NV
    return torch.where(heat_N1 == 0, certain(logits_NV), probs_NV)


def cut(
    logits_NV: torch.Tensor,
    *,
    temperature: Sequence[float],
    min_p: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
) -> torch.Tensor:
    """The distributions of rows of float32 logits, one parameter of each kind a row."""
    probs_NV, device = tempered(logits_NV, temperature), logits_NV.device
    if any(min_p):
        floor_N1 = _column(min_p, device) * probs_NV.amax(-1, keepdim=True)
        probs_NV.masked_fill_(probs_NV < floor_N1, 0.0)
    vocab = logits_NV.shape[1]
    cutting = [
        number
        for number, (heat, k, p) in enumerate(zip(temperature, top_k, top_p, strict=True))
        if heat > 0 and (0 < k < vocab or p < 1)
    ]
    if cutting:
        some = to_device(np.array(cutting), device)
        k = [top_k[number] if top_k[number] > 0 else vocab for number in cutting]
        probs_NV[some] = _cut_tail(probs_NV[some], k, [top_p[number] for number in cutting])
    return probs_NV / probs_NV.sum(-1, keepdim=True)


def _cut_tail(probs_NV: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> torch.Tensor:
    sorted_NV, order_NV = probs_NV.sort(dim=-1, descending=True, stable=True)
    device = probs_NV.device
    rank_V = torch.arange(probs_NV.shape[1], device=device)
    sorted_NV.masked_fill_(rank_V >= _column(top_k, device, np.int64), 0.0)
    share_NV = sorted_NV / sorted_NV.sum(-1, keepdim=True)
    before_NV = share_NV.double().cumsum(-1) - share_NV
    p_N1 = _column(top_p, device, np.float64)
    # The first always stays; a top_p of 1 cuts nothing, rounding or not.
    gone_NV = (before_NV >= p_N1) & (p_N1 < 1)
    gone_NV[:, 0] = False
    sorted_NV.masked_fill_(gone_NV, 0.0)
    return torch.zeros_like(probs_NV).scatter_(1, order_NV, sorted_NV)


def _column(
    values: Sequence[float], device: torch.device, dtype: DTypeLike = np.float32
) -> torch.Tensor:
    """[N, 1]."""
    return to_device(np.array(values, dtype=dtype)[:, None], device)


def _ids(tokens: Iterable[int], device: torch.device) -> torch.Tensor:
    return to_device(np.array(list(tokens), dtype=np.int64), device)


def _adjust(logits_V: torch.Tensor, row: Row) -> None:
    request, params, device = row.request, row.request.params, logits_V.device
    if params.logit_bias:
        bias = to_device(np.array(list(params.logit_bias.values()), dtype=np.float32), device)
        logits_V.index_add_(0, _ids(params.logit_bias, device), bias.to(logits_V.dtype))
    if params.has_penalties:
        _penalise(logits_V, row)
    if params.forbids_tokens:
        _forbid(logits_V, row)
    chosen = request.length - request.num_prompt + row.drafts
    if chosen < params.min_tokens and request.stop_tokens:
        logits_V.index_fill_(0, _ids(request.stop_tokens, device), -torch.inf)


def _forbid(logits_V: torch.Tensor, row: Row) -> None:
    """A bad word's last token, where the output ends with those before it (as in vllm)."""
    params, output = row.request.params, row.request.output + row.request.drafts[: row.drafts]
    if params.allowed_token_ids is not None:
        allowed = _ids(params.allowed_token_ids, logits_V.device)
        kept = logits_V[allowed]
        logits_V.fill_(-torch.inf)
        logits_V[allowed] = kept
    bad = [
        last
        for *before, last in params.bad_words_token_ids
        if output[max(0, len(output) - len(before)) :] == before
    ]
    if bad:
        logits_V.index_fill_(0, _ids(bad, logits_V.device), -torch.inf)


def _penalise(logits_V: torch.Tensor, row: Row) -> None:
    """Presence and frequency look at the output, repetition at the prompt too (as in vllm)."""
    request, params, device = row.request, row.request.params, logits_V.device
    output = request.output + request.drafts[: row.drafts]
    seen = _ids({*request.tokens[: request.num_prompt], *output}, device)
    repetition = params.repetition_penalty or 1.0
    values = logits_V[seen]
    logits_V[seen] = torch.where(values > 0, values / repetition, values * repetition)
    if output:
        tokens, counts = np.unique(output, return_counts=True)
        penalty = counts * params.frequency_penalty + params.presence_penalty
        logits_V[to_device(tokens, device)] -= to_device(penalty.astype(np.float32), device)
