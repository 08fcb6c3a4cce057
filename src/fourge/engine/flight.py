"""A step that was launched, and what its tokens make of the requests once they are known.

A launched step has taken its chunks: requests stand as after it, their new tokens counted as ahead.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fourge.engine.choosing import Choice, Chosen, choose, depends_on_output, end
from fourge.engine.logprobs import describe
from fourge.engine.request import Chunk, Request, TokenLogprobs
from fourge.engine.runner import Newest, Runner
from fourge.engine.transfers import to_device

# T tokens of a step, D hidden


@dataclass(frozen=True, slots=True)
class Progressed:
    """What one step gave one request; ``finish_reason`` as it was then, None if it goes on."""

    request: Request
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None


@dataclass
class Counters:
    """Since the engine was set up."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    drafts: int = 0  # times that drafts were verified
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)  # per position


@dataclass(frozen=True)
class Flight:
    """A launched step."""

    chunks: Sequence[Chunk]
    hidden_TD: torch.Tensor
    chosen: Chosen | None  # None where no chunk ends with its request's newest token

    @property
    def sampling(self) -> Sequence[Chunk]:
        return () if self.chosen is None else self.chosen.chunks

    @property
    def may_fly(self) -> bool:
        """Whether the next step can be launched before these tokens are known."""
        return not any(depends_on_output(chunk.request) for chunk in self.sampling)

    @property
    def newest(self) -> Newest | None:
        """For the next step, the tokens where they are."""
        if self.chosen is None:
            return None
        rows = {chunk.request: row for row, chunk in enumerate(self.sampling)}
        return Newest(self.chosen.newest_B, rows)


def launch(
    runner: Runner, chunks: Sequence[Chunk], before: Flight | None, *, block: bool
) -> Flight:
    """Take ``chunks`` through the model and choose what follows; waits for no token, unless
    log probabilities of prompts are wanted. ``before``: the step in flight.
    """
    hidden_TD = runner.target(chunks, before.newest if before else None)
    _describe_prompts(runner, chunks, hidden_TD)
    flight = Flight(chunks, hidden_TD, _choose(runner, chunks, hidden_TD, block=block))
    for chunk in chunks:
        chunk.request.num_computed = chunk.start + chunk.num_committed
        chunk.request.num_ahead += chunk.samples
    return flight


def commit(chunk: Chunk, choice: Choice, counters: Counters) -> Progressed:
    """Give a request its tokens, up to the one that ends it."""
    request = chunk.request
    request.num_ahead -= 1
    request.drafts, request.draft_probs_KV = [], None
    if choice.error is not None:
        request.finish_reason, request.error = "error", choice.error
        return Progressed(request, [], [], "error")
    if chunk.drafts:
        _count(request, counters, len(chunk.drafts), len(choice.token_ids) - 1)
    if request.first_token_s is None:
        request.first_token_s = time.monotonic()
        counters.prompt_tokens += request.num_prompt
        counters.cached_prompt_tokens += request.num_cached
    kept: list[int] = []
    for token in choice.token_ids:
        kept.append(token)
        request.tokens.append(token)
        request.finish_reason = end(request, token)
        if request.finish_reason is not None:
            break
    request.num_computed += len(kept) - 1
    counters.output_tokens += len(kept)
    logprobs = choice.logprobs[: len(kept)]
    request.logprobs += logprobs
    return Progressed(request, kept, logprobs, request.finish_reason)


def _count(request: Request, counters: Counters, drafted: int, accepted: int) -> None:
    request.drafted += drafted
    request.accepted += accepted
    counters.drafts += 1
    counters.draft_tokens += drafted
    counters.accepted_tokens += accepted
    for position in range(accepted):
        counters.accepted_at[position] += 1


def _choose(
    runner: Runner, chunks: Sequence[Chunk], hidden_TD: torch.Tensor, *, block: bool
) -> Chosen | None:
    """Tokens for those chunks that end with a request's newest."""
    sampling = [chunk for chunk in chunks if chunk.samples]
    if not sampling:
        return None
    rows, start = [], 0
    for chunk in chunks:
        start += chunk.num_tokens
        if chunk.samples:
            rows += range(start - len(chunk.drafts) - 1, start)
    if len(rows) < len(hidden_TD):
        hidden_TD = hidden_TD.index_select(0, to_device(np.array(rows), hidden_TD.device))
    return choose(sampling, runner.logits(hidden_TD), block=block)


def _describe_prompts(runner: Runner, chunks: Sequence[Chunk], hidden_TD: torch.Tensor) -> None:
    """Log probabilities of prompt tokens, of which the first has none."""
    start = 0
    for chunk in chunks:
        request, first = chunk.request, start
        start += chunk.num_tokens
        wanted = request.params.prompt_logprobs
        done = len(request.prompt_logprobs)
        if wanted is None or done >= request.num_prompt:
            continue
        if not done:
            request.prompt_logprobs.append(None)
        stop = min(chunk.start + chunk.num_committed, request.num_prompt - 1)
        tokens = request.tokens[chunk.start + 1 : stop + 1]
        begin = len(request.prompt_logprobs) - 1 - chunk.start  # preempted: some are known
        if begin < len(tokens):
            hidden_ND = hidden_TD[first + begin : first + len(tokens)]
            request.prompt_logprobs += describe(runner.logits(hidden_ND), tokens[begin:], wanted)
