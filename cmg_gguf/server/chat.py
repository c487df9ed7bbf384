"""POST /v1/chat/completions: OpenAI's chat completions, as JSON or as a stream of chunks.

Beside OpenAI's fields, llama-server's (`top_k`, `min_p`, `repeat_penalty`, `grammar`,
`chat_template_kwargs`...) and ours: `cmg`, "off" or settings of guidance, as a settings file has
them; what they leave out is as the server was started with. `"evidence": true` among them asks how
much the picture supports each word, `"heat": true` where the answer looked: `chat.heat`. They come
in the last chunk; evidence of tokens in each, where guidance hides all image tokens in all layers
(scope "text"): there it is known when they are drawn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import Field
from starlette.responses import Response

from cmg_gguf.chat.completion import Chunks, completion_of, completion_of_many
from cmg_gguf.errors import CMGError
from cmg_gguf.reply import Piece, Reply
from cmg_gguf.request import Request
from cmg_gguf.sampling import MAX_SEED
from cmg_gguf.server.answer import Answer
from cmg_gguf.server.clients import salt_of, unless_gone
from cmg_gguf.server.failures import refused
from cmg_gguf.server.service import Service
from cmg_gguf.server.sse import DONE, Content, events
from cmg_gguf.server.wire import Wire, WireResponse

MAX_CHOICES = 64


MESSAGE: dict[str, Any] = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "anyOf": [
                            {
                                "type": "object",
                                "required": ["type", "text"],
                                "properties": {
                                    "type": {"const": "text"},
                                    "text": {"type": "string"},
                                },
                            },
                            {
                                "type": "object",
                                "required": ["type", "image_url"],
                                "properties": {
                                    "type": {"const": "image_url"},
                                    "image_url": {
                                        "type": "object",
                                        "required": ["url"],
                                        "properties": {"url": {"type": "string"}},
                                    },
                                },
                            },
                        ]
                    },
                },
            ]
        },
    },
}
"""What a message is, for who reads the server's description; the prompt knows more spellings."""


class StreamOptions(Wire):
    """include_usage: a last chunk of counts."""

    include_usage: bool = False


class ChatCompletion(Wire):
    """A chat completion that is asked for."""

    messages: list[dict[str, Any]] = Field(min_length=1, json_schema_extra={"items": MESSAGE})
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None
    mirostat_mode: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    grammar: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cmg: Literal["off"] | dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None

    def request(self, service: Service, salt: str | None) -> Request:
        """The same as the model is asked. Raises Refused."""
        settings = {name: getattr(self, name) for name in type(self).model_fields}
        for name in ("model", "stream", "stream_options", "n"):
            del settings[name]
        newer = settings.pop("max_completion_tokens")
        if newer is not None:
            settings["max_tokens"] = newer
        return service.request(salt=salt, **settings)


def router(service: Service) -> APIRouter:
    """The route, on a service."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=None)
    @routes.post("/chat/completions", response_model=None, include_in_schema=False)
    async def create(body: ChatCompletion, http: HTTPRequest) -> Response:
        requests = _choices(body.request(service, salt_of(http)), body.n or 1)
        if not body.stream:
            return WireResponse(await unless_gone(http, _whole(service, requests)))
        answers = await unless_gone(http, service.open_all(requests))
        counted = body.stream_options is not None and body.stream_options.include_usage
        return events(service.limits, _chunks(service, answers, counted=counted))

    return routes


def _choices(request: Request, n: int) -> list[Request]:
    """The request, and n - 1 more with the seeds that follow where it has one."""
    sampling = request.sampling
    if sampling.seed is None:
        return [request] * n
    seeds = [(sampling.seed + i) % (MAX_SEED + 1) for i in range(n)]
    return [replace(request, sampling=replace(sampling, seed=seed)) for seed in seeds]


async def _whole(service: Service, requests: Sequence[Request]) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        answers = await service.open_all(requests)
        for answer in answers:
            await stack.enter_async_context(answer)
        replies = await asyncio.gather(*(answer.whole() for answer in answers))
        if len(replies) == 1:
            return completion_of(replies[0], service.name, service.token_bytes)
        return completion_of_many(replies, service.name, service.token_bytes)


async def _chunks(
    service: Service, answers: Sequence[Answer], *, counted: bool
) -> AsyncGenerator[Content, None]:
    """The chunks of all choices as they come. An answer that breaks off ends them with an error."""
    chunks = Chunks(service.name, service.token_bytes)
    async with AsyncExitStack() as stack:
        for answer in answers:
            await stack.enter_async_context(answer)
        try:
            for i in range(len(answers)):
                yield chunks.first(i)
            merged = await stack.enter_async_context(aclosing(_merged(answers)))
            async for i, piece in merged:
                if isinstance(piece, Reply):
                    yield chunks.last(piece, i)
                else:
                    yield chunks.said(piece, i)
        except CMGError as exc:
            yield refused(exc).body()
            return
        if counted:
            yield chunks.counts([answer.reply for answer in answers])
        yield DONE


async def _merged(
    answers: Sequence[Answer],
) -> AsyncGenerator[tuple[int, Piece | Reply], None]:
    """(index, piece) of several answers as they come, and (index, reply) at the end of each."""
    if len(answers) == 1:
        async for piece in answers[0]:
            yield 0, piece
        yield 0, answers[0].reply
        return
    pending = {_next(answer): i for i, answer in enumerate(answers)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = pending.pop(task)
                said = task.result()
                if said is not None:
                    pending[_next(answers[i])] = i
                yield i, answers[i].reply if said is None else said
    finally:
        for task in pending:
            task.cancel()


def _next(answer: Answer) -> asyncio.Future[Piece | None]:
    return asyncio.ensure_future(anext(answer, None))
