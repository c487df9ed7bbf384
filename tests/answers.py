"""Answers that no model made: a text and its words, from what tokens say."""

from __future__ import annotations

from typing import NamedTuple

from cmg_gguf.answer.words import words_of
from cmg_gguf.reply import Word


class Answer(NamedTuple):
    text: str
    words: tuple[Word, ...]


def answer(*pieces: str | bytes) -> Answer:
    """pieces: what each token says."""
    data = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    whole = b"".join(data).decode()
    text = whole.lstrip()
    return Answer(text, words_of(data, text, stop=len(whole)))
