"""What a server tells about itself: its model, its health, its settings, its slots. Read only."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from cmg_gguf.server.service import Service
from cmg_gguf.settings import guidance_to_json


def router(service: Service) -> APIRouter:
    """The routes, on a service."""
    routes = APIRouter()

    @routes.get("/v1/models")
    @routes.get("/models", include_in_schema=False)
    async def models() -> dict[str, Any]:
        """The one model, as OpenAI lists models."""
        return {"object": "list", "data": [_model(service)]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model; it answers whatever name a request has."""
        return _model(service)

    @routes.get("/health")
    @routes.get("/healthz")
    @routes.get("/v1/health", include_in_schema=False)
    async def health() -> dict[str, Any]:
        """That requests are taken. A model that sleeps wakes up for them."""
        return {"status": "ok"}

    @routes.get("/props")
    async def props() -> dict[str, Any]:
        """Settings, by llama-server's names where it has them."""
        return _props(service)

    @routes.get("/slots")
    async def slots() -> list[dict[str, Any]]:
        """What each slot is doing, as llama-server tells it; nothing of what was asked."""
        return _slots(service)

    return routes


def _model(service: Service) -> dict[str, Any]:
    facts = service.facts
    known = ("n_vocab", "n_ctx_train", "n_embd")
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "cmg-gguf",
        "meta": {**{name: facts[name] for name in known}, "size": facts["bytes"]},
    }


def _props(service: Service) -> dict[str, Any]:
    return {
        "default_generation_settings": {"n_ctx": service.n_ctx, "params": service.defaults.draws()},
        "total_slots": service.n_parallel,
        "model_alias": service.name,
        "modalities": {"vision": True, "audio": False},
        "chat_template": service.chat_template,
        "is_sleeping": service.lifetime.vlm is None,
        "model": service.facts,
        "cmg": guidance_to_json(service.guidance),
    }


def _slots(service: Service) -> list[dict[str, Any]]:
    vlm = service.lifetime.vlm
    lanes = vlm.engine.lanes if vlm is not None else [None] * service.n_parallel
    busy = {id(s.branches): s for s in (vlm.engine.sessions if vlm is not None else ())}
    found = [(i, busy.get(id(lane))) for i, lane in enumerate(lanes)]
    return [
        {
            "id": i,
            "n_ctx": service.n_ctx,
            "is_processing": session is not None,
            "n_cells": 0 if session is None else session.n_cells,
        }
        for i, session in found
    ]
