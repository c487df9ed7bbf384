"""What a model thinks, told apart from what it answers, as text arrives in pieces.

    apart = Reasoning("</think>")           # the prompt has opened it
    apart.feed("A fork? ")                  # [("A fork?", True)]
    apart.feed("I see one.</think>\\n\\nYes") # [(" I see one.", True), ("Yes", False)]

How the text is cut into pieces never changes what comes out in total. Knows nothing of tokens.
"""

from __future__ import annotations

from typing import Literal

from cmg_gguf.answer.text import n_begun
from cmg_gguf.prompt.reasoning import MARKS
from cmg_gguf.sampling import Sampling

State = Literal["before", "within", "behind"]


class Reasoning:
    """Splits an answer into reasoning and text: pairs of some text and whether it is reasoning.

    Reasoning stands in front: from where the prompt or the answer's first characters open it up to
    its closing mark, or to the end where there is none. Marks are neither, nor is the white space
    at both ends of the reasoning and in front of the text behind it. A mark that comes later is
    text. An answer without reasoning passes as it is.
    """

    def __init__(
        self, closing: str = "", sampling: Sampling | None = None, *, is_begun: bool = False
    ) -> None:
        """closing: the mark that closes what the prompt has opened; "" = it has opened nothing.

        sampling: under a schema, or a grammar that does not spell the closing mark, the answer can
        have no reasoning: all of it is text. is_begun: the prompt ends with the beginning of the
        reasoning that it has opened, or else of the text: what comes goes on from that.
        """
        sampling = Sampling() if sampling is None else sampling
        if sampling.response_format is not None:
            self._opens = dict[str, str]()
        elif sampling.grammar is not None:
            grammar = str(sampling.grammar)
            self._opens = {mark: close for mark, close in MARKS.items() if close in grammar}
        else:
            self._opens = MARKS
        self._closing = closing if closing in self._opens.values() else ""
        before: State = "before" if self._opens and not is_begun else "behind"
        self._state: State = "within" if self._closing else before
        self._held = ""
        self._is_first = not is_begun

    @property
    def is_within(self) -> bool:
        """Whether reasoning was begun and has not been closed."""
        return self._state == "within"

    def feed(self, text: str) -> list[tuple[str, bool]]:
        """What of the text may be shown now; what may still be a mark is held back."""
        text, self._held = self._held + text, ""
        if self._state == "before":
            text = self._begun(text)
        if self._state == "within":
            return self._within(text)
        return self._behind(text) if self._state == "behind" else []

    def flush(self) -> list[tuple[str, bool]]:
        """What was held back: no more text comes, so it is no mark."""
        text, self._held = self._held, ""
        if self.is_within:
            text = text.rstrip()
        return [(text, self.is_within)] if text else []

    def _begun(self, text: str) -> str:
        """The text behind the mark that it begins with; all of it where that can be none."""
        start = text.lstrip()
        for mark, close in self._opens.items():
            if start.startswith(mark):
                self._state, self._closing = "within", close
                return start[len(mark) :]
        if any(mark.startswith(start) for mark in self._opens):
            self._held = text
        else:
            self._state, self._is_first = "behind", False
        return text

    def _within(self, text: str) -> list[tuple[str, bool]]:
        if self._is_first:
            text = text.lstrip()
        thought, mark, rest = text.partition(self._closing)
        if not mark:
            thought = text[: len(text) - n_begun(text, (self._closing,))]
        shown = thought.rstrip()
        if shown:
            self._is_first = False
        said = [(shown, True)] if shown else []
        if not mark:
            self._held = text[len(shown) :]
            return said
        self._state, self._is_first = "behind", True
        return [*said, *self._behind(rest)]

    def _behind(self, text: str) -> list[tuple[str, bool]]:
        if self._is_first:
            text = text.lstrip()
        if not text:
            return []
        self._is_first = False
        return [(text, False)]
