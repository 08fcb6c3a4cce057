"""From logits to tokens, for all requests of a step at once, on the device.

Where every request is greedy and asks for nothing else, the largest logit is all there is to it.
Otherwise: distributions of every place, then which drafts stand (speculation.py). The host learns
the tokens when it asks for ``Chosen.choices``, and only then does it have to wait.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fourge.engine.distributions import Row, target_distributions
from fourge.engine.grammar import bitmasks
from fourge.engine.logprobs import Logprobs, listed, look_up
from fourge.engine.randomness import ACCEPT, CHOOSE, seeds_of, uniform
from fourge.engine.request import Chunk, Request, TokenLogprobs
from fourge.engine.speculation import verify
from fourge.engine.transfers import Fetched, to_device

# B requests, K drafts, P = K + 1 places, N places of all requests, V vocabulary

# In place of a token.
NONE, NOT_FINITE, NOTHING_LEFT = -1, -2, -3
ERRORS = {
    NOT_FINITE: "the model's output is not finite",
    NOTHING_LEFT: "what the request allows leaves no token to choose",
}


class Choice(NamedTuple):
    """What follows a request's tokens: the drafts that stand, and one more."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    error: str | None = None


@dataclass(frozen=True)
class Chosen:
    """What was chosen: at each place of a chunk, what follows if the drafts before it stand."""

    chunks: Sequence[Chunk]
    token_BP: torch.Tensor  # on the device
    fetched: Fetched  # the same, and log probabilities of those who want them

    @property
    def newest_B(self) -> torch.Tensor:
        """Where nobody has drafts: the tokens that the next step takes; some token after an error,
        since that step may be launched before the error is seen.
        """
        return self.token_BP[:, 0].clamp(min=0)

    def choices(self) -> list[Choice]:
        """Of every chunk; waits for them. Grammars take what was chosen."""
        token_BP, *rest = self.fetched.wait()
        logprobs = listed(Logprobs(*rest)) if rest else []
        choices, place = [], 0
        for chunk, row in zip(self.chunks, token_BP.tolist(), strict=True):
            own: list[TokenLogprobs] = []
            wanted = chunk.request.params.logprobs
            if wanted is not None:
                own = logprobs[place : place + len(chunk.drafts) + 1]
                own = [one._replace(top=one.top[:wanted]) for one in own]
                place += len(chunk.drafts) + 1
            choices.append(_follow(chunk.request, _choice(chunk.drafts, row, own)))
        return choices


def choose(chunks: Sequence[Chunk], logits_NV: torch.Tensor, *, block: bool) -> Chosen:
    """``logits_NV`` has the places after each chunk's newest token and after each of its drafts;
    it is changed.
    """
    best_N = logits_NV.max(-1)  # of a row with a NaN, that
    describing = any(_wants_logprobs(one.request) for one in chunks)
    raw_NV = logits_NV.clone() if describing else None
    bitmask = bitmasks(chunks, logits_NV.shape[1])
    if bitmask is None and all(_is_plain(one.request) for one in chunks):
        token_BP = _by_request(best_N.indices, chunks)
    else:
        token_BP = _sample(chunks, logits_NV, bitmask, block=block)
    broken_BP = _by_request(best_N.values.isnan(), chunks)
    token_BP = token_BP.masked_fill(broken_BP, NOT_FINITE)
    fetched = [token_BP]
    if raw_NV is not None:
        fetched += _described(chunks, raw_NV, token_BP)
    return Chosen(chunks, token_BP, Fetched(*fetched))


def depends_on_output(request: Request) -> bool:
    """Whether what may follow is decided on the host, from the tokens themselves."""
    params = request.params
    words = any(len(word) > 1 for word in params.bad_words_token_ids)
    return request.matcher is not None or params.has_penalties or words


def end(request: Request, token: int) -> str | None:
    """Why the request ends with its last ``token``; None if it goes on."""
    if token in request.stop_tokens and request.num_output >= request.params.min_tokens:
        return "stop"
    return "length" if len(request.tokens) >= request.max_length else None


def _wants_logprobs(request: Request) -> bool:
    return request.params.logprobs is not None


