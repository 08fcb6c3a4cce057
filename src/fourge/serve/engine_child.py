"""The process with the engine (engine_process.py): orders come through a socket, results go back.

python -m fourge.serve.engine_child DESCRIPTOR
"""

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from multiprocessing.connection import Connection

import torch

from fourge.engine.async_engine import Delivery, EngineLoop
from fourge.engine.params import StructuredOutputs
from fourge.errors import FourgeError
from fourge.llm import LLM
from fourge.serve.engine_process import Facts, pack


def main(descriptor: int) -> None:
    """Load, step until the server closes the engine."""
    for number in (signal.SIGINT, signal.SIGTERM):  # for the server, which drains and closes
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(descriptor)
    with suppress(BrokenPipeError, ConnectionResetError):  # the server has gone
        checkpoint, options, threads = connection.recv()
        torch.set_num_threads(threads)
        try:
            llm = LLM(
                checkpoint, **options,
                on_progress=lambda done, total: connection.send(("progress", done, total)),
            )  # fmt: skip
        except FourgeError as error:
            connection.send(("failed", error))
            return
        _Child(connection, llm).run()


class _Child:
    """Messages come from two threads: the one that steps, and the one that compiles."""

    def __init__(self, connection: Connection, llm: LLM) -> None:
        self._connection, self._llm = connection, llm
        self._sending = threading.Lock()
        self._loop = EngineLoop(llm.engine, self._deliver)

    def run(self) -> None:
        self._send("loaded", _facts(self._llm), self._llm.stats())
        threading.Thread(target=self._read, name="orders", daemon=True).start()
        self._loop.run()

    def _read(self) -> None:
        compiler = ThreadPoolExecutor(1, thread_name_prefix="compile")
        try:
            while True:
                kind, *rest = self._connection.recv()
                if kind == "add":
                    self._loop.add(*rest)
                elif kind == "abort":
                    self._loop.abort(*rest)
                elif kind == "compile":
                    compiler.submit(self._compile, *rest)
                else:
                    self._loop.close()
        except (EOFError, OSError):
            os._exit(0)  # the server has gone: nobody waits for the step under way

    def _compile(self, number: int, wanted: StructuredOutputs) -> None:
        error = None
        try:
            self._llm.matcher(wanted)
        except FourgeError as found:
            error = found
        self._send("compiled", number, error)

    def _deliver(self, delivery: Delivery) -> None:
        self._send("given", pack(delivery), self._llm.stats())

    def _send(self, *message: object) -> None:
        with self._sending:
            self._connection.send(message)


def _facts(llm: LLM) -> Facts:
    engine, options = llm.engine, llm.engine.options
    return Facts(
        bounds=engine.bounds,
        max_num_seqs=options.max_num_seqs,
        num_speculative_tokens=options.num_speculative_tokens,
        details={one.name: getattr(options, one.name) for one in fields(options)}
        | {"cache_kind": engine.sizes.cache_kind, "device": str(engine.device)},
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
