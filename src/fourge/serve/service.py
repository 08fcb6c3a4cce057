"""What all surfaces share: the model, once it is there, and the way from request to answers."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import TypeVar

from starlette.requests import Request

from fourge.serve.answer import Step
from fourge.serve.errors import ApiError
from fourge.serve.generation import Generation
from fourge.serve.limits import RETRY_AFTER_S, Admission, Limits
from fourge.serve.metrics import Metrics
from fourge.serve.preparing import Job
from fourge.serve.served import Served
from fourge.serve.streaming import Events, EventStream, while_listening

Result = TypeVar("Result")


class Service:
    """One server. ``draining``: it finishes what it has begun and takes nothing new."""

    def __init__(self, limits: Limits, api_keys: tuple[str, ...] = ()) -> None:
        self.limits, self.api_keys = limits, api_keys
        self.metrics = Metrics()
        self.admission = Admission(limits.max_waiting)
        self.draining = False
        self.started_s = time.time()
        self._served: Served | None = None
        self._under_way: dict[str, set[Generation]] = {}  # by the id of the request
        # One thread: tokenizers are not made for several (they raise "Already borrowed").
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    def begin_serving(self, served: Served) -> None:
        """The model is there."""
        self.admission.most = self.limits.max_waiting + served.max_num_seqs
        self.metrics.watch(served.engine, served.details)
        self._served = served

    @property
    def is_ready(self) -> bool:
        return self._served is not None and not self.draining

    @property
    def served(self) -> Served:
        """ApiError 503 while it is loading."""
        if self._served is None:
            raise ApiError(
                503, "the model is being loaded.", code="loading", retry_after_s=RETRY_AFTER_S
            )
        return self._served

    async def in_worker(self, work: Callable[[], Result]) -> Result:
        """Run what is slow beside the event loop, one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    async def begin(
        self, request: Request, model: str, num_answers: int, prepare: Callable[[Served], Job]
    ) -> Generation:
        """A place in the queue, then the job. Everything that can be refused is refused here."""
        served = self.served
        served.check_name(model)
        if num_answers > self.limits.max_choices:
            raise ApiError(
                400, f"{num_answers} answers are asked for; at most {self.limits.max_choices} are"
                " given to one request.", param="n",
            )  # fmt: skip
        release = self.admission.take(num_answers)
        request_id = request.scope["state"]["request_id"]
        try:
            generation = await self.in_worker(
                lambda: Generation(
                    served, prepare(served), metrics=self.metrics,
                    timeout_s=self.limits.request_timeout_s,
                    release=lambda: self._leave(request_id, generation, release),
                )
            )  # fmt: skip
            if (grammar := generation.job.grammar) is not None:
                await served.engine.compile(grammar)  # may take a while; others need not wait
        except BaseException:
            release()
            raise
        request.scope["state"] |= {"model": model, "figures": generation.figures}
        self._under_way.setdefault(request_id, set()).add(generation)
        return generation

    def _leave(self, request_id: str, generation: Generation, release: Callable[[], None]) -> None:
        release()
        same = self._under_way.get(request_id, set())
        same.discard(generation)
        if not same:
            self._under_way.pop(request_id, None)

    def abort(self, request_ids: Sequence[str] | None = None) -> list[str]:
        """End the requests with these ids, or all; which ones there were."""
        wanted = list(self._under_way) if request_ids is None else dict.fromkeys(request_ids)
        found = [one for one in wanted if one in self._under_way]
        for request_id in found:
            for generation in self._under_way[request_id]:
                generation.abort()
        return found

    def stream(
        self, generation: Generation, events: Events, on_error: Callable[[ApiError], bytes]
    ) -> EventStream:
        """The answers as events."""
        return EventStream(
            events, on_error=on_error, release=generation.release,
            ping_interval_s=self.limits.ping_interval_s,
        )  # fmt: skip

    async def collect(self, request: Request, generation: Generation) -> list[list[Step]]:
        """All steps of every answer, at their end."""
        try:
            return await while_listening(request, _collect(generation))
        finally:
            generation.release()

    def close(self) -> None:
        """After the last request."""
        self._worker.shutdown(cancel_futures=True)
        if self._served is not None:
            self._served.engine.close()


async def _collect(generation: Generation) -> list[list[Step]]:
    steps: list[list[Step]] = [[] for _ in generation.answers]
    async with aclosing(generation.steps()) as coming:
        async for step in coming:
            steps[step.index].append(step)
    return steps
