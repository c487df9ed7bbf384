"""What passes between a session and the engine: rows to decode, and what came of them.

def step(self, token) -> Decodes:          # a session's side
    decoded = yield Batch(...)
    use(decoded.logits)

engine.step(session, token)            # the engine's side: decodes each batch that comes
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cmg_gguf import _core
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.engine.context import Branch, Context
from cmg_gguf.prompt.segments import ImageSegment


@dataclass(frozen=True, eq=False)
class Batch:
    """Text rows for one decode. tokens, positions, seqs: (n_rows,) int32. outputs: (n_rows,) bool,
    the rows whose logits are wanted. plan: what the graph patch does with them; None = nothing."""

    context: Context
    tokens: IntArray
    positions: IntArray
    seqs: IntArray
    outputs: npt.NDArray[np.bool_]
    plan: _core.Plan | None

    @property
    def n_rows(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """The rows of one encoded image, from `position` on."""

    branch: Branch
    image: ImageSegment
    position: int
    plan: _core.Plan | None

    @property
    def n_rows(self) -> int:
        return self.image.n_tokens


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a batch gave. logits: (n_vocab,) float32 of each row that wanted them, views that are
    valid until the context's next decode. seconds: wall-clock time it took."""

    logits: tuple[FloatArray, ...]
    seconds: float


Decodes: TypeAlias = Generator[Batch | ImageBatch, Decoded, None]
"""Yields batches, and is sent what came of each. Closed where a decode fails."""


def text_batch(
    branch: Branch,
    tokens: Sequence[int] | IntArray,
    positions: Sequence[int] | IntArray,
    plan: _core.Plan | None,
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
    branches: Sequence[Branch], token: int, positions: Sequence[int], plan: _core.Plan | None
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
