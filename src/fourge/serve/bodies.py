"""Bodies of requests: parsed beside the event loop, and not looked into when there is too much.

Python parses one JSON document in one go; in a thread that is one stop of the loop, and what comes
before and after is none.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

SMALL = 64 << 10  # bytes that are parsed before a thread has begun
_LISTS = ("messages", "input")  # of chat and messages; of responses


class TooMany(HTTPException):
    """The list ``param`` of a body is longer than the server takes."""

    def __init__(self, param: str, length: int, most: int) -> None:
        super().__init__(400, f"there are {length} messages; at most {most} are taken.")
        self.param = param


def body_route(max_messages: int) -> type[APIRoute]:
    """The class of routes that take JSON."""

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                return await handler(_Body(request, max_messages))

            return handle

    return BodyRoute


class _Body(Request):
    def __init__(self, request: Request, max_messages: int) -> None:
        super().__init__(request.scope, request.receive)
        self._max_messages = max_messages

    async def json(self) -> Any:
        """TooMany, before the items are validated one by one."""
        body = await self.body()
        if len(body) <= SMALL:
            found = json.loads(body)
        else:
            found = await asyncio.to_thread(json.loads, body)
        for name in _LISTS if isinstance(found, dict) else ():
            if isinstance(found.get(name), list) and len(found[name]) > self._max_messages:
                raise TooMany(name, len(found[name]), self._max_messages)
        return found
