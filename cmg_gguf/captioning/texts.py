"""Prompts for a picture, and captions of what was answered. Pure functions."""

from __future__ import annotations

import re

from cmg_gguf.captioning.pictures import Picture
from cmg_gguf.errors import CaptionError

PLACEHOLDERS = ("name", "directory", "tags")

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]")
_ABBREVIATED = re.compile(r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|St|Mt|vs|etc|approx|e\.g|i\.e))\.$")
_CLAUSE_END = re.compile(r"[,;:](?=\s)")


def check_placeholders(prompt: str) -> None:
    """Raises CaptionError for a {word} in the prompt that stands for nothing."""
    for word in _PLACEHOLDER.findall(prompt):
        if word not in PLACEHOLDERS:
            there = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise CaptionError(f"{{{word}}} in the prompt stands for nothing: there are {there}")


def reads_tags(prompt: str) -> bool:
    """Whether {tags} is in the prompt."""
    return "tags" in _PLACEHOLDER.findall(prompt)


def prompt_for(prompt: str, picture: Picture, tags: str, max_words: int | None) -> str:
    """The prompt about one picture. tags: what {tags} stands for."""
    # A name need not be text; the model is asked in text.
    values = {
        "name": picture.path.stem.encode("utf-8", "replace").decode(),
        "directory": picture.path.absolute().parent.name.encode("utf-8", "replace").decode(),
        "tags": tags,
    }
    asked = _PLACEHOLDER.sub(lambda found: values[found[1]], prompt)
    return asked if max_words is None else f"{asked} Use at most {max_words} words."


def caption_of(answer: str, *, max_words: int | None, is_whole: bool) -> str:
    """The answer as one line, cut to `max_words`. is_whole: the model came to an end itself."""
    line = " ".join(answer.split())
    if not is_whole and (ends := _ends(line)):
        line = line[: ends[-1]]
    return line if max_words is None else cut(line, max_words)


def cut(line: str, max_words: int) -> str:
    """The whole sentences at the line's start that have `max_words` words or fewer together.

    Where the first one alone has more: up to its last comma, semicolon or colon within them, or
    else the first `max_words` words.
    """
    words = line.split()
    if len(words) <= max_words:
        return line
    head = " ".join(words[:max_words])
    if ends := _ends(head):
        return head[: ends[-1]]
    clauses = [found.start() for found in _CLAUSE_END.finditer(head + " ")]
    return head[: clauses[-1]] if clauses else head


def dressed(caption: str, prefix: str, suffix: str) -> str:
    """The caption between prefix and suffix, which are set off by a space as words are."""
    before = f"{prefix} " if prefix and not prefix[-1].isspace() else prefix
    apart = suffix and (suffix[0].isalnum() or suffix[0] in "#@(\"'<[{")
    return f"{before}{caption}{' ' if apart else ''}{suffix}".strip()


def appended(held: str, text: str) -> str:
    """`text` behind what is held: behind a sentence as the next one, behind tags as another."""
    held = held.rstrip()
    return f"{held}{' ' if held[-1] in '.!?…,;:' else ', '}{text}"


def _ends(line: str) -> list[int]:
    """Where sentences end in a line."""
    ends = [found.end() for found in _SENTENCE_END.finditer(line)]
    return [end for end in ends if not _ABBREVIATED.search(line[:end])]
