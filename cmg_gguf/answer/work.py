"""What the scheduler schedules: answers, and what they want next."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

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
    """An answer to make. cancelled: nobody wants it any more. alone: it is made beside no other."""

    alone: bool

    @property
    def cancelled(self) -> bool: ...

    def admission(self) -> Admission: ...

    def steps(self) -> Steps:
        """Begins it, or goes on behind what was said; closed early, it frees what it holds."""
        ...

    def ended(self, error: BaseException | None) -> None: ...


class Engine(Protocol):
    """What decodes: see `cmg_gguf.engine.engine.Engine`."""

    def together(self, batches: Sequence[Any]) -> list[list[int]]: ...
    def decode(self, batches: Sequence[Any]) -> Sequence[Any]: ...
    def make_room(self) -> bool: ...
