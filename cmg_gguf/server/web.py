"""The page at `/` and its files, which need no key and hold nothing that is not public."""

from __future__ import annotations

import io
from importlib.resources import files
from typing import Annotated, get_args

from fastapi import APIRouter, HTTPException, Query
from PIL import Image
from starlette.responses import JSONResponse, Response

from cmg_gguf.server.service import Service
from cmg_gguf.tiny.scenes import SceneKind, draw, make_scene

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
    "/page/export.js": ("export.js", "text/javascript"),
    "/page/code.js": ("code.js", "text/javascript"),
}
"""By path: the file and its type."""

SCENE, SCENES = "/page/scene", "/page/scenes"
FREE = (*ASSETS, SCENE, SCENES)
"""Paths that need no key."""
MAX_SCENE = 2**31 - 1


def router(service: Service) -> APIRouter:
    """The routes. service: of all routers; the page asks it by the public API."""
    routes = APIRouter(include_in_schema=False)
    folder = files("cmg_gguf.server") / "page"
    for path, (name, kind) in ASSETS.items():
        _add(routes, path, (folder / name).read_bytes(), kind)
    known: tuple[SceneKind, ...] = get_args(SceneKind) if service.draws_scenes else ()
    kinds = {str(kind): kind for kind in known}

    @routes.get(SCENES, response_model=None)
    async def scenes() -> Response:
        """The kinds of scenes that are drawn here: none but for the built-in model."""
        return JSONResponse(list(kinds), headers=HEADERS)

    @routes.get(SCENE, response_model=None)
    def scene(kind: str, index: Annotated[int, Query(ge=0, le=MAX_SCENE)]) -> Response:
        """A test scene as PNG."""
        if kind not in kinds:
            raise HTTPException(
                404, f"there is no scene of kind {kind!r}: {list(kinds)} are drawn here"
            )
        buffer = io.BytesIO()
        Image.fromarray(draw(make_scene("test", index, kinds[kind]))).save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png", headers=HEADERS)

    return routes


def _add(routes: APIRouter, path: str, content: bytes, kind: str) -> None:
    async def asset() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    routes.add_api_route(path, asset, methods=["GET", "HEAD"], response_model=None)
