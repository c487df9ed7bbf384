"""Where the branches of an answer live: the one seam between the engine and llama.cpp.

`Context` is implemented over llama.cpp by `cmg_gguf.llama.context`, and by fakes in tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cmg_gguf import _core
from cmg_gguf.arrays import IntArray
from cmg_gguf.prompt.segments import ImageSegment


class Context(Protocol):
    """A KV cache with several sequences, and the graph patch on its decodes."""

    n_ctx: int
    """KV cells, shared by all sequences."""
    n_ubatch: int
    """Most rows of one decode."""
    n_layer: int
    attention_layers: tuple[int, ...]
    """Layers that attend, ascending: in the others there is nothing to mask."""
    n_vocab: int
    merges: bool
    """Whether rows of several sequences, of different numbers each, may share a decode. Else only
    one row of each may."""
    has_state: bool
    """Whether some layers keep a state of all rows of a sequence instead of a row for each. It is
    shared where it stands: at a sequence's newest row. It cannot be cut back."""
    spare_seq: int
    """A sequence that nobody works in: for rows of no use."""
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
        self,
        image: ImageSegment,
        position: int,
        seq: int,
        plan: _core.Plan | None,
        *,
        first: int = 0,
        n_rows: int | None = None,
    ) -> None:
        """Decodes n_rows rows of an encoded image from row `first` on, or all, into `seq`; the
        whole image begins at `position`. Up to n_ubatch rows, in one micro-batch."""
        ...

    def logits_address(self, row: int) -> int:
        """Address of the (n_vocab,) float32 logits of batch row `row`, until the next decode."""
        ...

    def share(self, source: int, target: int, n_pos: int) -> None:
        """Makes `target` share the first n_pos positions of `source`, and nothing else; with a
        state these must be all of its positions."""
        ...

    def share_more(self, source: int, target: int, start: int, stop: int) -> None:
        """Makes `target` share positions start to stop - 1 of `source` too."""
        ...

    def set_aside(self, source: int, target: int) -> None:
        """Makes `target` hold the state of `source` as it stands, and nothing else."""
        ...

    def take_state(self, source: int, target: int, n_pos: int) -> None:
        """Gives `target`, which has n_pos positions, the state that was set aside in `source` in
        place of its own; `source` is empty then."""
        ...

    def truncate(self, seq: int, n_pos: int) -> None:
        """Drops positions n_pos and up of `seq`."""
        ...

    def is_whole(self, seq: int) -> bool:
        """Whether `seq` still holds all of its positions from 0 on: a window lets them go."""
        ...


@dataclass(frozen=True)
class Branch:
    """Where a branch lives: a sequence of a context."""

    context: Context
    seq: int


@dataclass(frozen=True)
class Branches:
    """Both branches of an answer: in one context ("pair"), or in one each ("contexts").

    aside: a sequence of the degraded branch's context, where a state may be set aside.
    """

    original: Branch
    degraded: Branch
    aside: int | None = None

    @property
    def paired(self) -> bool:
        """Whether they share a context, and so can share KV cells."""
        return self.original.context is self.degraded.context
