"""What an answer has to tell, from the thread that makes it to those who read it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cmg_gguf.answer.changes import Changes

Event = TypeVar("Event")


@dataclass(frozen=True)
class End:
    """Nothing comes any more. error: why, where that was not planned."""

    error: BaseException | None = None

    def check(self) -> None:
        """Raises the error, where there is one."""
        if self.error is not None:
            raise self.error


class Outbox(Generic[Event]):
    """Events in order, until there is an end. Whoever writes never waits."""

    def __init__(
        self,
        drive: Callable[[Callable[[], bool]], object],
        heard: Callable[[bool], None] = lambda over: None,
    ) -> None:
        """drive(there): makes events come until there(), where waiting would be for oneself.
        heard(over): called by who writes, behind each event, and behind the end with True."""
        self._drive, self._heard = drive, heard
        self._lock, self._changes = threading.RLock(), Changes()
        self._events: deque[Event] = deque()
        self._end: End | None = None

    def put(self, event: Event) -> None:
        """Tells an event."""
        with self._lock:
            self._events.append(event)
        self._changes.tell()
        self._heard(False)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing will be told any more."""
        with self._lock:
            self._end = End(error)
        self._changes.tell()
        self._heard(True)

    def get(self) -> Event | End:
        """The next event; waits for it. Behind the last, the end, as often as asked; its error
        once."""
        self._drive(self._has_any)
        while True:
            self._changes.wait_for(self._has_any)
            with self._lock:
                if self._has_any():  # nobody else has taken it
                    return self._next()

    def take(self) -> list[Event | End]:
        """The events that are there, without waiting; where there are none, the end alone if it has
        come, its error once."""
        with self._lock:
            events: list[Event | End] = list(self._events)
            self._events.clear()
            if not events and self._end is not None:
                events.append(self._next())
            return events

    def _next(self) -> Event | End:
        if self._events:
            return self._events.popleft()
        end, self._end = self._end, End()
        assert end is not None
        return end

    def _has_any(self) -> bool:
        return bool(self._events) or self._end is not None
