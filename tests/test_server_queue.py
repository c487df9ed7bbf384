"""Places are given in order, never more than there are, and none is lost; answers on a loop."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import Iterator

import pytest
from served import asking, load

from cmg_gguf import GuidedVLM, Request
from cmg_gguf.server.answer import Answer, Ear
from cmg_gguf.server.queue import FullError, Queue


@pytest.mark.parametrize("hurried", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_places_are_given_in_order_and_none_is_lost(seed: int, hurried: bool) -> None:
    """Many come, wait, leave the queue and leave their places, in any order. hurried: often the
    next thing happens before who was called has noticed; then their order is not looked at."""

    async def play() -> None:
        draws = random.Random(seed)
        queue = Queue(4, 6)
        entered: list[int] = []
        came: list[int] = []
        held: dict[int, int] = {}
        tasks: dict[int, asyncio.Task[None]] = {}

        async def enter(i: int, n: int) -> None:
            must_wait = queue.n_waiting > 0 or queue.n_taken + n > 4
            if must_wait and queue.n_waiting + n > 6:
                with pytest.raises(FullError):
                    await queue.enter(n)
                return
            came.append(i)
            await queue.enter(n)
            entered.append(i)
            held[i] = n

        for i in range(300):
            what = draws.random()
            if what < 0.5:
                tasks[i] = asyncio.ensure_future(enter(i, draws.choice([1, 1, 1, 2, 4])))
            elif what < 0.8 and held:
                leaving = draws.choice(sorted(held))
                queue.leave(held.pop(leaving))
            elif pending := [j for j, task in tasks.items() if not task.done()]:
                tasks[draws.choice(pending)].cancel()
            if not hurried or draws.random() < 0.7:
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            assert queue.n_taken <= 4
        for task in tasks.values():
            if not task.done():
                task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        came_of = [task.exception() for task in tasks.values() if not task.cancelled()]
        assert not any(came_of)
        assert hurried or entered == [i for i in came if i in set(entered)]
        assert len(entered) > 20
        assert queue.n_taken == sum(held.values())
        assert queue.n_waiting == 0

    asyncio.run(play())


@pytest.fixture(scope="module")
def vlm() -> Iterator[GuidedVLM]:
    with load() as opened:
        yield opened


def request(**fields: object) -> Request:
    return Request(asking(0)["messages"], max_tokens=16, **fields)  # type: ignore[arg-type]


def test_an_answer_on_a_loop_is_the_answer(vlm: GuidedVLM) -> None:
    expected = vlm.generate(request())

    async def ask() -> None:
        overs: list[bool] = []
        ear = Ear(lambda: overs.append(True))
        stream = await asyncio.to_thread(vlm.stream, request(), heard=ear.hear)
        closed: list[Answer] = []
        async with Answer(stream, ear, closed.append) as answer:
            pieces = [piece async for piece in answer]
            assert "".join(piece.text for piece in pieces) == expected.text
            assert answer.reply.tokens == expected.tokens
            assert answer.n_tokens == len(expected.tokens)
            assert [piece async for piece in answer] == []
        answer.close()
        await asyncio.sleep(0)
        assert overs == [True]
        assert closed == [answer]

    asyncio.run(ask())


def test_an_answer_that_is_dropped_ends_and_says_so_on_the_loop(vlm: GuidedVLM) -> None:
    async def ask() -> None:
        over = asyncio.Event()
        ear = Ear(over.set)
        endless = Request(asking(0)["messages"])
        stream = await asyncio.to_thread(vlm.stream, endless, heard=ear.hear)
        answer = Answer(stream, ear, lambda closed: None)
        del stream
        assert (await anext(answer)).text
        del answer, ear
        gc.collect()
        await asyncio.wait_for(over.wait(), 30)
        assert not vlm.engine.sessions

    asyncio.run(ask())


def test_who_looks_without_waiting_misses_nothing(vlm: GuidedVLM) -> None:
    expected, news, is_over = vlm.generate(request()), threading.Event(), []

    def heard(over: bool) -> None:
        is_over.append(over)
        news.set()

    stream, tokens = vlm.stream(request(), heard=heard), []
    while (ready := stream.ready()) is not None:
        tokens += [token for piece in ready for token in piece.tokens]
        if not ready:
            assert news.wait(30)
            news.clear()
    assert tuple(tokens) == expected.tokens
    assert stream.text == expected.text == stream.reply.text
    assert is_over[-1] is True
    assert not any(is_over[:-1])
    assert stream.ready() is None
