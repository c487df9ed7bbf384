"""Continuous batching: many answers, one decode after another for all of them together.

    scheduler.submit(work)      # from any thread; its events come through its own outbox

It works in a thread of its own, which stays for a while behind the last answer. In each round all
answers that take a step share one decode; beside it go at most one image's encoding, and one
micro-batch of a long prompt or of an image. So an answer never waits longer than those for its next
token, whatever others bring. Answers join and leave between rounds:

    waiting   in order, until a lane is free and prompt and a share of the answer fit; one whose
              picture another is just decoding waits for it, and goes on from its cells; one
              that is made alone waits for those ahead of it, and all behind it wait
    active    a generator that yields what it wants next (`Wanted`), and is sent what came of it
    dropped   where the KV cache is full after all: the newest makes room, and is begun again behind
              what it has said as soon as it fits. Nobody is ended for another
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from cmg_gguf.answer import worker
from cmg_gguf.answer.changes import Changes
from cmg_gguf.answer.work import Encoding, Engine, Rows, Steps, Wanted, Work
from cmg_gguf.errors import BackendError, ModelError

Done = TypeVar("Done")


@dataclass(eq=False)
class _Active:
    """An answer under way.

    wanted: what is to be done for it; None while something is. came: what that gave, where it was
    not told yet. since: when it began to want that.
    """

    work: Work
    steps: Steps
    wanted: Wanted | None = None
    came: tuple[Any] | None = None
    since: int = 0

    @property
    def is_running(self) -> bool:
        """Whether it has called what is running now: code of the caller's may make rounds."""
        return inspect.getgeneratorstate(self.steps) == inspect.GEN_RUNNING


