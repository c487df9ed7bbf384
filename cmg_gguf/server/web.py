"""The page at `/` and its files, which need no key and hold nothing that is not public."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

from cmg_gguf.server.service import Service

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Of all of them: nothing runs or is loaded that does not come from here."""

ASSETS = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/chat.js": ("chat.js", "text/javascript"),
    "/page/answer.js": ("answer.js", "text/javascript"),
    "/page/heat.js": ("heat.js", "text/javascript"),
    "/page/code.js": ("code.js", "text/javascript"),
}
"""By path: the file and its type."""


def router(service: Service) -> APIRouter:
    """The routes. service: of all routers; the page asks it by the public API."""
    routes = APIRouter(include_in_schema=False)
    folder = files("cmg_gguf.server") / "page"
    for path, (name, kind) in ASSETS.items():
        _add(routes, path, (folder / name).read_bytes(), kind)
    return routes


def _add(routes: APIRouter, path: str, content: bytes, kind: str) -> None:
    async def asset() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    routes.add_api_route(path, asset, methods=["GET", "HEAD"], response_model=None)
