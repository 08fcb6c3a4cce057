"""Server-sent events, and who is still listening.

Every event goes out as soon as there is one. A client that disconnects ends the work for it,
streamed or not; a silent stream gets comments, so that proxies keep it open.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fourge.serve.errors import ApiError, from_error

_LOG = logging.getLogger("fourge.serve")
_ENCODER = json.JSONEncoder(separators=(",", ":"))  # json.dumps would make one for every event
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
Events = AsyncGenerator[bytes, None]
Result = TypeVar("Result")


def label(request: Request, **labels: object) -> None:
    """What a client calls itself and its requests, for the log."""
    request.scope["state"]["labels"] = {name: value for name, value in labels.items() if value}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def event(document: Any, name: str | None = None) -> bytes:
    """One event; Anthropic's and the responses API's have names."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {_ENCODER.encode(document)}\n\n".encode()


def api_error(error: Exception) -> ApiError:
    """As the client is told; what is fourge's own fault goes to the log with its traceback."""
    told = from_error(error)
    if told.status == 500 and not isinstance(error, ApiError):
        _LOG.error("a request failed", exc_info=error)
    return told


class EventStream(Response):
    """Sends ``events`` while the client listens; ``on_error`` makes the last ones of a failure.
    ``release`` is called at the end, whatever happens.
    """

    def __init__(
        self, events: Events, *, on_error: Callable[[ApiError], bytes],
        release: Callable[[], None], ping_interval_s: float,
    ) -> None:  # fmt: skip
        self._events, self._on_error, self._release = events, on_error, release
        self._ping_interval_s = ping_interval_s
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers(
            {
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await _first_of(
                self._send_events(scope, send), _disconnected(receive), self._ping(send)
            )
        except ClientGone:
            scope["state"]["disconnected"] = True
        finally:
            self._release()

    async def _send_events(self, scope: Scope, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await _send_body(send, data)
        except OSError as error:  # from send
            raise ClientGone from error
        except Exception as error:
            told = api_error(error)
            scope["state"]["error"] = told.message  # for the log
            await _send_body(send, self._on_error(told))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(self._ping_interval_s)
            await _send_body(send, PING)


async def while_listening(request: Request, work: Awaitable[Result]) -> Result:
    """The result of ``work``, which is cancelled if the client leaves: then ClientGone."""
    return await _first_of(work, _disconnected(request.receive))


async def _first_of(work: Awaitable[Result], *others: Awaitable[None]) -> Result:
    """The result of ``work``; an exception of any of them, whichever comes first."""
    first = asyncio.ensure_future(work)
    rest = [asyncio.ensure_future(one) for one in others]
    tasks = [first, *rest]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if first not in done:
            for task in done:
                task.result()
        return await first
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGone


async def _send_body(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
