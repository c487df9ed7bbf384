"""What passes between a session and the engine: rows to decode, and what came of them.

def step(self, token) -> Decodes:          # a session's side
    decoded = yield Batch(...)
    use(decoded.logits)

engine.step(session, token)            # the engine's side: decodes each batch that comes

Batches of several sessions may share one decode (`cmg_gguf.engine.merge`); none of them notices.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from cmg_gguf import _core
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.engine.context import Branch, Context
from cmg_gguf.prompt.segments import ImageSegment

NONE = -1
"""No image token, no slot, no residual."""


@dataclass(frozen=True, eq=False)
class RowPlan:
    """What the graph patch does with the rows of a batch.

    part: what they share: policy, layers, selections. rows: (n_rows, 4) int32: image token, slot
    observed into, slot hidden, residual; NONE where there is none. fork_layer: first layer that all
    rows run through; 0 = no fork. n_below: rows computed below it: the first of the batch.
    """

    part: _core.Part
    rows: IntArray
    fork_layer: int = 0
    n_below: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """Text rows for one decode. tokens, positions, seqs: (n_rows,) int32. outputs: (n_rows,) bool,
    the rows whose logits are wanted. plan: None = nothing."""

    context: Context
    tokens: IntArray
    positions: IntArray
    seqs: IntArray
    outputs: npt.NDArray[np.bool_]
    plan: RowPlan | None
    is_image: ClassVar[bool] = False

    @property
    def n_rows(self) -> int:
        return len(self.tokens)

    @property
    def fork_layer(self) -> int:
        """Where rows enter that are not computed below it; 0 = all are computed from the start."""
        return self.plan.fork_layer if self.plan is not None else 0

    @property
    def n_below(self) -> int:
        """Rows computed from the start: the first."""
        return self.plan.n_below if self.plan is not None and self.fork_layer else self.n_rows


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Rows `first` to `first + n_rows` - 1 of an encoded image, which begins at `position`."""

    branch: Branch
    image: ImageSegment
    first: int
    n_rows: int
    position: int
    plan: RowPlan | None
    is_image: ClassVar[bool] = True

    @property
    def context(self) -> Context:
        return self.branch.context


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a batch gave. logits: (n_vocab,) float32 of each row that wanted them, the receiver's
    own. seconds: wall-clock time it took; None where other sessions' rows were in the decode."""

    logits: tuple[FloatArray, ...]
    seconds: float | None


Decodes: TypeAlias = Generator[Batch | ImageBatch, Decoded, None]
"""Yields batches, and is sent what came of each. Closed, or thrown into, where a decode fails."""


def text_batch(
    branch: Branch,
    tokens: Sequence[int] | IntArray,
    positions: Sequence[int] | IntArray,
    plan: RowPlan | None,
    *,
    wanted: int | None = -1,
) -> Batch:
    """Rows of one branch. wanted: the row whose logits are, as an index; None = none."""
    outputs = np.zeros(len(tokens), bool)
    if wanted is not None:
        outputs[wanted] = True
    return Batch(
        branch.context,
        np.asarray(tokens, np.int32),
        np.asarray(positions, np.int32),
        np.full(len(tokens), branch.seq, np.int32),
        outputs,
        plan,
    )


def copied_row(
    branches: Sequence[Branch], token: int, positions: Sequence[int], plan: RowPlan | None
) -> Batch:
    """One token in several sequences of one context, each at its own position."""
    n = len(branches)
    return Batch(
        branches[0].context,
        np.full(n, token, np.int32),
        np.array(positions, np.int32),
        np.array([branch.seq for branch in branches], np.int32),
        np.ones(n, bool),
        plan,
    )
