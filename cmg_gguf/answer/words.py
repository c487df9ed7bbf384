"""The words of an answer's text, and the tokens that they come from.

words_of([b" A", b" f", b"ork"], "A fork", stop=7)  # stop: where the text ends in what was said
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cmg_gguf.answer.text import Utf8Stream
from cmg_gguf.reply import Evidence, Word

_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Of scripts without spaces: Thai, kana, Han."""
_LETTERS = rf"[^\W_{_UNSPACED}]+"
WORD = re.compile(rf"[{_UNSPACED}]|{_LETTERS}(?:['\u2019\-]{_LETTERS})*")


def words_of(
    pieces: Sequence[bytes],
    text: str,
    *,
    stop: int,
    evidence: Sequence[Evidence] = (),
) -> tuple[Word, ...]:
    """The words of `text`.

    pieces: the bytes of all tokens. stop: where the text ends in what all of them say, in
    characters. evidence: of each token, or none.
    """
    first, last = _tokens_of(pieces)
    offset = stop - len(text)
    words = []
    for match in WORD.finditer(text):
        begun, ended = first[offset + match.start()], last[offset + match.end() - 1]
        score = evidence[begun].score if evidence else None
        words.append(Word(match[0], match.start(), match.end(), begun, ended, score))
    return tuple(words)


def _tokens_of(pieces: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """Of each character that the pieces say: the piece in which it begins, and that in which it is
    complete."""
    characters = Utf8Stream()
    first: list[int] = []
    last: list[int] = []
    begun = 0
    for i, piece in enumerate(pieces):
        was_within = characters.is_within
        n = len(characters.feed(piece))
        for k in range(n):
            first.append(begun if was_within and k == 0 else i)
            last.append(i)
        if characters.is_within and (n or not was_within):
            begun = i
    for _ in characters.flush():
        first.append(begun)
        last.append(len(pieces) - 1)
    return first, last
