"""The engine in a process of its own, so that neither it nor the event loop waits for the other.

    server: Streams -> orders -> socket -> | reader -> EngineLoop -> steps -> socket | -> Streams
One interpreter runs Python code of the engine or of the server; two run both. What a step gave all
requests is one message. The child (engine_child.py) ends when its socket does, however the server
ended; if it ends by itself, all requests do with an EngineError, and the server stays to say so.
"""

import asyncio
import itertools
import logging
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fourge.engine.async_engine import Delivery, Spent, Streams, Update
from fourge.engine.loader import OnProgress
from fourge.engine.params import Bounds, SamplingParams, StructuredOutputs, checked
from fourge.engine.request import TokenLogprobs
from fourge.errors import EngineError

_LOG = logging.getLogger("fourge.serve")
CLOSING_S = 30.0  # for the step under way


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a server has to know of its engine. ``details``: options and what became of them."""

    bounds: Bounds
    max_num_seqs: int
    num_speculative_tokens: int
    details: Mapping[str, Any]


def pack(delivery: Delivery) -> list[tuple[int, Any]]:
    """For the socket: pickle takes ten times as long for named tuples."""
    return [
        (ticket, result if isinstance(result, Exception) else _plain(result))
        for ticket, result in delivery
    ]


def _plain(update: Update) -> tuple[Any, ...]:
    logprobs = [tuple(one) for one in update.logprobs]
    return update.token_ids, logprobs, update.finish_reason, tuple(update.spent), *update[4:]


def unpack(packed: Sequence[tuple[int, Any]]) -> Delivery:
    """What was packed."""
    return [
        (ticket, result if isinstance(result, Exception) else _named(*result))
        for ticket, result in packed
    ]


def _named(
    token_ids: list[int], logprobs: Sequence[Any], reason: str | None, spent: Sequence[Any],
    *rest: Any,
) -> Update:  # fmt: skip
    named = [TokenLogprobs(*one) for one in logprobs]
    return Update(token_ids, named, reason, Spent(*spent), *rest)


class EngineProcess:
    """A process with an engine; call ``close`` at the end. Streams as AsyncEngine does."""

    def __init__(
        self, checkpoint: Path, options: Mapping[str, Any], on_progress: OnProgress
    ) -> None:
        """Comes back when the checkpoint is loaded. ``options``: of LLM. FourgeError subclasses:
        what LLM raises, and EngineError if the process ended."""
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: a checkpoint in the current folder is no place to import from.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fourge.serve.engine_child", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        self._connection = Connection(ours.detach())
        self._orders: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._compiled: dict[int, Future[None]] = {}
        self._numbers = itertools.count()
        self._closing = self._stopped = False
        self._streams = Streams(self)
        self.begin, self.generate = self._streams.begin, self._streams.generate
        try:
            self.facts, self._stats = self._load((checkpoint, dict(options)), on_progress)
        except BaseException:
            self._end()
            raise
        self._reader = threading.Thread(target=self._read, name="from engine", daemon=True)
        self._reader.start()
        threading.Thread(target=self._write, name="to engine", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        """Whether the process still works."""
        return not self._stopped

    def add(self, ticket: int, prompt: Sequence[int], params: SamplingParams) -> None:
        """See Orders, as ``abort``."""
        self._orders.put(("add", ticket, prompt, params))

    def abort(self, ticket: int) -> None:
        self._orders.put(("abort", ticket))

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """RequestError: it could not be served; what a grammar is worth, only ``compile`` knows."""
        checked(prompt, params, self.facts.bounds)

    async def compile(self, wanted: StructuredOutputs) -> None:
        """Have a grammar ready, so that the engine does not wait for it. RequestError: it is
        malformed."""
        number = next(self._numbers)
        compiled = self._compiled[number] = Future()
        compiled.set_running_or_notify_cancel()  # whoever waits may leave; the answer comes
        self._orders.put(("compile", number, wanted))
        if self._stopped:  # else the reader sees to it
            raise EngineError("the engine has stopped.")
        await asyncio.wrap_future(compiled)

    def stats(self) -> dict[str, Any]:
        """See Engine.stats; as it was after the last step."""
        return self._stats

    def close(self) -> None:
        """End all requests, and the process."""
        self._closing = True
        self._streams.close("was closed")
        self._orders.put(("close",))
        self._reader.join(CLOSING_S)
        self._end()

    def _load(self, what: tuple[Any, ...], on_progress: OnProgress) -> tuple[Facts, dict[str, Any]]:
        try:
            self._connection.send((*what, torch.get_num_threads()))
            while True:
                kind, *rest = self._connection.recv()
                if kind == "loaded":
                    return rest[0], rest[1]
                if kind == "failed":
                    raise rest[0]
                on_progress(*rest)
        except (EOFError, OSError):
            raise EngineError(f"{self._ended()} while it loaded the checkpoint.") from None

    def _write(self) -> None:
        """Beside the event loop: a long prompt fills the socket until the child has read it."""
        try:
            order = None
            while order != ("close",):
                order = self._orders.get()
                self._connection.send(order)
        except OSError:
            pass  # it has ended, as the reader finds

    def _read(self) -> None:
        try:
            while True:
                kind, *rest = self._connection.recv()
                if kind == "given":
                    given, self._stats = rest
                    self._streams.deliver(unpack(given))
                else:
                    number, error = rest
                    compiled = self._compiled.pop(number)
                    compiled.set_exception(error) if error else compiled.set_result(None)
        except (EOFError, OSError):
            self._stopped = True
            if not self._closing:
                _LOG.error("%s", self._ended())
            self._streams.close("has stopped")
            for compiled in list(self._compiled.values()):
                compiled.set_exception(EngineError("the engine has stopped."))

    def _ended(self) -> str:
        status = self._process.wait()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return f"the engine's process ended with {how}"

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()
