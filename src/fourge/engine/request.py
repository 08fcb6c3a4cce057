"""One request on its way: its tokens, where it stands, what it gave.

A request of length n has the cache of its first ``num_computed``; the newest token was chosen but
has not gone through the model. ``drafts`` stand for the tokens after it; they are kept when the
request is preempted, so that a seed gives the same tokens whatever happens to it. The last
``num_ahead`` tokens were chosen by steps in flight: counted, but known to the device alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from fourge.engine.params import SamplingParams


class Matcher(Protocol):
    """Which tokens a grammar allows next (xgrammar.GrammarMatcher)."""

    def fill_next_token_bitmask(self, bitmask: torch.Tensor, index: int = 0) -> bool: ...

    def accept_token(self, token_id: int) -> bool: ...

    def rollback(self, num_tokens: int = 1) -> None: ...

    def is_terminated(self) -> bool: ...


class TokenLogprobs(NamedTuple):
    """Of one position: the token that stands there, and the best ones, best first. Natural
    logarithms of the model's own distribution, before any sampling parameter.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Request:
    """``tokens`` is the prompt and what is known to have been chosen after it."""

    request_id: str
    tokens: list[int]
    num_prompt: int
    max_length: int  # tokens at which it ends
    params: SamplingParams
    stop_tokens: frozenset[int]
    seed: int
    arrival: int
    matcher: Matcher | None = None
    arrived_s: float = 0.0
    # where it stands
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of its full pages of committed tokens
    num_published: int = 0
    num_computed: int = 0
    num_ahead: int = 0
    num_predicted: int = 1  # the next token that the MTP layer has to see
    drafts: list[int] = field(default_factory=list)
    draft_probs_KV: torch.Tensor | None = None  # None: drafts are certain choices
    # what it gave
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    num_cached: int = 0  # prompt tokens that were found in the prefix cache
    num_preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    scheduled_s: float | None = None  # when it was let in first
    first_token_s: float | None = None

    @property
    def length(self) -> int:
        return len(self.tokens) + self.num_ahead

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]


class Chunk(NamedTuple):
    """The part of a request that goes through the model in one step."""

    request: Request
    start: int
    num_committed: int
    drafts: tuple[int, ...]
    samples: bool  # its last committed token is the request's newest: the next one is chosen

    @property
    def num_tokens(self) -> int:
        return self.num_committed + len(self.drafts)


class Part(NamedTuple):
    """Consecutive positions of one sequence."""

    pages: Sequence[int]
    position: int
    num_tokens: int
