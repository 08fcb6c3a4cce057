"""What is not an answer: models, health, versions, metrics, and an end to what is under way."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from fourge import __version__
from fourge.serve.bodies import body_route
from fourge.serve.errors import ApiError
from fourge.serve.protocol.openai import AbortRequest
from fourge.serve.served import Served
from fourge.serve.service import Service


def router(service: Service) -> APIRouter:
    """The routes of this surface."""
    routes = APIRouter(tags=["Server"], route_class=body_route(service.limits.max_messages))

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        served = service.served
        return {"object": "list", "data": [_model(served, name) for name in served.names]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.served.check_name(name)
        return _model(service.served, name)

    @routes.get("/health", response_model=None)
    async def health() -> Response:
        """200 while the engine works; 503 while it loads or when it is dead."""
        loaded = service.served
        if not loaded.engine.is_alive:
            raise ApiError(503, "the engine has stopped.", code="engine_stopped")
        return JSONResponse({"status": "ok"})

    @routes.get("/ready", response_model=None)
    async def ready() -> Response:
        """200 while new requests are taken; 503 also while the server drains."""
        if not service.is_ready:
            raise ApiError(503, "the server takes no requests now.", code="not_ready")
        return JSONResponse({"status": "ready"})

    @routes.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @routes.get("/server_info")
    async def server_info() -> dict[str, Any]:
        served = service.served
        return {
            "version": __version__,
            "started": int(service.started_s),
            "models": list(served.names),
            "max_model_len": served.max_model_len,
            "sampling_defaults": dict(served.preferred),
            "chat_template_kwargs": dict(served.template_options),
            "limits": asdict(service.limits),
            "engine": dict(served.details),
            "stats": served.engine.stats(),
        }

    @routes.post("/abort")
    async def abort(body: AbortRequest) -> dict[str, list[str]]:
        """End requests whose client cannot; theirs get an error. ``aborted``: those there were."""
        return {"aborted": service.abort(body.request_ids)}

    @routes.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(
            service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    return routes


def _model(served: Served, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "fourge",
        "root": served.names[0],
        "max_model_len": served.max_model_len,
    }
