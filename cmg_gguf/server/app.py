"""The application: routes, errors, and what stands ahead of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from cmg_gguf import __version__
from cmg_gguf.server import about, chat, failures, metrics, ollama, responses, web
from cmg_gguf.server.guard import Guard, Keys
from cmg_gguf.server.service import Service
from cmg_gguf.server.visitors import Visitors

ROUTERS = (
    web.router,
    chat.router,
    responses.router,
    ollama.router,
    about.router,
    metrics.router,
)


def new_app(
    service: Service,
    *,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    names: Sequence[str] = (),
) -> FastAPI:
    """An ASGI application on a service; it frees the model when it ends.

    keys: API keys, one of which each request must have; none = everybody may ask. origins: of web
    pages that may ask and read answers; "*" = all. names: by which it is asked, see `visitors`.
    """
    app = FastAPI(
        title="cmg-gguf",
        version=__version__,
        description="Vision-language models under Cross-Modal Guidance, by OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan(service),
    )
    failures.install(app)
    for router in ROUTERS:
        app.include_router(router(service))
    app.add_middleware(
        Guard,
        keys=Keys(keys),
        limits=service.limits,
        lifetime=service.lifetime,
        visitors=Visitors(names, origins),
        free=web.FREE,
    )
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _lifespan(service: Service) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with service.lifetime.used():  # from here on it may fall asleep
            pass
        yield
        await service.lifetime.close()

    return lifespan