def _is_plain(request: Request) -> bool:
    """Greedy, without anything that changes logits."""
    params = request.params
    if params.temperature or params.logit_bias or params.has_penalties or params.forbids_tokens:
        return False
    chosen = request.length - request.num_prompt
    return chosen + len(request.drafts) >= params.min_tokens or not request.stop_tokens


def _choice(drafts: Sequence[int], row: Sequence[int], logprobs: list[TokenLogprobs]) -> Choice:
    """The drafts that stand, and what follows the last of them."""
    tokens: list[int] = []
    for draft, token in zip((*drafts, NONE), row, strict=False):
        if token in ERRORS:
            return Choice([], [], ERRORS[token])
        if token != NONE:
            tokens.append(token)
        if token != draft:
            break
    return Choice(tokens, logprobs[: len(tokens)])


def _sample(
    chunks: Sequence[Chunk], logits_NV: torch.Tensor, bitmask: torch.Tensor | None, *, block: bool
) -> torch.Tensor:
    """int64 [B, P]; NONE after what follows the last draft that stands."""
    requests, (vocab, device) = (
        [chunk.request for chunk in chunks],
        (logits_NV.shape[1], logits_NV.device),
    )
    rows = [Row(chunk.request, place) for chunk in chunks for place in range(len(chunk.drafts) + 1)]
    target_BPV = _by_request(target_distributions(logits_NV, rows, bitmask), chunks)
    draft_BK = _drafts(chunks, device)
    lengths = np.array([[request.length] for request in requests])
    position_BP = lengths + np.arange(target_BPV.shape[1])
    seeds = seeds_of(requests)[:, None]
    verdict = verify(
        target_BPV,
        draft_BK,
        _draft_probs(chunks, draft_BK, vocab),
        uniform(seeds, position_BP[:, :-1], ACCEPT, device),
        uniform(seeds, position_BP, CHOOSE, device),
        block=block,
    )
    accepted_B1 = verdict.accepted_B[:, None]
    token_B1 = verdict.token_B[:, None].clamp(max=vocab - 1)  # of a row of NaN, any number
    place_P = torch.arange(target_BPV.shape[1], device=device)
    token_BP = torch.where(place_P == accepted_B1, token_B1, F.pad(draft_BK, (0, 1), value=-1))
    token_BP = token_BP.masked_fill(place_P > accepted_B1, NONE)
    nothing_BP = target_BPV[..., 0].isnan() & (place_P == accepted_B1)
    return token_BP.masked_fill(nothing_BP, NOTHING_LEFT)


def _by_request(rows_N: torch.Tensor, chunks: Sequence[Chunk]) -> torch.Tensor:
    """[N, ...] as [B, P, ...]; places that a request does not have are as its last."""
    counts = [len(chunk.drafts) for chunk in chunks]
    if min(counts) == max(counts):
        return rows_N.unflatten(0, (len(chunks), -1))
    first_B = np.cumsum([0, *(count + 1 for count in counts[:-1])])
    place_BP = np.minimum(np.arange(max(counts) + 1), np.array(counts)[:, None])
    return rows_N[to_device(first_B[:, None] + place_BP, rows_N.device)]


def _drafts(chunks: Sequence[Chunk], device: torch.device) -> torch.Tensor:
    """int64 [B, K]; -1 where there is none."""
    num_drafts = max(len(chunk.drafts) for chunk in chunks)
    draft_BK = np.full((len(chunks), num_drafts), -1)
    for own, chunk in zip(draft_BK, chunks, strict=True):
        own[: len(chunk.drafts)] = chunk.drafts
    return to_device(draft_BK, device)


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


def _described(chunks: Sequence[Chunk], raw_NV: torch.Tensor, token_BP: torch.Tensor) -> Logprobs:
    """Of the places of those who want them; what stands for no token is as token 0."""
    rows, tokens, first = [], [], 0
    for number, chunk in enumerate(chunks):
        count = len(chunk.drafts) + 1
        if _wants_logprobs(chunk.request):
            rows += range(first, first + count)
            start = number * token_BP.shape[1]
            tokens += range(start, start + count)
        first += count
    index = to_device(np.array([rows, tokens]), raw_NV.device)
    num_best = max(chunk.request.params.logprobs or 0 for chunk in chunks)
    return look_up(raw_NV[index[0]], token_BP.flatten()[index[1]].clamp(min=0), num_best)


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