class Scheduler:
    """Drives answers on one engine, up to n_parallel at once."""

    def __init__(
        self,
        engine: Engine,
        n_parallel: int,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        """lock: held while answers compute and decode; None = nobody else uses the engine."""
        self._computing = lock or nullcontext()
        self.n_parallel = n_parallel
        self._engine = engine
        # Nothing that waits, computes or tells an end is called under the lock.
        self._lock, self._changes = threading.RLock(), Changes()
        self._waiting: deque[Work] = deque()
        self._active: list[_Active] = []
        self._thread: threading.Thread | None = None
        self._closed = False
        self._held: set[AbstractContextManager[object]] = set()
        self._ticket = itertools.count()
        worker.close_at_exit(self)

    @property
    def has_work(self) -> bool:
        """Whether its thread has something to do."""
        return self._closed or bool(self._waiting or self._active)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to answer, now or any more."""
        return self._closed or not (self._waiting or self._active)

    def check(self) -> None:
        """Raises ModelError if the model is closed."""
        if self._closed:
            raise ModelError("this GuidedVLM is closed; make a new one")

    def while_open(self, do: Callable[[], Done]) -> Done:
        """What `do` gives; the model is not freed meanwhile. Raises ModelError if it is closed."""
        held = threading.Lock()
        with held:
            with self._lock:
                self.check()
                self._held.add(held)
            try:
                return do()
            finally:
                self._held.discard(held)

    def submit(self, work: Work) -> None:
        """Takes an answer to make. Raises ModelError if the model is closed."""
        with self._lock:
            self.check()
            if self._thread is None:
                worker.start(self, self._changes)
            self._waiting.append(work)  # behind it: there is a thread for whatever waits
        self._changes.tell()

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
            if self._closed:
                self._end_all(_closed_error())
            elif not self._round():
                raise BackendError(
                    "an answer waits for another that can only be made behind it; raise n_parallel"
                )
        return True

    def close(self) -> None:
        """Ends all answers with ModelError, and takes no more. Waits for the decode under way."""
        with self._lock:
            self._closed = True
            held = tuple(self._held)
        self._changes.tell()
        for one in held:
            with one:
                pass
        if self.is_mine:
            self._end_all(_closed_error())
        else:
            self._changes.wait_for(lambda: self._thread is None and not self._waiting)

    def close_if_at_work(self) -> None:
        """Closes it if it is making answers."""
        if not self.is_idle:
            self.close()

    def work(self) -> bool:
        """Makes rounds while there is work. False: the thread is to end, another has its place."""
        with self._lock:
            if self._thread not in (None, threading.current_thread()):
                return False
            self._thread = threading.current_thread()
        while not self._closed and (self._waiting or self._active):
            try:
                self._round()
            except BaseException as exc:
                self._end_all(exc)
        return True

    def resign(self) -> bool:
        """Ends the thread's time, where nothing has come meanwhile; whether it is over."""
        if self._closed:
            self._end_all(_closed_error())
        with self._lock:
            if self._waiting:
                return False
            self._thread = None
        self._changes.tell()
        return True

    def _end_all(self, error: BaseException) -> None:
        for active in tuple(self._active):
            if not active.is_running:
                self._end(active, error)
        with self._lock:
            waiting = tuple(self._waiting)
            self._waiting.clear()
        for work in waiting:
            _tell_end(work, error)

    def _round(self) -> bool:
        """Whether anything was done."""
        with self._computing:
            return self._locked_round()

    def _locked_round(self) -> bool:
        self._drop_cancelled()
        did = self._deliver()
        did |= self._admit()
        did |= self._encode_one()
        n_decodes = 0
        for choose in (self._smallest, self._oldest):
            self._make_room()
            if group := self._due(choose):
                self._decode(group)
                n_decodes += 1
        return did or n_decodes > 0

    def _drop_cancelled(self) -> None:
        for active in tuple(self._active):
            if active.work.cancelled and not active.is_running:
                self._end(active, None)
        with self._lock:
            dropped = [work for work in self._waiting if work.cancelled]
            self._waiting = deque(work for work in self._waiting if work not in dropped)
        for work in dropped:
            _tell_end(work, None)

    def _admit(self) -> bool:
        admitted = False
        with self._lock:
            waiting = tuple(self._waiting)
        for work in waiting:
            if len(self._active) >= self.n_parallel or not self._goes_beside(work):
                break
            try:
                admission = work.admission() if self._active else "go"
            except BaseException as exc:
                with self._lock:
                    self._waiting.remove(work)
                _tell_end(work, exc)
                continue
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

    def _goes_beside(self, work: Work) -> bool:
        """Whether an answer may be made beside those under way."""
        return not self._active or not (work.alone or any(a.work.alone for a in self._active))

    def _encode_one(self) -> bool:
        wanting = [(a, a.wanted) for a in self._active if isinstance(a.wanted, Encoding)]
        if not wanting:
            return False
        active, encoding = min(wanting, key=lambda pending: pending[0].since)
        active.wanted, came = None, None
        try:
            encoding.run()
        except BaseException as exc:
            came = exc
        self._advance(active, came)
        return True

    def _make_room(self) -> None:
        """The newest answer gives way, where all that is wanted does not fit."""
        while not self._engine.make_room():
            idle = [a for a in self._active if not a.is_running]
            if len(self._active) < 2 or not idle:
                return  # whoever is left meets the error
            newest = idle[-1]
            if self._close_steps(newest, None):
                with self._lock:
                    self._waiting.appendleft(newest.work)

    def _due(self, choose: Callable[[Sequence[_Pending]], _Pending]) -> list[_Pending]:
        """Of the rows that are wanted, those that share a decode with the ones chosen: small ones
        first, so that what takes steps goes with them."""
        wanting = [(a, a.wanted) for a in self._active if not isinstance(a.wanted, Encoding | None)]
        if not wanting:
            return []
        first = choose(wanting)
        others = sorted((p for p in wanting if p is not first), key=_size)
        pending = [first, *others]
        (group, *_) = self._engine.together([rows for _, rows in pending])
        return [pending[i] for i in group]

    @staticmethod
    def _smallest(wanting: Sequence[_Pending]) -> _Pending:
        return min(wanting, key=_size)

    @staticmethod
    def _oldest(wanting: Sequence[_Pending]) -> _Pending:
        return min(wanting, key=lambda pending: pending[0].since)

    def _decode(self, group: Sequence[_Pending]) -> None:
        for active, _ in group:
            active.wanted = None
        try:
            came = self._engine.decode([rows for _, rows in group])
        except BaseException as exc:
            came = [exc] * len(group)
        for (active, _), one in zip(group, came, strict=True):
            active.came = (one,)
        self._deliver()

    def _deliver(self) -> bool:
        """Tells answers what came of their rows; whether there was something to tell."""
        delivered = False
        while active := next((a for a in self._active if a.came is not None), None):
            (came,), active.came, delivered = active.came or (None,), None, True
            self._advance(active, came)
        return delivered

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
            _tell_end(active.work, None)
        except BaseException as exc:
            self._active.remove(active)
            _tell_end(active.work, exc)

    def _end(self, active: _Active, error: BaseException | None) -> None:
        if self._close_steps(active, error):
            _tell_end(active.work, error)

    def _close_steps(self, active: _Active, error: BaseException | None) -> bool:
        """Ends an answer's steps early; where that fails, the answer has ended with that."""
        self._active.remove(active)
        active.wanted = None
        try:
            active.steps.close()
        except BaseException as exc:
            _tell_end(active.work, error or exc)
            return False
        return True


_Pending: TypeAlias = tuple[_Active, Rows]


def _size(pending: _Pending) -> tuple[bool, int, int]:
    active, rows = pending
    return rows.is_image, rows.n_rows, active.since


def _tell_end(work: Work, error: BaseException | None) -> None:
    """Tells an answer that it has ended. What that raises is told as what ends a thread is, and
    ends neither the thread nor another answer."""
    try:
        work.ended(error)
    except BaseException as exc:
        worker.report(exc)


def _closed_error() -> ModelError:
    return ModelError("this GuidedVLM was closed before the answer was finished")
