"""Ctrl-C as a wish that is looked at between steps, so that no step is torn apart.

with Interrupt() as interrupt:
    for piece in stream:
        ...
        interrupt.check()   # raises KeyboardInterrupt once Ctrl-C was pressed
# So does the end of the block: what was pressed behind the last check is not lost.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from cmg_gguf.cli.screen import Screen


class Interrupt:
    """Inside the block, the first Ctrl-C waits for `check`, or for the end of the block unless an
    error ends it; a second one raises at once."""

    def __init__(self) -> None:
        self._wanted = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed."""
        if self._wanted:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._wanted:
            raise KeyboardInterrupt
        self._wanted = True


@contextmanager
def counted(err: Screen, what: str) -> Iterator[Callable[[int, int], None]]:
    """progress(done, total) of work that goes on where it is stopped; what: its things, in plural.

    Ctrl-C ends it between two of them, which is noted. Behind the last nothing is left to go on
    with: it raises KeyboardInterrupt alone, at the end of the block.
    """
    with Interrupt() as interrupt, err.counting(what) as counting:

        def progress(done: int, total: int) -> None:
            counting(done, total)
            interrupt.check()

        try:
            yield progress
        except KeyboardInterrupt:
            err.note("stopped; the same command goes on from here")
            raise
