"""Many requests, answered as many at once as the model takes."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from cmg_gguf.answer.scheduler import Scheduler
from cmg_gguf.reply import Reply
from cmg_gguf.request import Request
from cmg_gguf.stream import Stream

N_PREPARED = 2
"""Requests that are read, beside those under way: so none waits for a file."""


@dataclass(frozen=True)
class Outcome:
    """What came of one of many requests: a reply, or the error that it met.

    index: which, counted from 0.
    """

    index: int
    reply: Reply | None = None
    error: Exception | None = None

    def unwrap(self) -> Reply:
        """The reply. Raises the error where there is none."""
        if self.reply is None:
            assert self.error is not None
            raise self.error
        return self.reply


def generate_many(
    asked: Callable[[Request, Callable[[], None]], Stream],
    requests: Iterable[Request],
    scheduler: Scheduler,
) -> Iterator[Outcome]:
    """What comes of each request, as they finish; of an iterator no more is taken than can be
    worked on. asked(request, at_end): an answer that was asked for."""
    finished: queue.SimpleQueue[int] = queue.SimpleQueue()
    streams: dict[int, Stream] = {}
    numbered = enumerate(requests)
    n_open = scheduler.n_parallel + N_PREPARED
    more = True
    try:
        while more or streams:
            while more and len(streams) < n_open:
                index, request = next(numbered, (0, None))
                more = request is not None
                if request is None:
                    break
                try:
                    streams[index] = asked(request, partial(finished.put, index))
                except Exception as exc:
                    scheduler.check()
                    yield Outcome(index, error=exc)
            if streams:
                scheduler.drive(lambda: not finished.empty())
                index = finished.get()
                outcome = _outcome(index, streams.pop(index))
                scheduler.check()
                yield outcome
    finally:
        for stream in streams.values():
            stream.cancel()


def _outcome(index: int, stream: Stream) -> Outcome:
    try:
        return Outcome(index, stream.whole())
    except Exception as exc:
        return Outcome(index, error=exc)
