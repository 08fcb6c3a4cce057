"""The application: every surface, one way to say no.

border (id, key, size, log) -> route -> preparing (worker thread) -> generation -> shape
"""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from fourge import __version__
from fourge.errors import FourgeError
from fourge.serve import chat, chat_page, completions, messages, responses, status, tokens
from fourge.serve.bodies import TooMany
from fourge.serve.errors import ApiError, from_validation
from fourge.serve.middleware import CLIENT_GONE, Border, error_response
from fourge.serve.protocol.fields import known_fields
from fourge.serve.service import Service
from fourge.serve.streaming import ClientGone, api_error

SURFACES = (chat, completions, messages, responses, tokens, status, chat_page)


def create_app(service: Service) -> ASGIApp:
    """The ASGI application of one server."""
    return Border(create_routes(service), service)


def create_routes(service: Service) -> FastAPI:
    """The same without its border; it knows its OpenAPI description."""
    app = FastAPI(
        title="fourge",
        version=__version__,
        description="OpenAI- and Anthropic-compatible serving of one checkpoint.",
        redoc_url=None,
    )
    for surface in SURFACES:
        app.include_router(surface.router(service))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(ClientGone, _gone)
    for kind in (ApiError, FourgeError, Exception):
        app.add_exception_handler(kind, _failed)
    return app


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _respond(request, from_validation(error.errors(), known_fields()))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = str(error.detail)
    if error.status_code == 404:
        text = f"there is no {request.url.path} here: see /docs."
    elif error.status_code == 405:
        text = f"{request.url.path} does not take {request.method}: see /docs."
    param = error.param if isinstance(error, TooMany) else None
    response = _respond(request, ApiError(error.status_code, text, param=param))
    response.headers.update(error.headers or {})
    return response


async def _failed(request: Request, error: Exception) -> Response:
    return _respond(request, api_error(error))


async def _gone(request: Request, error: Exception) -> Response:
    request.scope["state"]["disconnected"] = True
    return Response(status_code=CLIENT_GONE)


def _respond(request: Request, error: ApiError) -> Response:
    state = request.scope["state"]
    state["error"] = error.message
    return error_response(error, request.url.path, state["request_id"])
