"""From the bytes of tokens to text that may be shown, piece by piece.

    utf8, stops = Utf8Stream(), StopStrings(["</s>"])
    for piece in token_bytes:
        text, stopped = stops.feed(utf8.feed(piece))
        show(text)

How the input is cut into pieces never changes what comes out in total. Both classes know nothing
of tokens and models.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from cmg_gguf.request import checked_stops


class Utf8Stream:
    """Decodes UTF-8 that arrives in pieces: only whole code points come out.

    All pieces together give `bytes.decode("utf-8", errors="replace")` of all bytes together.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def is_within(self) -> bool:
        """Whether a character was begun and is not complete."""
        return bool(self._decoder.getstate()[0])

    def feed(self, data: bytes) -> str:
        """Return the text that `data` completes; an unfinished sequence is held back.

        Bytes that can be no UTF-8 become U+FFFD.
        """
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return what was held back, as U+FFFD, and start afresh."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class StopStrings:
    """Cuts a text that arrives in pieces before the first stop string that it completes.

    The first is the one whose last character comes first; of two that end together, the longer.
    So the cut does not depend on what would have followed. Without stop strings all passes.

    Raises:
        SamplingError: a stop string is empty or no string.
    """

    def __init__(self, stops: str | Sequence[str] | None = ()) -> None:
        self._stops = checked_stops(stops)
        self._held = ""
        self._match: str | None = None

    @property
    def match(self) -> str | None:
        """The stop string that was met; None before."""
        return self._match

    def feed(self, text: str) -> tuple[str, bool]:
        """Return the text that may be shown now, and whether a stop string was met.

        A suffix that may still become a stop string is held back. Of the stop string and of what
        follows it nothing is returned: once stopped, every call returns ("", True).
        """
        if self._match is not None:
            return "", True
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, start, self._match = min(ends)
            self._held = ""
            return text[:start], True
        cut = len(text) - n_begun(text, self._stops)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """Return what was held back: no more text comes, so it is no stop string."""
        text, self._held = self._held, ""
        return text


def n_begun(text: str, marks: Sequence[str]) -> int:
    """Return the length of the longest suffix that one of `marks` begins with, and goes on."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-n:]) for mark in marks):
            return n
    return 0
