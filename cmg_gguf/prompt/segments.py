"""A tokenised prompt: runs of text tokens and images, in order. Values only."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cmg_gguf.arrays import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class TextSegment:
    """A run of text tokens of a prompt.

    tokens: (n,) int32. inside_picture: the model's own, between two tiles of one picture: line
    breaks, the tile's place, marks of the overview. Nobody wrote it, and it asks nothing.
    """

    tokens: IntArray
    inside_picture: bool = False

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_pos(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class ImageSegment:
    """One image (or one tile of it) of a prompt.

    n_tokens: image tokens. n_pos: positions they take (fewer under M-RoPE). non_causal: the model
    lets image tokens see later ones, so they must be decoded in one micro-batch.
    chunk: llama.cpp's own description of the image, without pixels. shares_positions: the model's
    positions have several parts (M-RoPE). embd: (n_tokens, n_embd) float32 once encoded.
    key: stands for all that enters its rows, so that equal keys mean equal images; None = not
    known. source: what it is encoded from; None once it is.
    """

    n_tokens: int
    n_pos: int
    non_causal: bool
    chunk: Any
    shares_positions: bool = False
    embd: FloatArray | None = None
    key: Hashable = None
    source: Any = None

    @property
    def needs_ubatch(self) -> int:
        """Rows that one micro-batch must have room for."""
        return self.n_tokens if self.non_causal else 1


Segment = TextSegment | ImageSegment


@dataclass(frozen=True, eq=False)
class Prompt:
    """A tokenised prompt: text and image segments in order.

    salt: prompts of different salts begin with nothing alike, so nobody learns from what is kept
    what another has asked. closing: the mark that closes the reasoning within which the prompt
    ends, see `closing_mark`. is_begun: the prompt ends with the beginning of the answer.
    """

    segments: tuple[Segment, ...]
    salt: str | None = None
    closing: str = ""
    is_begun: bool = False

    @property
    def n_tokens(self) -> int:
        return sum(s.n_tokens for s in self.segments)

    @property
    def n_image_tokens(self) -> int:
        return sum(s.n_tokens for s in self.segments if isinstance(s, ImageSegment))

    @property
    def is_image(self) -> npt.NDArray[np.bool_]:
        """(n_tokens,) bool: which rows are image tokens."""
        return self._rows_of(lambda segment: isinstance(segment, ImageSegment))

    @property
    def in_picture(self) -> npt.NDArray[np.bool_]:
        """(n_tokens,) bool: which rows belong to a picture: image tokens, and the text between its
        tiles."""
        return self._rows_of(lambda s: isinstance(s, ImageSegment) or s.inside_picture)

    def _rows_of(self, chosen: Callable[[Segment], bool]) -> npt.NDArray[np.bool_]:
        runs = [np.full(segment.n_tokens, chosen(segment)) for segment in self.segments]
        return np.concatenate(runs) if runs else np.zeros(0, bool)
