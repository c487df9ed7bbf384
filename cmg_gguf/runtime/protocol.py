"""What the engine needs of a model: the one seam between arrays and llama.cpp.

`Context` here is implemented over llama.cpp by `cmg_gguf.runtime.context`, and by fakes in tests.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cmg_gguf import _core

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TextSegment:
    """A run of text tokens of a prompt. tokens: (n,) int32."""

    tokens: IntArray

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
    lets image tokens see later ones, so they must be decoded in one micro-batch. embd: (n_tokens,
    n_embd) float32 once encoded. chunk: llama.cpp's own description of the image. key: stands for
    all that enters its rows, so that equal keys mean equal images; None = not known.
    """

    n_tokens: int
    n_pos: int
    non_causal: bool
    chunk: Any
    embd: FloatArray | None = None
    key: Hashable = None

    @property
    def needs_ubatch(self) -> int:
        """Rows that one micro-batch must have room for."""
        return self.n_tokens if self.non_causal else 1


Segment = TextSegment | ImageSegment


@dataclass(frozen=True, eq=False)
class Prompt:
    """A tokenised prompt: text and image segments in order."""

    segments: tuple[Segment, ...]

    @property
    def n_tokens(self) -> int:
        return sum(s.n_tokens for s in self.segments)

    @property
    def n_image_tokens(self) -> int:
        return sum(s.n_tokens for s in self.segments if isinstance(s, ImageSegment))

    @property
    def is_image(self) -> npt.NDArray[np.bool_]:
        """(n_tokens,) bool: which rows are image tokens."""
        runs = [np.full(s.n_tokens, isinstance(s, ImageSegment)) for s in self.segments]
        return np.concatenate(runs) if runs else np.zeros(0, bool)


class Context(Protocol):
    """A KV cache with several sequences, and the graph patch on its decodes."""

    n_ctx: int
    """KV cells, shared by all sequences."""
    n_ubatch: int
    """Most rows of one decode."""
    n_layer: int
    n_vocab: int
    patch: _core.GraphPatch

    def decode(
        self,
        tokens: IntArray,
        positions: IntArray,
        seqs: IntArray,
        *,
        outputs: npt.NDArray[np.bool_],
        plan: _core.Plan | None,
    ) -> None:
        """Decodes up to n_ubatch rows in one micro-batch; all arrays (n_rows,)."""
        ...

    def decode_image(
        self, image: ImageSegment, position: int, seq: int, plan: _core.Plan | None
    ) -> None:
        """Decodes an encoded image into `seq` from `position` on."""
        ...

    def logits_address(self, row: int) -> int:
        """Address of the (n_vocab,) float32 logits of batch row `row`, until the next decode."""
        ...

    def share(self, source: int, target: int, n_pos: int) -> None:
        """Makes `target` share the first n_pos positions of `source`, and nothing else."""
        ...

    def share_more(self, source: int, target: int, start: int, stop: int) -> None:
        """Makes `target` share positions start to stop - 1 of `source` too."""
        ...

    def truncate(self, seq: int, n_pos: int) -> None:
        """Drops positions n_pos and up of `seq`."""
        ...

    def is_whole(self, seq: int) -> bool:
        """Whether `seq` still holds all of its positions from 0 on: a window lets them go."""
        ...
