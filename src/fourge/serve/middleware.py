"""Around every request: its id, its log line, the key, the size and pace of its body."""

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from dataclasses import asdict
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fourge.serve.errors import ApiError, anthropic_body, openai_body
from fourge.serve.service import Service

_LOG = logging.getLogger("fourge.serve")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# Without a key: the page (which asks for one), what a balancer polls, and the description.
OPEN = {"/", "/health", "/ready", "/version", "/docs", "/openapi.json"}
_POLLED = {"/health", "/ready", "/metrics"}
ANTHROPIC = "/v1/messages"  # has its own form of errors, and its own name for the id
CLIENT_GONE = 499  # nginx's number; only the log sees it


def error_response(error: ApiError, path: str, request_id: str) -> Response:
    """The error in the form of the surface."""
    body = anthropic_body(error, request_id) if path.startswith(ANTHROPIC) else openai_body(error)
    return JSONResponse(body, status_code=error.status, headers=error.headers)


class Border:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state: dict[str, Any] = {"request_id": request_id, "status": CLIENT_GONE}
        scope["state"] = scope.get("state", {}) | state
        begun = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["state"]["status"] = message["status"]
                answered = MutableHeaders(scope=message)
                answered["X-Request-Id"] = request_id
                if scope["path"].startswith(ANTHROPIC):
                    answered["request-id"] = request_id
            await send(message)

        try:
            error = self._refusal(scope, headers)
            if error is not None:
                refused = error_response(error, scope["path"], request_id)
                await refused(scope, receive, send_with_id)
            else:
                await self._app(scope, self._bounded(receive), send_with_id)
        except Exception as error:
            if "error" not in scope["state"]:  # else it was answered and logged (app.py)
                _LOG.error("a request failed", exc_info=error)
        finally:
            _log(scope, time.monotonic() - begun)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        most = self._service.limits.max_body_bytes
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            return _too_large(most)
        if scope["path"] in OPEN or self._has_key(headers):
            return None
        return ApiError(
            401, "an API key is needed: send it as 'Authorization: Bearer KEY' or as 'x-api-key'.",
            code="invalid_api_key",
        )  # fmt: skip

    def _has_key(self, headers: Headers) -> bool:
        keys = self._service.api_keys
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        # All of them, in constant time.
        matches = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        return not keys or any(matches)

    def _bounded(self, receive: Receive) -> Receive:
        """The body in time and within its size; after it, only the client's leaving comes."""
        limits, taken, ended = self._service.limits, 0, False
        deadline = time.monotonic() + limits.body_timeout_s

        async def bounded() -> Message:
            nonlocal taken, ended
            if ended:
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not come in time.") from None
            taken += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if taken > limits.max_body_bytes:
                raise HTTPException(413, _too_large(limits.max_body_bytes).message)
            return message

        return bounded


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is too large: at most {most} bytes are taken.")


def _log(scope: Scope, seconds: float) -> None:
    """One line of JSON a request; none for what is polled, as long as all is well."""
    state = scope["state"]
    if scope["path"] in _POLLED and state["status"] == 200:
        return
    gone = state.get("disconnected", False)
    line: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": state["request_id"],
        "method": scope["method"],
        "path": scope["path"],
        "status": CLIENT_GONE if gone else state["status"],
        "total_s": round(seconds, 4),
    }
    line |= {name: state[name] for name in ("model", "labels", "error") if state.get(name)}
    if (figures := state.get("figures")) is not None:
        line |= {name: value for name, value in asdict(figures).items() if value is not None}
        if figures.first_token_s is not None:
            line["first_token_s"] = round(figures.first_token_s, 4)
    _LOG.info(json.dumps(line))
