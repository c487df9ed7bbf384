"""Ollama's API, for clients that speak nothing else: /api/chat, /api/generate, and what they look
up before they ask.

There is one model, whatever name a request has, and it is loaded: `keep_alive`, and options that
say how a model is loaded, change nothing. `cmg`, "off" or settings of guidance, is a field as in
chat completions, or one of the options, where a client has no other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import BeforeValidator
from starlette.responses import Response, StreamingResponse

from cmg_gguf.chat.ollama import (
    OPTIONS,
    Kind,
    Lines,
    chat_messages,
    prompt_messages,
    settings_of,
    timestamp,
)
from cmg_gguf.errors import CMGError
from cmg_gguf.request import Request
from cmg_gguf.server.answer import Answer
from cmg_gguf.server.clients import salt_of, unless_gone
from cmg_gguf.server.failures import Refused, refused
from cmg_gguf.server.service import Service
from cmg_gguf.server.wire import Wire, WireResponse, as_json

API_VERSION = "0.12.0"
"""Ollama's whose API this follows: clients refuse older ones."""
CMG = Literal["off"] | dict[str, Any] | None


def _whole_number(value: object) -> object:
    """A whole number as one: in some clients' languages there are no others than floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole_number)]


class Options(Wire):
    """How a token is drawn."""

    num_predict: Whole | None = None
    temperature: float | None = None
    top_k: Whole | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: Whole | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    repeat_last_n: Whole | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: Whole | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    cmg: CMG = None


class Asked(Wire):
    """What chat and generate have in common."""

    model: str | None = None
    stream: bool | None = None
    options: Options | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    cmg: CMG = None

    def request_of(self, messages: list[dict[str, Any]], service: Service, **more: Any) -> Request:
        """The messages as the model is asked, with these settings. Raises Refused."""
        options = self.options or Options()
        try:
            settings = settings_of(
                {name: getattr(options, name) for name in OPTIONS},
                format=self.format,
                think=self.think,
                logprobs=self.logprobs,
                top_logprobs=self.top_logprobs,
            )
        except CMGError as exc:
            raise refused(exc) from exc
        cmg = self.cmg if self.cmg is not None else options.cmg
        return service.request(messages, cmg=cmg, **settings, **more)


class Chat(Asked):
    """A chat. Without messages it asks nothing but that the model be loaded."""

    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None

    def request(self, service: Service, salt: str | None) -> Request | None:
        """The same as the model is asked; None where it asks nothing. Raises Refused."""
        if not self.messages:
            return None
        messages = chat_messages(self.messages)
        return self.request_of(messages, service, salt=salt, tools=self.tools)


class Generate(Asked):
    """A prompt. Without one, and without pictures, it asks nothing but that the model be loaded."""

    prompt: str | None = None
    system: str | None = None
    images: list[Any] | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None

    def request(self, service: Service, salt: str | None) -> Request | None:
        """The same as the model is asked; None where it asks nothing. Raises Refused."""
        for name in ("suffix", "template", "context", "raw"):
            if getattr(self, name):
                raise Refused(f"{name} is not supported here; leave it out", param=name)
        if not self.prompt and not self.images:
            return None
        messages = prompt_messages(self.prompt or "", system=self.system, images=self.images)
        return self.request_of(messages, service, salt=salt)


class Named(Wire):
    """A model by its name."""

    model: str | None = None


def router(service: Service) -> APIRouter:
    """The routes, on a service."""
    routes = APIRouter(prefix="/api")

    @routes.post("/chat", response_model=None)
    async def chat(body: Chat, http: HTTPRequest) -> Response:
        """An answer to messages."""
        return await _answered("chat", service, body, http)

    @routes.post("/generate", response_model=None)
    async def generate(body: Generate, http: HTTPRequest) -> Response:
        """An answer to a prompt."""
        return await _answered("generate", service, body, http)

    @routes.get("/tags")
    async def tags() -> dict[str, Any]:
        """The one model."""
        return {"models": [_listed(service)]}

    @routes.get("/ps")
    async def running() -> dict[str, Any]:
        """The model, if it is loaded."""
        if service.lifetime.vlm is None:
            return {"models": []}
        facts = {"size_vram": 0, "context_length": service.n_ctx, "expires_at": _FAR}
        return {"models": [{**_listed(service), **facts}]}

    @routes.post("/show")
    async def show(body: Named) -> dict[str, Any]:
        """What the model is, and what it can do."""
        return _shown(service)

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """The version of Ollama's API."""
        return {"version": API_VERSION}

    return routes


_FAR = timestamp(datetime(9999, 12, 31, tzinfo=timezone.utc))


async def _answered(
    kind: Kind, service: Service, body: Chat | Generate, http: HTTPRequest
) -> Response:
    lines = Lines(kind, body.model or _name(service), service.token_bytes)
    request = body.request(service, salt_of(http))
    if request is None:
        await service.lifetime.awake()
        return WireResponse(lines.loaded())
    if body.stream is False:
        return WireResponse(await unless_gone(http, _whole(service, request, lines)))
    answer = await unless_gone(http, service.open(request))
    return StreamingResponse(_written(answer, lines), media_type="application/x-ndjson")


async def _whole(service: Service, request: Request, lines: Lines) -> dict[str, Any]:
    async with await service.open(request) as answer:
        return lines.whole(await answer.whole())


async def _written(answer: Answer, lines: Lines) -> AsyncGenerator[bytes, None]:
    """One object a line, as the answer comes. One that breaks off ends them with an error."""
    async with answer, aclosing(_said(answer, lines)) as said:
        async for line in said:
            yield as_json(line) + b"\n"


async def _said(answer: Answer, lines: Lines) -> AsyncGenerator[dict[str, Any], None]:
    try:
        async for piece in answer:
            yield lines.said(piece)
        yield lines.last(answer.reply)
    except CMGError as exc:
        yield refused(exc).body("/api/")


def _name(service: Service) -> str:
    """The model's name with a tag, as Ollama's all have one."""
    return service.name if ":" in service.name else f"{service.name}:latest"


def _listed(service: Service) -> dict[str, Any]:
    name = _name(service)
    identity = json.dumps([name, service.facts], sort_keys=True)
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(datetime.fromtimestamp(service.created, timezone.utc)),
        "size": service.facts["bytes"],
        "digest": hashlib.sha256(identity.encode()).hexdigest(),
        "details": _details(service),
    }


def _details(service: Service) -> dict[str, Any]:
    """By llama.cpp's own description: "qwen2vl 7B Q4_K - Medium"."""
    family, _, rest = service.facts["description"].partition(" ")
    size, _, quant = rest.partition(" ")
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": size,
        "quantization_level": quant,
    }


def _shown(service: Service) -> dict[str, Any]:
    facts, details = service.facts, _details(service)
    thinks = "enable_thinking" in service.chat_template
    family = details["family"]
    return {
        "modelfile": "",
        "parameters": "",
        "template": service.chat_template,
        "details": details,
        "model_info": {
            "general.architecture": family,
            f"{family}.context_length": facts["n_ctx_train"],
            f"{family}.embedding_length": facts["n_embd"],
            f"{family}.block_count": facts["layers"],
        },
        "capabilities": ["completion", "vision", *(["thinking"] if thinks else [])],
        "modified_at": timestamp(datetime.fromtimestamp(service.created, timezone.utc)),
    }
