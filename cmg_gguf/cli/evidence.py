"""An answer with its doubtful words marked.

marked(reply)     # "A fork and a kettle[?.31] on the table."
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from cmg_gguf.cli.output import write, write_rendered
from cmg_gguf.evidence import is_doubtful

if TYPE_CHECKING:
    from cmg_gguf.reply import Reply

STYLE = "bold magenta"


def print_marked(reply: Reply) -> None:
    """Writes the answer on standard output, doubtful words in colour on a terminal that has any."""
    console = Console()
    if not console.is_terminal or console.is_dumb_terminal or console.no_color:
        write(marked(reply) + "\n")
        return
    parts = ((text, "" if score is None else STYLE) for text, score in _parts(reply))
    write_rendered(Text.assemble(*parts))


def marked(reply: Reply) -> str:
    """The text, each doubtful word with its score behind it: "kettle[?.31]"."""
    return "".join(text + ("" if score is None else _mark(score)) for text, score in _parts(reply))


def _mark(score: float) -> str:
    return f"[?{score:.2f}]".replace("0.", ".", 1)


def _parts(reply: Reply) -> Iterator[tuple[str, float | None]]:
    """The text in parts: a doubtful word with its score, what is between them without."""
    end = 0
    for word in reply.words:
        if is_doubtful(word.text, word.evidence):
            yield reply.text[end : word.start], None
            yield word.text, word.evidence
            end = word.stop
    yield reply.text[end:], None
