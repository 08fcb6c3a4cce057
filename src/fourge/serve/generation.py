"""A job on the engine: its answers as they come, all choices together, within the limits.

Whoever stops listening frees the cache: leaving ``steps`` ends every request of the job within one
step of the engine.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from fourge.engine.engine import Progressed
from fourge.engine.request import Request
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

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Every step of every answer. Raises ApiError: the time is over, or the engine could not
        go on. To be closed (contextlib.aclosing)."""
        results: asyncio.Queue[Step | Exception] = asyncio.Queue()
        late = ApiError(504, f"the request took longer than {self._timeout_s:g} s.", code="timeout")
        timer = asyncio.get_running_loop().call_later(self._timeout_s, results.put_nowait, late)
        pumps = [asyncio.create_task(self._pump(one, results)) for one in self.answers]
        try:
            left = len(pumps)
            while left:
                step = await results.get()
                if isinstance(step, Exception):
                    raise step
                left -= step.finish_reason is not None
                yield step
        finally:
            timer.cancel()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, answer: Answer, results: asyncio.Queue[Step | Exception]) -> None:
        """One answer's steps into the common queue."""
        number, params = self.job.choices[answer.index]
        name = f"serve-{uuid.uuid4().hex}"
        begun = last = monotonic()
        try:
            stream = self._served.engine.generate(self.job.prompts[number], params, name)
            async with aclosing(stream) as progress:
                async for progressed in progress:
                    if progressed.finish_reason in ("error", "abort"):
                        raise ApiError(500, _failure(progressed), code="engine_error")
                    step = answer.take(progressed)
                    last = self._observe(progressed, len(step.token_ids), begun, last)
                    if step.finish_reason is not None:
                        self._finish(answer, progressed.request, step.finish_reason, begun)
                        results.put_nowait(step)
                        return
                    results.put_nowait(step)
        except Exception as error:  # goes to whoever listens
            results.put_nowait(error)

    def _observe(self, progressed: Progressed, num_tokens: int, begun: float, last: float) -> float:
        now = monotonic()
        if last == begun:
            if self.figures.first_token_s is None:
                self.figures.first_token_s = now - begun
            self._metrics.first_token(now - begun)
        elif num_tokens:
            self._metrics.between_tokens((now - last) / num_tokens, num_tokens)
        self.figures.output_tokens += num_tokens
        return now

    def _finish(self, answer: Answer, request: Request, reason: str, begun: float) -> None:
        figures, number = self.figures, self.job.choices[answer.index][0]
        if number not in self._counted:
            self._counted.add(number)
            figures.cached_tokens += request.num_cached
        figures.reasoning_tokens += answer.num_reasoning
        figures.draft_tokens += request.drafted
        figures.accepted_tokens += request.accepted
        figures.preemptions += request.num_preemptions
        if request.drafted:
            figures.drafts += request.drafted // self._served.num_speculative_tokens
        figures.finish_reasons.append(reason)
        if answer.parser is not None:
            self._metrics.tool_calls(answer.parser.num_calls, answer.parser.num_unknown)
        self._metrics.finished(reason, answer.num_tokens, monotonic() - begun)


def _failure(progressed: Progressed) -> str:
    if progressed.finish_reason == "abort":
        return "the request was aborted."
    return f"the engine could not go on with this request: {progressed.request.error}"
