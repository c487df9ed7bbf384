"""An answer on an event loop, made by the engine's thread.

    async with answer:
        async for piece in answer: ...
    answer.reply

No thread waits for it: the engine's tells the loop, at most once until the loop has looked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from cmg_gguf.reply import Piece, Reply
from cmg_gguf.stream import Stream


class Ear:
    """What the engine's thread tells of one answer, on the loop that made this.

    over: called on the loop, once, when nothing more will come and the session is free. It holds
    no answer: one that is dropped ends.
    """

    def __init__(self, over: Callable[[], None]) -> None:
        self.news = asyncio.Event()
        self._over = over
        self._loop = asyncio.get_running_loop()
        self._is_told = self._is_over = False

    def hear(self, over: bool) -> None:
        """Tells it, from any thread."""
        self._is_over |= over
        if not self._is_told:
            self._is_told = True
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_told = False
        self.news.set()
        if self._is_over:
            over, self._over = self._over, _nothing
            over()


class Answer:
    """The pieces of an answer as they come; `reply` has the whole when they are done.

    Left early or dropped, it ends before its next token.
    """

    def __init__(self, stream: Stream, ear: Ear, closed: Callable[[Answer], None]) -> None:
        """closed: called once, when it is left."""
        self.n_tokens = 0
        """Tokens that have been read."""
        self._stream, self._ear, self._closed = stream, ear, closed
        self._pieces: deque[Piece] = deque()

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Piece:
        """The next piece. Raises what ended the answer: BackendError, ModelError."""
        while not self._pieces:
            self._ear.news.clear()
            ready = self._stream.ready()
            if ready is None:
                raise StopAsyncIteration
            if not ready:
                await self._ear.news.wait()
            self._pieces.extend(ready)
        piece = self._pieces.popleft()
        self.n_tokens += len(piece.tokens)
        return piece

    async def whole(self) -> Reply:
        """The answer at once."""
        async for _ in self:
            pass
        return self.reply

    @property
    def reply(self) -> Reply:
        """The finished answer. Raises BackendError while it is not finished."""
        return self._stream.reply

    def close(self) -> None:
        """Ends it here, without waiting for that. Does nothing the second time."""
        self._stream.cancel()
        closed, self._closed = self._closed, _ignored
        closed(self)

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


def _nothing() -> None:
    pass


def _ignored(answer: Answer) -> None:
    pass
