"""Places for answers: so many at once, so many more that wait, in order, and then no more.

    queue = Queue(n_places=4, n_waiting=16)
    await queue.enter(2)      # two places at once; raises FullError
    queue.leave(2)

Belongs to one event loop; nothing here waits for a thread.
"""

from __future__ import annotations

import asyncio
from collections import deque


class FullError(Exception):
    """So many wait already that nobody else may."""


class Queue:
    """First come, first served: a request that wants several places holds those behind it up."""

    def __init__(self, n_places: int, n_waiting: int) -> None:
        self.n_places, self.n_waiting_most = n_places, n_waiting
        self.n_taken = 0
        """Places that are taken."""
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def n_waiting(self) -> int:
        """Places that are waited for."""
        return sum(n for n, _ in self._waiting)

    async def enter(self, n: int = 1) -> None:
        """Takes n places, 1 to n_places, as soon as they are free. Cancelled, it takes none. Raises
        FullError."""
        if not self._waiting and self.n_taken + n <= self.n_places:
            self.n_taken += n
            return
        if self.n_waiting + n > self.n_waiting_most:
            raise FullError
        entry = n, asyncio.get_running_loop().create_future()
        self._waiting.append(entry)
        try:
            await entry[1]
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._call()  # who is behind it may need fewer places
            elif not entry[1].cancelled():
                self.leave(n)  # it was called, and has gone
            raise

    def leave(self, n: int = 1) -> None:
        """Gives n places back."""
        self.n_taken -= n
        self._call()

    def _call(self) -> None:
        while self._waiting and self.n_taken + self._waiting[0][0] <= self.n_places:
            n, called = self._waiting.popleft()
            if not called.done():  # else it is cancelled, and will find itself called no more
                self.n_taken += n
                called.set_result(None)
