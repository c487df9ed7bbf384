"""What an answer has to tell, from the thread that makes it to those who read it."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Event = TypeVar("Event")


@dataclass(frozen=True)
class End:
    """Nothing comes any more. error: why, where that was not planned."""

    error: BaseException | None = None


class Outbox(Generic[Event]):
    """Events in order, until there is an end. Whoever writes never waits."""

    def __init__(self, drive: Callable[[Callable[[], bool]], object]) -> None:
        """drive(there): makes events come until there(), where waiting would be for oneself."""
        self._drive = drive
        self._events: queue.SimpleQueue[Event | End] = queue.SimpleQueue()

    def put(self, event: Event) -> None:
        """Tells an event."""
        self._events.put(event)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing will be told any more."""
        self._events.put(End(error))

    def get(self) -> Event | End:
        """The next event; waits for it. Behind the end, the end again."""
        self._drive(lambda: not self._events.empty())
        event = self._events.get()
        if isinstance(event, End):
            self._events.put(End())
        return event
