"""GET /: a chat page in one file, with nothing from elsewhere."""

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse

from fourge.serve.service import Service

PAGE = Path(__file__).parent / "page" / "index.html"


def router(service: Service) -> APIRouter:
    """The one route. The page asks the server itself; ``service`` is not needed to show it."""
    routes = APIRouter(tags=["Page"])
    text = PAGE.read_text(encoding="utf-8")

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text)

    return routes
