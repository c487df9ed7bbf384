"""Server-sent events: a stream's chunks, and signs of life between them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent

from cmg_gguf.server.limits import Limits
from cmg_gguf.server.wire import as_json

Content = str | Mapping[str, Any] | ServerSentEvent
DONE = "[DONE]"


def events(limits: Limits, content: AsyncGenerator[Content, None]) -> EventSourceResponse:
    """A response of events: of a dict, its JSON is the data. A client that goes away cancels
    `content`; a server that is told to end lets it go on for as long as it drains."""
    return EventSourceResponse(
        _events(content),
        ping=limits.ping_seconds,
        sep="\n",
        shutdown_grace_period=limits.drain_seconds,
    )


async def _events(content: AsyncGenerator[Content, None]) -> AsyncIterator[ServerSentEvent]:
    async with aclosing(content):
        async for one in content:
            if isinstance(one, ServerSentEvent):
                yield one
            else:
                data = one if isinstance(one, str) else as_json(one).decode()
                yield ServerSentEvent(data, sep="\n")
