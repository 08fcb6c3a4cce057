"""What goes wrong on the way to an answer, and how the surfaces say it.

OpenAI: {"error": {"message", "type", "param", "code"}}; Anthropic: {"type": "error", "error":
{"type", "message"}, "request_id"}. A stream that has begun sends the same as its last event.
"""

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from fourge.errors import EngineError, FourgeError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    499: "request_aborted",  # a number that no client tries again
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error. ``param``: the field at fault; ``code``: for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after_s = retry_after_s
        # JSON is sent as UTF-8, which cannot hold half a character of somebody's input.
        self.message = message.encode("utf-8", "replace").decode()

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(math.ceil(self.retry_after_s))}


def from_error(error: Exception) -> ApiError:
    """Whatever was raised. What the client can mend is 400; a dead engine 503; a bug 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="engine_stopped")
    if isinstance(error, FourgeError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed; its log says how.", code="internal_error")


def openai_body(error: ApiError) -> dict[str, Any]:
    kind = _TYPES.get(error.status, "server_error")
    return {
        "error": {
            "message": error.message, "type": kind, "param": error.param, "code": error.code
        }
    }  # fmt: skip


def anthropic_body(error: ApiError, request_id: str) -> dict[str, Any]:
    kind = _TYPES.get(error.status, "api_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": request_id,
    }


def from_validation(errors: Sequence[Mapping[str, Any]], known: Sequence[str]) -> ApiError:
    """One sentence for what pydantic found first, unknown fields before all else."""
    order = ("extra_forbidden", "unsupported")

    def rank(one: Mapping[str, Any]) -> tuple[int, int]:
        """Of the branches of a union, the one that went deepest says most."""
        kind = one["type"]
        return order.index(kind) if kind in order else len(order), -len(one["loc"])

    found = min(errors, key=rank)
    # Branches of unions are part of pydantic's places: "str", "list[Content]".
    place = [
        part
        for part in found["loc"]
        if part not in ("body", "str", "int") and not ("[" in str(part) and "]" in str(part))
    ]
    name = ".".join(map(str, place))
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found['ctx']['error']}.")
    if found["type"] == "extra_forbidden":
        others = [field for field in known if field != place[-1]]  # known elsewhere: no hint
        near = get_close_matches(str(place[-1]), others, 1)
        hint = f"did you mean {near[0]}?" if near else "leave it out."
        return ApiError(400, f"{name!r} is not a field that is known here: {hint}", param=name)
    if found["type"] == "unsupported":
        name = ".".join(map(str, [*place, found["ctx"]["name"]]))
        return ApiError(
            400, f"{name!r} is not supported by this server: leave it out.", param=name,
            code="unsupported_parameter",
        )  # fmt: skip
    message = str(found["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{name}: {message}." if name else f"{message}.", param=name or None)
