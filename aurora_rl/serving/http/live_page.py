"""The live page: files that everyone may have, and the figures of the run, which need a key like everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from aurora_rl.telemetry.history import RunHistory

FILES = {
    "/": ("index.html", "text/html"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    "/page/uplot.js": ("uPlot.iife.min.js", "text/javascript"),
    "/page/uplot.css": ("uPlot.min.css", "text/css"),
}
"""By path, the file of the package's folder ``page`` and its type."""

# The page fetches nothing from another host, and no other page may frame it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def page_routes(load: Callable[[], Mapping[str, int]], history: RunHistory, model: str) -> list[BaseRoute]:
    """Return the routes of the page's files and of ``/history``, its figures."""

    async def figures(request: Request) -> Response:
        return JSONResponse({"model": model, **load(), **history.as_json()}, headers={"Cache-Control": "no-store"})

    folder = files(__package__) / "page"
    static = [
        Route(path, _file((folder / name).read_bytes(), kind), methods=["GET"]) for path, (name, kind) in FILES.items()
    ]
    return [*static, Route("/history", figures, methods=["GET"])]


def _file(content: bytes, kind: str) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return answer
