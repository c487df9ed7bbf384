"""Whose turn it is: a model answers one request at a time, in the order in which they were asked.

with turns:                  # waits; the thread that has the turn may take it again
    number = turns.begin()   # a new request: older ones are over
    ...
    turns.check(number)      # raises if it is over itself
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from cmg_gguf.errors import BackendError, ModelError


class Turns:
    """A lock that is given in the order in which it was asked for, and what it guards."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: deque[object] = deque()
        self._owner: int | None = None
        self._depth = 0
        self._newest = 0
        self._closed = False

    def __enter__(self) -> None:
        me, ticket = threading.get_ident(), object()
        with self._condition:
            if self._owner != me:
                self._waiting.append(ticket)
                try:
                    self._condition.wait_for(
                        lambda: self._owner is None and self._waiting[0] is ticket
                    )
                    self._owner = me
                finally:  # also where waiting was interrupted
                    self._waiting.remove(ticket)
                    self._condition.notify_all()
            self._depth += 1

    def __exit__(self, *exc: object) -> None:
        with self._condition:
            self._depth -= 1
            if self._depth == 0:
                self._owner = None
                self._condition.notify_all()

    @contextmanager
    def if_free(self) -> Iterator[bool]:
        """Takes the turn if nobody else has it; whether it did. Never waits: for finalizers."""
        with self._condition:
            mine = self._owner in (None, threading.get_ident())
            if mine:
                self._owner = threading.get_ident()
                self._depth += 1
        try:
            yield mine
        finally:
            if mine:
                self.__exit__()

    def begin(self) -> int:
        """The number of a new request; those before it are over."""
        self._newest += 1
        return self._newest

    def is_newest(self, number: int) -> bool:
        """Whether no request has begun since, and the model is open."""
        return number == self._newest and not self._closed

    def check(self, number: int | None = None) -> None:
        """Raises ModelError if the model is closed, BackendError if a newer request has begun."""
        if self._closed:
            raise ModelError("this GuidedVLM is closed; make a new one")
        if number is not None and not self.is_newest(number):
            raise BackendError("this answer was ended by a newer request to the same GuidedVLM")

    def close(self) -> None:
        """No more turns: the answer under way ends at its next `check`."""
        self._closed = True
