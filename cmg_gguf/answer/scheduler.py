"""Continuous batching: many answers, one decode after another for all of them together.

    scheduler.submit(work)      # from any thread; its events come through its own outbox

A thread of the scheduler's own lives as long as there is work. In each round every answer that
takes a step shares one decode; beside it go at most one image's encoding, and one micro-batch of a
long prompt or of an image. So an answer never waits longer than those for its next token, whatever
others bring. Answers join and leave between rounds:

    waiting   in order, until a lane is free and prompt and a share of the answer fit; one whose
              picture another is just decoding waits for it, and goes on from its cells
    active    a generator that yields what it wants next (`Wanted`), and is sent what came of it
    dropped   where the KV cache is full after all: the newest makes room, and is begun again behind
              what it has said as soon as it fits. Nobody is ended for another
"""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from cmg_gguf.errors import BackendError, ModelError

Admission: TypeAlias = Literal["go", "full", "soon"]
"""Whether an answer may begin; "soon": it waits for another's picture, and holds nobody up."""


@dataclass(frozen=True, eq=False)
class Encoding:
    """An image to encode, or what else takes as long and decodes nothing."""

    run: Callable[[], None]


class Rows(Protocol):
    """Rows to decode: see `cmg_gguf.engine.batch`."""

    @property
    def n_rows(self) -> int: ...

    @property
    def is_image(self) -> bool: ...


Wanted: TypeAlias = Encoding | Rows
Steps: TypeAlias = Generator[Any, Any, None]
"""Yields `Wanted`; is sent what came of rows, and None for an encoding."""


class Work(Protocol):
    """An answer to make. cancelled: nobody wants it any more."""

    cancelled: bool

    def admission(self) -> Admission: ...

    def steps(self) -> Steps:
        """Begins it, or goes on behind what was said; closed early, it frees what it holds."""
        ...

    def ended(self, error: BaseException | None) -> None: ...


class Engine(Protocol):
    """What decodes: see `cmg_gguf.engine.engine.Engine`."""

    @property
    def n_ubatch(self) -> int: ...
    def together(self, batches: Sequence[Any]) -> list[list[int]]: ...
    def decode(self, batches: Sequence[Any]) -> Sequence[Any]: ...
    def make_room(self) -> bool: ...


@dataclass(eq=False)
class _Active:
    """An answer under way. wanted: None while it computes. since: when it began to want that."""

    work: Work
    steps: Steps
    wanted: Wanted | None = None
    since: int = 0


