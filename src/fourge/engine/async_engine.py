"""An engine for a server: it steps beside the event loops, and requests stream from any of them.

    async for update in engine.generate(tokens, params):
        ...                                                    # leaving the loop aborts the request
``EngineLoop`` owns the engine, wherever it runs: what it is told (add, abort) it does between two
steps, and what a step gave it delivers at once. ``Streams`` are the other end: they hand every
event loop what belongs to it, in one call a step. ``AsyncEngine`` puts the two together, with a
thread for the loop. A step that fails as a whole ends the requests that took part with the reason
"error"; the engine goes on with the next ones.
"""

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from fourge.engine.engine import Engine
from fourge.engine.flight import Progressed
from fourge.engine.params import SamplingParams
from fourge.engine.request import Request, TokenLogprobs
from fourge.errors import EngineError, FourgeError


class Spent(NamedTuple):
    """What a request took so far. ``queued_s`` until its first step, ``prefill_s`` from there to
    its first token, ``decode_s`` from there on; 0 for what has not begun.
    """

    num_cached: int = 0
    num_preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Update(NamedTuple):
    """What one step gave a request. ``prompt_logprobs``, if they were asked for, come with the
    first one; ``error`` says what went wrong where that is the ``finish_reason``.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: str | None
    spent: Spent
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str | None = None


Result = Update | Exception  # an exception is the last one
Delivery = Sequence[tuple[int, Result]]  # by the ticket of the request


class Orders(Protocol):
    """How an engine is told what to do, from any thread."""

    def add(self, ticket: int, prompt: Sequence[int], params: SamplingParams) -> None: ...

    def abort(self, ticket: int) -> None: ...


class EngineLoop:
    """Owns an engine. ``deliver`` is called in the thread that runs it, once a step."""

    def __init__(self, engine: Engine, deliver: Callable[[Delivery], None]) -> None:
        self._engine, self._deliver = engine, deliver
        self._told: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def add(self, ticket: int, prompt: Sequence[int], params: SamplingParams) -> None:
        """Begin a request; if it cannot be served, the RequestError is delivered."""
        self._told.put(lambda: self._add(ticket, prompt, params))

    def abort(self, ticket: int) -> None:
        """End a request, if it goes on; an update with the reason "abort" is delivered."""
        self._told.put(lambda: self._abort(ticket))

    def close(self) -> None:
        """End ``run``, and with it all requests."""
        self._told.put(None)

    def run(self) -> None:
        """Step until the loop is closed."""
        while True:
            while not self._engine.has_work or not self._told.empty():
                what = self._told.get()
                if what is None:
                    return
                what()
            try:
                results = self._engine.step()
            except Exception as error:
                results = self._engine.fail(f"the step failed: {error}")
            self._deliver([_delivered(progressed) for progressed in results])

    def _add(self, ticket: int, prompt: Sequence[int], params: SamplingParams) -> None:
        try:
            self._engine.add(str(ticket), prompt, params)
        except FourgeError as error:
            self._deliver([(ticket, error)])

    def _abort(self, ticket: int) -> None:
        ended = self._engine.abort(str(ticket))
        if ended is not None:
            self._deliver([_delivered(ended)])


@dataclass(frozen=True, slots=True)
class _Receiver:
    loop: asyncio.AbstractEventLoop
    receive: Callable[[Result], None]


class Streams:
    """The requests of all event loops on an engine that is told what to do by ``orders``."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._receivers: dict[int, _Receiver] = {}
        self._tickets = itertools.count()
        self._closed: str | None = None  # why

    def begin(
        self, prompt: Sequence[int], params: SamplingParams, receive: Callable[[Result], None]
    ) -> Callable[[], None]:
        """``receive`` is called in this event loop with every update, or the exception that ends
        the request; the function returned ends it before, within one step. EngineError: closed.
        """
        ticket = next(self._tickets)
        self._receivers[ticket] = _Receiver(asyncio.get_running_loop(), receive)
        if self._closed is not None:
            del self._receivers[ticket]
            raise EngineError(f"the engine {self._closed}.")
        self._orders.add(ticket, prompt, params)
        return partial(self._leave, ticket)

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[Update, None]:
        """What each step gives, until one has a ``finish_reason``. RequestError: it cannot be
        served. EngineError: the engine is closed, or was while the request ran.
        """
        results: asyncio.Queue[Result] = asyncio.Queue()
        leave = self.begin(prompt, params, results.put_nowait)
        try:
            while True:
                result = await results.get()
                if isinstance(result, Exception):
                    raise result
                yield result
                if result.finish_reason is not None:
                    return
        finally:
            leave()

    def deliver(self, delivery: Delivery) -> None:
        """From any thread: one call into every event loop that has something coming."""
        calls: dict[asyncio.AbstractEventLoop, list[tuple[Callable[[Result], None], Result]]] = {}
        for ticket, result in delivery:
            receiver = self._receivers.get(ticket)
            if receiver is None:
                continue  # it has left
            if isinstance(result, Exception) or result.finish_reason is not None:
                self._receivers.pop(ticket, None)
            calls.setdefault(receiver.loop, []).append((receiver.receive, result))
        for loop, results in calls.items():
            with suppress(RuntimeError):  # of a loop that has ended: nobody listens there
                loop.call_soon_threadsafe(_receive, results)

    def close(self, why: str) -> None:
        """All requests end with an EngineError that says ``why``, and no other ones begin."""
        self._closed = why
        left = list(self._receivers)
        self.deliver([(ticket, EngineError(f"the engine {why}.")) for ticket in left])
        for ticket in left:
            self._orders.abort(ticket)

    def _leave(self, ticket: int) -> None:
        if self._receivers.pop(ticket, None) is not None:
            self._orders.abort(ticket)


class AsyncEngine:
    """Owns an engine; call ``close`` at the end, or use it as a context manager."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = EngineLoop(engine, lambda delivery: self._streams.deliver(delivery))
        self._streams = Streams(self._loop)
        self.begin, self.generate = self._streams.begin, self._streams.generate
        self._thread = threading.Thread(target=self._loop.run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> dict[str, Any]:
        """See Engine.stats."""
        return self._engine.stats()

    @property
    def is_alive(self) -> bool:
        """Whether the thread still works."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End all requests, and the thread."""
        self._streams.close("was closed")
        self._loop.close()
        self._thread.join()


def _receive(calls: Sequence[tuple[Callable[[Result], None], Result]]) -> None:
    for receive, result in calls:
        receive(result)


def _delivered(progressed: Progressed) -> tuple[int, Update]:
    request = progressed.request
    wanted = request.params.prompt_logprobs is not None
    first = wanted and request.num_output == len(progressed.token_ids)
    return int(request.request_id), Update(
        progressed.token_ids,
        progressed.logprobs,
        progressed.finish_reason,
        _spent(request),
        list(request.prompt_logprobs) if first else None,
        request.error,
    )


def _spent(request: Request) -> Spent:
    now = time.monotonic()
    begun, first = request.scheduled_s or now, request.first_token_s or now
    return Spent(
        request.num_cached,
        request.num_preemptions,
        request.drafted,
        request.accepted,
        begun - request.arrived_s,
        first - begun,
        now - first,
    )
