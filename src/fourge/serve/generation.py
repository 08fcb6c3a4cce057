"""A job on the engine: its answers as they come, all choices together, within the limits.

Whoever stops listening frees the cache: leaving ``steps`` ends every request of the job within one
step of the engine.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from fourge.engine.async_engine import Result, Spent
from fourge.serve.answer import Answer, Step
from fourge.serve.errors import ApiError
from fourge.serve.metrics import Metrics
from fourge.serve.preparing import Job
from fourge.serve.served import Served


@dataclass
class Figures:
    """What one HTTP request took, for usage, log and metrics. Times in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    drafts: int = 0
    preemptions: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    first_token_s: float | None = None

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }

    def speculation(self) -> dict[str, Any] | None:
        """vllm's ``metrics`` object; None where nothing was drafted."""
        if not self.drafts:
            return None
        return {
            "speculative_decoding": {
                "num_drafts": self.drafts,
                "num_draft_tokens": self.draft_tokens,
                "num_accepted_tokens": self.accepted_tokens,
                "mean_acceptance_length": 1 + self.accepted_tokens / self.drafts,
                "draft_acceptance_rate": self.accepted_tokens / self.draft_tokens,
            }
        }


class Generation:
    """One job. ``figures`` grow while ``steps`` runs and are whole at its end."""

    def __init__(
        self, served: Served, job: Job, *, metrics: Metrics, timeout_s: float,
        release: Callable[[], None],
    ) -> None:  # fmt: skip
        """``release`` gives the places back; who begins a generation calls it at the end."""
        self.figures = Figures(prompt_tokens=sum(map(len, job.prompts)))
        self.answers = [Answer(served, job, index) for index in range(len(job.choices))]
        self.job, self.release = job, release
        self._served, self._metrics, self._timeout_s = served, metrics, timeout_s
        self._counted: set[int] = set()  # prompts whose cached tokens are counted
        self._given: asyncio.Queue[tuple[int, Result]] = asyncio.Queue()

    def abort(self) -> None:
        """End all answers, in the event loop that listens; for the client that is an error."""
        self._end(ApiError(499, "the request was aborted.", code="aborted"))

    def _end(self, error: ApiError) -> None:
        self._given.put_nowait((0, error))

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Every step of every answer. Raises ApiError: the time is over, or the engine could not
        go on. To be closed (contextlib.aclosing)."""
        late = ApiError(504, f"the request took longer than {self._timeout_s:g} s.", code="timeout")
        timer = asyncio.get_running_loop().call_later(self._timeout_s, self._end, late)
        leaving: list[Callable[[], None]] = []
        clocks = [_Clock() for _ in self.answers]
        try:
            for answer in self.answers:
                leaving.append(self._begin(answer))
            left = len(leaving)
            while left:
                index, update = await self._given.get()
                if isinstance(update, Exception):
                    raise update
                answer = self.answers[index]
                if answer.stopped:
                    continue  # of a step that was under way
                if update.finish_reason == "error":
                    text = f"the engine could not go on with this request: {update.error}"
                    raise ApiError(500, text, code="engine_error")
                step = answer.take(update)
                self._observe(clocks[index], len(step.token_ids))
                if step.finish_reason is not None:
                    left -= 1
                    leaving[index]()
                    self._finish(answer, update.spent, step.finish_reason, clocks[index])
                yield step
        finally:
            timer.cancel()
            for leave in leaving:
                leave()

    def _begin(self, answer: Answer) -> Callable[[], None]:
        number, params = self.job.choices[answer.index]
        return self._served.engine.begin(
            self.job.prompts[number], params,
            lambda result: self._given.put_nowait((answer.index, result)),
        )  # fmt: skip

    def _observe(self, clock: "_Clock", num_tokens: int) -> None:
        now = monotonic()
        if clock.latest == clock.begun:
            if self.figures.first_token_s is None:
                self.figures.first_token_s = now - clock.begun
            self._metrics.first_token(now - clock.begun)
        elif num_tokens:
            self._metrics.between_tokens((now - clock.latest) / num_tokens, num_tokens)
        self.figures.output_tokens += num_tokens
        clock.latest = now

    def _finish(self, answer: Answer, spent: Spent, reason: str, clock: "_Clock") -> None:
        figures, number = self.figures, self.job.choices[answer.index][0]
        if number not in self._counted:
            self._counted.add(number)
            figures.cached_tokens += spent.num_cached
        figures.reasoning_tokens += answer.num_reasoning
        figures.draft_tokens += spent.drafted
        figures.accepted_tokens += spent.accepted
        figures.preemptions += spent.num_preemptions
        if spent.drafted:
            figures.drafts += spent.drafted // self._served.num_speculative_tokens
        figures.finish_reasons.append(reason)
        if answer.parser is not None:
            self._metrics.tool_calls(answer.parser.num_calls, answer.parser.num_unknown)
        self._metrics.finished(reason, answer.num_tokens, clock.latest - clock.begun)
        self._metrics.phases(spent, answer.num_tokens)


@dataclass
class _Clock:
    """Of one answer, in seconds of ``monotonic``."""

    begun: float = field(default_factory=monotonic)
    latest: float = 0.0

    def __post_init__(self) -> None:
        self.latest = self.begun
