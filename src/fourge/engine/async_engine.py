"""An engine for a server: a thread steps it, requests stream from any event loop.

    async for progressed in engine.generate(tokens, params):
        ...                                                    # leaving the loop aborts the request
What the thread is told (add, abort) it does between two steps. A step that fails as a whole ends
the requests that took part with the reason "error"; the engine goes on with the next ones.
"""

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from fourge.engine.engine import Engine
from fourge.engine.flight import Progressed
from fourge.engine.params import SamplingParams
from fourge.errors import EngineError, FourgeError

Deliver = Callable[[Progressed | Exception], None]


class AsyncEngine:
    """Owns an engine; call ``close`` at the end, or use it as a context manager."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._told: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._receivers: dict[str, Deliver] = {}
        self._numbers = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, request_id: str | None = None
    ) -> AsyncGenerator[Progressed, None]:
        """What each step gives, until one has a ``finish_reason``. RequestError: it cannot be
        served. EngineError: the engine is closed, or was while the request ran.
        """
        if self._closed:
            raise EngineError("the engine is closed.")
        self._engine.check(prompt, params)
        name = request_id or f"request-{next(self._numbers)}"
        loop = asyncio.get_running_loop()
        results: asyncio.Queue[Progressed | Exception] = asyncio.Queue()

        def deliver(result: Progressed | Exception) -> None:
            loop.call_soon_threadsafe(results.put_nowait, result)

        begun = [False]
        self._told.put(lambda: self._add(name, prompt, params, deliver, begun))
        try:
            while True:
                result = await results.get()
                if isinstance(result, Exception):
                    raise result
                yield result
                if result.finish_reason is not None:
                    return
        finally:
            # Of a request that was refused, the id may be somebody else's.
            self._told.put(lambda: self._abort(name) if begun[0] else None)

    def abort(self, request_id: str) -> None:
        """End a request; its stream ends with the reason "abort"."""
        self._told.put(lambda: self._abort(request_id))

    def stats(self) -> dict[str, Any]:
        """See Engine.stats."""
        return self._engine.stats()

    @property
    def is_alive(self) -> bool:
        """Whether the thread still works."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End all requests, and the thread."""
        self._closed = True
        self._told.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            while not self._engine.has_work or not self._told.empty():
                what = self._told.get()
                if what is None:
                    self._end_all(EngineError("the engine was closed."))
                    return
                what()
            try:
                self._deliver(self._engine.step())
            except Exception as error:
                self._deliver(self._engine.fail(f"the step failed: {error}"))

    def _deliver(self, results: Sequence[Progressed]) -> None:
        for progressed in results:
            name = progressed.request.request_id
            deliver = self._receivers[name]
            if progressed.finish_reason is not None:
                del self._receivers[name]
            deliver(progressed)

    def _add(
        self, name: str, prompt: Sequence[int], params: SamplingParams, deliver: Deliver,
        begun: list[bool],
    ) -> None:  # fmt: skip
        try:
            self._engine.add(name, prompt, params)
        except FourgeError as error:
            deliver(error)
            return
        begun[0] = True
        self._receivers[name] = deliver

    def _abort(self, name: str) -> None:
        ended = self._engine.abort(name)
        if ended is not None:
            self._deliver([ended])

    def _end_all(self, error: Exception) -> None:
        for name in list(self._receivers):
            self._engine.abort(name)
            self._receivers.pop(name)(error)
