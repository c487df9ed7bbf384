"""Two answers and where they differ, word by word.

plain, guided = mark("a cat and a fork", "a cat and a spoon")
bracketed(plain)     # "a cat and a [[fork]]"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cmg_gguf.cli.output import write, write_rendered
from cmg_gguf.cli.screen import count

if TYPE_CHECKING:
    from cmg_gguf.reply import Reply

WIDE = 100
"""Columns from which on the answers stand side by side."""

_WORD = re.compile(r"(\w+(?:['’]\w+)*)")


class Part(NamedTuple):
    """A stretch of an answer. differs: a word that the other answer does not have there."""

    text: str
    differs: bool


def mark(plain: str, guided: str) -> tuple[list[Part], list[Part]]:
    """Both answers in parts that make them up. What stands between words is never marked."""
    # Split by a pattern with one group: words at odd places, what is between them at even ones.
    pieces = _WORD.split(plain), _WORD.split(guided)
    matcher = SequenceMatcher(None, pieces[0][1::2], pieces[1][1::2], autojunk=False)
    same: tuple[set[int], set[int]] = set(), set()
    for block in matcher.get_matching_blocks():
        same[0].update(range(block.a, block.a + block.size))
        same[1].update(range(block.b, block.b + block.size))
    return _parts(pieces[0], same[0]), _parts(pieces[1], same[1])


def bracketed(parts: Sequence[Part]) -> str:
    """The answer with [[brackets]] about each word that differs."""
    return "".join(f"[[{part.text}]]" if part.differs else part.text for part in parts)


def print_comparison(plain: Reply, guided: Reply) -> None:
    """Writes both answers on standard output: side by side if the terminal is wide."""
    console = Console()
    parts = mark(plain.text, guided.text)
    headings = _heading("plain", plain, parts[0]), _heading("guided", guided, parts[1])
    if not console.is_terminal or console.is_dumb_terminal:
        text = "\n\n".join(f"{h}:\n{bracketed(p)}" for h, p in zip(headings, parts, strict=True))
        write(text + "\n")
        return
    bodies = [
        Text.assemble(*((part.text, style if part.differs else "") for part in answer))
        for answer, style in zip(parts, ("bold red", "bold green"), strict=True)
    ]
    write_rendered(_arranged(headings, bodies, wide=console.width >= WIDE))


def _parts(pieces: Sequence[str], same: set[int]) -> list[Part]:
    return [Part(text, i % 2 == 1 and i // 2 not in same) for i, text in enumerate(pieces) if text]


def _heading(name: str, reply: Reply, parts: Sequence[Part]) -> str:
    facts = [count(len(reply.tokens), "token")]
    if reply.guidance.contrasts:
        facts.append(f"{reply.n_changed} changed")
    facts.append(count(sum(part.differs for part in parts), "differing word"))
    return f"{name} ({', '.join(facts)})"


def _arranged(
    headings: Sequence[str], bodies: Sequence[RenderableType], *, wide: bool
) -> RenderableType:
    if not wide:
        pairs = zip(headings, bodies, strict=True)
        return Group(*(x for h, body in pairs for x in (Rule(h, align="left"), body)))
    table = Table.grid(expand=True, padding=0)
    for _ in bodies:
        table.add_column(ratio=1)
    table.add_row(*(Panel(b, title=h) for h, b in zip(headings, bodies, strict=True)))
    return table
