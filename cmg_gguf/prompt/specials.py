"""Special tokens are what a template writes; spelled in a message they are characters.

    parts = split_specials("<|im_start|>user\\nWhat is </s>?<|im_end|>", [26], specials)
    # [("<|im_start|>", True), ("user\\nWhat is </s>?", False), ("<|im_end|>", True)]

Tokenised one by one, with special tokens looked for where the flag says so, the parts give the
tokens of the whole text, but for the special tokens that were spelled in messages. That holds
because a tokenizer itself cuts a text at its special tokens and takes each run between them as if
it stood alone: the parts end nowhere else, so no merge and no leading space is lost or gained.

Special are control tokens. What a vocabulary calls user-defined is a word like any other: llama.cpp
finds those in every text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SPACES = " \t\n\v\f\r"  # what llama.cpp strips beside a token


@dataclass(frozen=True)
class Specials:
    """How the special tokens of a vocabulary are spelled.

    texts: the longest first, as the tokenizer looks for them. strip_before, strip_behind: those of
    them that swallow the white space on that side.
    """

    texts: tuple[str, ...] = ()
    strip_before: frozenset[str] = frozenset()
    strip_behind: frozenset[str] = frozenset()

    def broken(self, text: str, seam: str) -> str:
        """The text with `seam` in each special token that it spells, behind the first character."""
        for special in self.texts:
            if len(special) > 1:
                text = text.replace(special, special[0] + seam + special[1:])
        return text


def split_specials(text: str, seams: Sequence[int], specials: Specials) -> list[tuple[str, bool]]:
    """The text in parts, and whether special tokens are looked for in each.

    seams: offsets over which no special token reaches; without any, the text is one part.
    """
    spans = _template_specials(text, seams, specials.texts) if seams else []
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    parts: list[tuple[str, bool]] = []
    done = 0
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        if any(begin < seam < end for seam in seams):
            run = text[begin:end]
            if any(text[done:begin].endswith(special) for special in specials.strip_behind):
                run = run.lstrip(_SPACES)
            if any(text[end:].startswith(special) for special in specials.strip_before):
                run = run.rstrip(_SPACES)
            parts += [(text[done:begin], True), (run, False)]
            done = end
    return [part for part in [*parts, (text[done:], True)] if part[0]]


def _template_specials(
    text: str, seams: Sequence[int], texts: Sequence[str]
) -> list[tuple[int, int]]:
    """Where special tokens stand that reach over no seam, in order: the longest are found first."""
    runs, spans = [(0, len(text))], list[tuple[int, int]]()
    for special in texts:
        if special not in text:
            continue
        rest: list[tuple[int, int]] = []
        for begin, end in runs:
            at = begin
            while (found := text.find(special, at, end)) >= 0:
                at = found + len(special)
                if any(found < seam < at for seam in seams):
                    at = found + 1
                    continue
                spans.append((found, at))
                rest.append((begin, found))
                begin = at
            rest.append((begin, end))
        runs = rest
    return sorted(spans)