class Scheduler:
    """Drives answers on one engine, up to n_parallel at once."""

    def __init__(self, engine: Engine, n_parallel: int) -> None:
        self.n_parallel = n_parallel
        self._engine = engine
        self._lock = threading.Condition()
        self._waiting: deque[Work] = deque()
        self._active: list[_Active] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._n_held = 0
        self._ticket = itertools.count()
        _schedulers.add(self)

    @property
    def is_closed(self) -> bool:
        """Whether nothing more is answered."""
        return self._closed

    def check(self) -> None:
        """Raises ModelError if the model is closed."""
        if self._closed:
            raise ModelError("this GuidedVLM is closed; make a new one")

    @contextmanager
    def held_open(self) -> Iterator[None]:
        """The model is not freed meanwhile. Raises ModelError if it is closed."""
        with self._lock:
            self.check()
            self._n_held += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_held -= 1
                self._lock.notify_all()

    def submit(self, work: Work) -> None:
        """Takes an answer to make. Raises ModelError if the model is closed."""
        with self._lock:
            self.check()
            self._waiting.append(work)
            if self._thread is None:
                threading.Thread(target=self._live, name="cmg-engine", daemon=True).start()

    @property
    def is_mine(self) -> bool:
        """Whether the caller is called by an answer under way."""
        return threading.current_thread() is self._thread

    def drive(self, done: Callable[[], bool]) -> bool:
        """Makes rounds until done(), where the caller is called by an answer under way, so that
        nobody else would; whether that is so. Raises BackendError where that cannot end."""
        if not self.is_mine:
            return False
        while not done():
            if not self._round():
                raise BackendError(
                    "an answer waits for another that can only be made behind it; raise n_parallel"
                )
        return True

    def close(self) -> None:
        """Ends all answers with ModelError, and takes no more. Waits for the decode under way."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._lock.wait_for(lambda: self._n_held == 0)
        if thread is None or self.is_mine:
            self._end_all(_closed_error())
        else:
            thread.join()

    def close_if_at_work(self) -> None:
        """Closes it if it is making answers."""
        if self._thread is not None:
            self.close()

    def _live(self) -> None:
        with self._lock:
            if self._thread is not None:
                return  # another was quicker
            self._thread = threading.current_thread()
        while True:
            with self._lock:
                if self._closed or not (self._waiting or self._active):
                    self._thread = None
                    break
            try:
                self._round()
            except BaseException as exc:
                self._end_all(exc)
        if self._closed:
            self._end_all(_closed_error())

    def _end_all(self, error: BaseException) -> None:
        for active in tuple(self._active):
            if active.wanted is not None:
                self._remove(active)
                active.work.ended(error)
        with self._lock:
            waiting = tuple(self._waiting)
            self._waiting.clear()
        for work in waiting:
            work.ended(error)

    def _round(self) -> bool:
        """Whether anything was done."""
        self._drop_cancelled()
        did = self._admit()
        did |= self._encode_one()
        self._make_room()
        groups = self._due()
        for group in groups:
            self._decode(group)
        return did or bool(groups)

    def _drop_cancelled(self) -> None:
        for active in tuple(self._active):
            if active.work.cancelled and active.wanted is not None:
                self._remove(active)
                active.work.ended(None)
        with self._lock:
            dropped = [work for work in self._waiting if work.cancelled]
            self._waiting = deque(work for work in self._waiting if not work.cancelled)
        for work in dropped:
            work.ended(None)

    def _admit(self) -> bool:
        admitted = False
        with self._lock:
            waiting = tuple(self._waiting)
        for work in waiting:
            if len(self._active) >= self.n_parallel:
                break
            admission = work.admission() if self._active else "go"
            if admission == "full":
                break
            if admission == "go":
                with self._lock:
                    self._waiting.remove(work)
                active = _Active(work, work.steps())
                self._active.append(active)
                self._advance(active, None)
                admitted = True
        return admitted

    def _encode_one(self) -> bool:
        wanting = [(a, a.wanted) for a in self._active if isinstance(a.wanted, Encoding)]
        if not wanting:
            return False
        active, encoding = min(wanting, key=lambda pending: pending[0].since)
        active.wanted, came = None, None
        try:
            encoding.run()
        except Exception as exc:
            came = exc
        self._advance(active, came)
        return True

    def _make_room(self) -> None:
        """The newest answer gives way, where all that is wanted does not fit."""
        while not self._engine.make_room():
            idle = [a for a in self._active if a.wanted is not None]
            if len(self._active) < 2 or not idle:
                return  # whoever is left meets the error
            self._remove(idle[-1])
            with self._lock:
                self._waiting.appendleft(idle[-1].work)

    def _due(self) -> list[list[_Pending]]:
        """What this round decodes: all that is small, together; and the oldest of the rest."""
        wanting = sorted(
            ((a, a.wanted) for a in self._active if not isinstance(a.wanted, Encoding | None)),
            key=lambda pending: pending[0].since,
        )
        small: list[_Pending] = []
        n_rows = 0
        for active, rows in sorted(wanting, key=lambda pending: pending[1].n_rows):
            if n_rows + rows.n_rows <= self._engine.n_ubatch and not rows.is_image:
                small.append((active, rows))
                n_rows += rows.n_rows
        rest = [pending for pending in wanting if pending not in small]
        groups = self._engine.together([rows for _, rows in small])
        return [[small[i] for i in group] for group in groups] + ([rest[:1]] if rest else [])

    def _decode(self, group: Sequence[_Pending]) -> None:
        # Code of a caller's that was called meanwhile may have made rounds of its own.
        group = [(active, rows) for active, rows in group if active.wanted is rows]
        if not group:
            return
        for active, _ in group:
            active.wanted = None
        try:
            came = self._engine.decode([rows for _, rows in group])
        except BaseException as exc:
            came = [exc] * len(group)
        for (active, _), one in zip(group, came, strict=True):
            self._advance(active, one)

    def _advance(self, active: _Active, came: Any) -> None:
        """Sends an answer what it wanted, or throws it the error that this met."""
        try:
            if isinstance(came, BaseException):
                active.wanted = active.steps.throw(came)
            else:
                active.wanted = active.steps.send(came)
            active.since = next(self._ticket)
        except StopIteration:
            self._active.remove(active)
            active.work.ended(None)
        except BaseException as exc:
            self._active.remove(active)
            active.work.ended(exc)

    def _remove(self, active: _Active) -> None:
        self._active.remove(active)
        active.wanted = None
        active.steps.close()


_Pending: TypeAlias = tuple[_Active, Rows]


def _closed_error() -> ModelError:
    return ModelError("this GuidedVLM was closed before the answer was finished")


_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """No thread computes while the interpreter is taken down."""
    for scheduler in tuple(_schedulers):
        scheduler.close_if_at_work()
