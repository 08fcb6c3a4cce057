"""Servers for tests: the application in a thread on a free port, on any engine."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from fourge.serve.limits import Limits
from fourge.serve.run import http_config
from fourge.serve.served import Served
from fourge.serve.service import Service


class Running:
    """A server that answers at ``url``."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url

    @property
    def stats(self) -> dict[str, Any]:
        return self.service.served.engine.stats()


def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    """Fails unless ``holds()`` becomes true in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def running(
    served: Served | None, *, limits: Limits | None = None, api_keys: tuple[str, ...] = ()
) -> Iterator[Running]:
    """Serve until the block ends; the engine is left to its owner. None: still loading."""
    service = Service(limits or Limits(), api_keys)
    if served is not None:
        service.begin_serving(served)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # whoever comes before uvicorn does waits for it
        config = http_config(service)
        config.timeout_graceful_shutdown = 1
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield Running(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()
