"""Parts of the server by themselves: who has left, limits, events, keys, what is too long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fastapi import Request
from starlette.datastructures import Headers

from cmg_gguf import BackendError, ContextLengthError, ImageError, ModelError, SamplingError
from cmg_gguf.server.clients import salt_of, unless_gone
from cmg_gguf.server.extent import CHARACTERS, check_extent
from cmg_gguf.server.failures import Refused, refused
from cmg_gguf.server.guard import Keys
from cmg_gguf.server.limits import Limits
from cmg_gguf.server.sse import events
from cmg_gguf.server.wire import as_json


def asking(leaves: asyncio.Event | None = None) -> Request:
    """A request whose client leaves when it is told."""

    async def receive() -> dict[str, Any]:
        await (leaves or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http", "cmg_salt": "salt"}, receive)


def test_work_goes_on_unless_its_client_leaves() -> None:
    async def play() -> None:
        assert salt_of(asking()) == "salt"
        assert await unless_gone(asking(), asyncio.sleep(0, "done")) == "done"
        with pytest.raises(ImageError):
            await unless_gone(asking(), failing())
        leaves, cancelled = asyncio.Event(), asyncio.Event()
        waiting = asyncio.ensure_future(unless_gone(asking(leaves), endless(cancelled)))
        await asyncio.sleep(0)
        leaves.set()
        with pytest.raises(Refused) as info:
            await waiting
        assert info.value.status == 499
        await asyncio.wait_for(cancelled.wait(), 10)

    async def failing() -> None:
        raise ImageError("no image")

    async def endless(cancelled: asyncio.Event) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("most", "wanted", "tokens"),
    [(None, None, None), (None, 5, 5), (3, None, 3), (3, 5, 3), (3, 2, 2)],
)
def test_the_servers_limit_of_tokens_is_over_the_requests(
    most: int | None, wanted: int | None, tokens: int | None
) -> None:
    assert Limits(max_tokens=most).tokens(wanted) == tokens


def test_events_are_json_and_end_what_makes_them() -> None:
    ended = []

    async def content() -> AsyncGenerator[Any, None]:
        try:
            yield {"a": "ä\n"}
            yield "[DONE]"
        finally:
            ended.append(True)

    async def play() -> None:
        made: Any = events(Limits(), content()).body_iterator
        texts = [event.encode().decode() async for event in made]
        assert json.loads(texts[0].removeprefix("data: ")) == {"a": "ä\n"}
        assert texts[1] == "data: [DONE]\n\n"
        left: Any = events(Limits(), content()).body_iterator
        await anext(left)
        await left.aclose()
        assert ended == [True, True]

    asyncio.run(play())


def test_half_a_character_is_told_as_a_question_mark() -> None:
    assert as_json({"a": "x\ud800y"}) == b'{"a": "x?y"}'


def test_keys_are_told_apart_and_none_is_guessed() -> None:
    keys, bearer = Keys(["one", "two"]), "Authorization"
    salts = [keys.salt(Headers({bearer: f"Bearer {key}"})) for key in ("one", "two")]
    assert len(set(salts)) == 2
    assert keys.salt(Headers({"X-API-Key": "one"})) == salts[0]
    assert "one" not in salts[0]
    for given in ({}, {bearer: "Bearer three"}, {bearer: "one"}, {bearer: "Basic one"}):
        with pytest.raises(Refused):
            keys.salt(Headers(given))
    assert not Keys()


def test_messages_longer_than_the_context_can_be_are_told_before_they_are_read() -> None:
    check_extent([{"role": "user", "content": "x" * (CHARACTERS * 8)}], 10)
    with pytest.raises(ContextLengthError, match="10 tokens"):
        check_extent([{"role": "user", "content": "x" * (CHARACTERS * 10)}], 10)


@pytest.mark.parametrize(
    ("exc", "status", "param"),
    [
        (ImageError("no image"), 400, "messages"),
        (ContextLengthError("too long"), 400, "messages"),
        (SamplingError("no number"), 400, None),
        (ModelError("/secret/model.gguf is gone"), 503, None),
        (BackendError("llama.cpp refused"), 500, None),
        (RecursionError(), 400, None),
        (KeyError("secret"), 500, None),
    ],
)
def test_errors_are_told_and_what_nobody_expected_says_nothing(
    exc: Exception, status: int, param: str | None
) -> None:
    told = refused(exc)
    assert (told.status, told.param) == (status, param)
    assert "secret" not in told.message
    assert told.body("/api/chat") == {"error": told.message}
