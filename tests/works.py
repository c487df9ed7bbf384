"""Answers and an engine for the scheduler alone: each notes what happens to it, in one log.

with driving(n_parallel=2) as stage:
    stage.play(Work(stage, "a", [1, 1]), Work(stage, "b", [8, ENCODE, 1]))
stage.log    # ("began", "a"), ("decode", ("a", "b")), ...
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from unittest.mock import patch

from patience import PATIENCE, in_time

from cmg_gguf.answer.scheduler import Scheduler
from cmg_gguf.answer.work import Admission, Encoding

ENCODE = "encode"
"""Stands for an image to encode among what a work wants."""

Want: TypeAlias = "int | str | Callable[[], object]"
"""Rows to decode; negative: of an image. Or `ENCODE`. Or what is called on the way."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that a work wants decoded."""

    name: str
    n_rows: int
    is_image: bool = False


class FakeEngine:
    """Says what came of rows. room: how many works may be under way before one must give way.

    errors: by name, what comes of its rows. apart: nothing shares a decode.
    """

    def __init__(self, log: list[tuple[Any, ...]], n_ubatch: int) -> None:
        self.n_ubatch = n_ubatch
        self.errors: dict[str, BaseException] = {}
        self.apart = False
        self.raises: dict[str, BaseException] = {}
        self.has_room: Callable[[], bool] = lambda: True
        self._log = log

    def together(self, batches: Sequence[Rows]) -> list[list[int]]:
        self._may_raise("together")
        groups: list[list[int]] = []
        for i, batch in enumerate(batches):
            for group in groups:
                rows = [*(batches[j] for j in group), batch]
                fits = sum(r.n_rows for r in rows) <= self.n_ubatch
                if fits and not self.apart and not any(r.is_image for r in rows):
                    group.append(i)
                    break
            else:
                groups.append([i])
        return groups

    def decode(self, batches: Sequence[Rows]) -> list[BaseException | str]:
        self._log.append(("decode", *(batch.name for batch in batches)))
        assert sum(batch.n_rows for batch in batches) <= self.n_ubatch
        assert not (any(batch.is_image for batch in batches) and len(batches) > 1)
        self._may_raise("decode")
        return [self.errors.get(batch.name, f"{batch.n_rows} rows") for batch in batches]

    def make_room(self) -> bool:
        self._may_raise("make_room")
        return self.has_room()

    def _may_raise(self, where: str) -> None:
        error = self.raises.pop(where, None)
        if error is not None:
            raise error


class Work:
    """An answer that wants one thing after another, and again those it had where it was dropped.

    outcome: what it ended with: an error, or None. n_done: how many of them it got.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        wants: Sequence[Want],
        *,
        admission: Callable[[], Admission] = lambda: "go",
        encode: Callable[[], object] = lambda: None,
        at_close: BaseException | None = None,
    ) -> None:
        self.cancelled = False
        self.alone = False
        self.outcome: BaseException | None = None
        self.n_done = 0
        self.is_over = threading.Event()
        self.name, self.admission = name, admission
        self._stage, self._wants = stage, wants
        self._encode, self._at_close = encode, at_close

    def steps(self) -> Generator[Any, Any, None]:
        self._stage.log.append(("began", self.name))
        self._stage.active.append(self)
        self.n_done = 0
        try:
            for want in self._wants:
                yield from self._wanted(want)
                self.n_done += 1
        except GeneratorExit:
            self._stage.log.append(("closed", self.name))
            if self._at_close is not None and not self._stage.is_over:
                raise self._at_close from None
            raise
        finally:
            self._stage.active.remove(self)

    def ended(self, error: BaseException | None) -> None:
        assert not self.is_over.is_set(), f"{self.name} ended twice"
        self._stage.log.append(("ended", self.name))
        self.outcome = error
        self.is_over.set()

    def _wanted(self, want: Want) -> Iterator[Any]:
        if callable(want):
            want()
        elif isinstance(want, str):
            came = yield Encoding(self._encoded)
            assert came is None
        else:
            came = yield Rows(self.name, abs(want), is_image=want < 0)
            assert came == f"{abs(want)} rows"

    def _encoded(self) -> None:
        self._stage.log.append(("encode", self.name))
        self._encode()


class Stage:
    """A scheduler, its engine, and the log of both. active: works that have begun. crashes: what
    ended a thread. is_over: nothing is told to fail any more."""

    def __init__(self, n_parallel: int, n_ubatch: int) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.crashes: list[object] = []
        self.is_over = False
        self.active: list[Work] = []
        self.engine = FakeEngine(self.log, n_ubatch)
        self.scheduler = Scheduler(self.engine, n_parallel)

    def play(self, *works: Work) -> None:
        """All of them, asked for at one moment, to their end."""
        self.submit(*works)
        self.wait(*works)

    def submit(self, *works: Work) -> None:
        """Asks for all of them at one moment: no round is made in between."""

        def all_of_them() -> None:
            for work in works:
                self.scheduler.submit(work)

        self.scheduler.submit(Work(self, "first", [all_of_them]))

    def wait(self, *works: Work) -> None:
        """Until all have ended."""
        hanging = [work.name for work in works if not work.is_over.wait(PATIENCE)]
        assert hanging == [], f"never ended: {hanging}"

    def of(self, kind: str) -> list[Any]:
        """The names in all events of a kind, but of what asked for the others."""
        return [event[1] for event in self.log if event[0] == kind and event[1] != "first"]

    @property
    def decodes(self) -> list[tuple[str, ...]]:
        """Who shared each decode."""
        return [event[1:] for event in self.log if event[0] == "decode"]


@contextmanager
def driving(n_parallel: int = 4, n_ubatch: int = 8) -> Iterator[Stage]:
    """A stage that is closed behind the test, and does not hang where that does."""
    stage = Stage(n_parallel, n_ubatch)
    with patch.object(threading, "excepthook", lambda crash: stage.crashes.append(crash.exc_value)):
        try:
            yield stage
        finally:
            stage.is_over = True
            in_time(stage.scheduler.close)
    assert stage.crashes == []
