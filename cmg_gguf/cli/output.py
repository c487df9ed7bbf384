"""What goes to standard output: the answer, as it comes, and what stands in its place."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

if TYPE_CHECKING:
    from cmg_gguf.reply import Piece

CHANGED = "underline yellow"


class AnswerWriter:
    """Writes pieces of an answer; with `show_changes`, what guidance changed stands out.

    That takes a terminal: elsewhere the text is written as it is.
    """

    def __init__(self, *, show_changes: bool = False) -> None:
        console = Console()
        self._console = console if show_changes and console.is_terminal else None
        self._last = ""

    @contextmanager
    def line(self) -> Iterator[AnswerWriter]:
        """An answer: however it ends, what was written ends with a newline."""
        self._last = ""
        try:
            yield self
            self._last = self._last or " "  # an empty answer is a line too
        finally:
            if self._last not in ("", "\n"):
                write("\n")

    def __call__(self, piece: Piece) -> None:
        """Writes a piece, at once."""
        if not piece.text:
            return
        self._last = piece.text[-1]
        if self._console is not None and any(token.changed for token in piece.tokens):
            word = piece.text.lstrip(" ")
            write(piece.text[: len(piece.text) - len(word)])
            self._console.out(word, style=CHANGED, highlight=False, end="")
        else:
            write(piece.text)


def write(text: str) -> None:
    """Writes text as it is, at once. Raises BrokenPipeError if nobody reads any more."""
    sys.stdout.write(text)
    sys.stdout.flush()


WIDE_FILE = 160


def write_rendered(content: RenderableType, *, wide: bool = False) -> None:
    """Writes what rich makes of `content` for this terminal. Raises BrokenPipeError.

    wide: where it goes to no terminal, there are `WIDE_FILE` columns.
    """
    width = WIDE_FILE if wide and not sys.stdout.isatty() else None
    console = Console(highlight=False, width=width)
    # Printed directly, rich would end the process itself where nobody reads.
    with console.capture() as capture:
        console.print(content)
    write(capture.get())


def write_json(value: Mapping[str, Any]) -> None:
    """Writes one line of JSON."""
    write(json.dumps(value, ensure_ascii=False) + "\n")
