"""POST /v1/responses: OpenAI's responses, as JSON or as a stream of events. Nothing is stored.

Beside OpenAI's fields those of chat completions that say how a token is drawn, and `cmg`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from sse_starlette import ServerSentEvent
from starlette.responses import Response

from cmg_gguf.chat.responses import Answering, Event, head_of, messages_of, settings_of
from cmg_gguf.errors import CMGError
from cmg_gguf.request import Request
from cmg_gguf.server.answer import Answer
from cmg_gguf.server.clients import salt_of, unless_gone
from cmg_gguf.server.failures import Refused, refused
from cmg_gguf.server.service import Service
from cmg_gguf.server.sse import events
from cmg_gguf.server.wire import Wire, WireResponse, as_json

_STATE = ("previous_response_id", "conversation", "prompt")
_ECHOED = ("instructions", "metadata", "text", "reasoning")


class ResponseBody(Wire):
    """A response that is asked for. store: taken, and told as false, for nothing is stored."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    cmg: Literal["off"] | dict[str, Any] | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def request(self, service: Service, salt: str | None) -> Request:
        """The same as the model is asked. Raises Refused."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        for name in _STATE:
            if given.pop(name) is not None:
                raise Refused(
                    f"{name} is not supported: this server keeps no responses; send the whole "
                    "conversation as input",
                    param=name,
                )
        if given.pop("background"):
            raise Refused(
                "background is not supported: this server keeps no responses; leave it out",
                param="background",
            )
        for name in ("input", "model", "instructions", "stream", "metadata", "store", "cmg"):
            del given[name]
        given["include"] = given["include"] or ()
        try:
            messages = messages_of(self.input, self.instructions)
        except CMGError as exc:
            raise refused(exc, "input") from exc
        try:
            settings = settings_of(**given)
        except CMGError as exc:
            raise refused(exc, "text") from exc
        return service.request(messages, cmg=self.cmg, salt=salt, **settings)


def router(service: Service) -> APIRouter:
    """The route, on a service."""
    routes = APIRouter()

    @routes.post("/v1/responses", response_model=None)
    @routes.post("/responses", response_model=None, include_in_schema=False)
    async def create(body: ResponseBody, http: HTTPRequest) -> Response:
        request = body.request(service, salt_of(http))
        echoed = {name: getattr(body, name) for name in _ECHOED}
        answering = Answering(head_of(request, service.name, **echoed), service.token_bytes)
        if not body.stream:
            return WireResponse(await unless_gone(http, _whole(service, request, answering)))
        answer = await unless_gone(http, service.open(request))
        return events(service.limits, _named(answer, answering))

    return routes


async def _whole(service: Service, request: Request, answering: Answering) -> dict[str, Any]:
    async with await service.open(request) as answer:
        return answering.whole(await answer.whole())


async def _named(answer: Answer, answering: Answering) -> AsyncGenerator[ServerSentEvent, None]:
    """The events, each with its type as its name."""
    async with aclosing(_events(answer, answering)) as content:
        async for one in content:
            yield ServerSentEvent(as_json(one).decode(), event=one["type"], sep="\n")


async def _events(answer: Answer, answering: Answering) -> AsyncGenerator[Event, None]:
    """The events as the answer comes. One that breaks off ends them with a failure."""
    async with answer:
        for one in answering.begun():
            yield one
        try:
            async for piece in answer:
                for one in answering.said(piece):
                    yield one
            last = answering.ended(answer.reply)
        except CMGError as exc:
            last = answering.failed(refused(exc).message)
        for one in last:
            yield one
