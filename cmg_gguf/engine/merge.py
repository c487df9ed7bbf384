"""Batches of several sessions in one decode, and each row's way back.

    merged = Merged(batches, padding)      # of one context, which agree on where rows enter
    ... decode merged.tokens, merged.plan ...
    merged.wanted(i)                       # the rows whose logits batches[i] is to get

A fork computes the first rows of a decode from the start and lets the others enter at a layer. So
the rows of all batches that are computed from the start come first, in the order of the batches,
then those that enter. Rows that are all computed go with any fork; two forks at different layers
do not go together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cmg_gguf import _core
from cmg_gguf.arrays import IntArray
from cmg_gguf.engine.batch import NONE, Batch, RowPlan
from cmg_gguf.engine.fork import FORK_ROWS


class Merged:
    """One decode's rows. tokens, positions, seqs: (n_rows,) int32, outputs: (n_rows,) bool.

    n_below: rows computed from the start. plan: for the graph patch; None = nothing.
    """

    def __init__(self, batches: Sequence[Batch], n_padding: int = 0, padding_seq: int = 0) -> None:
        """n_padding: rows of no use at the end, in a sequence that is empty and of nobody."""
        sizes = [batch.n_rows for batch in batches]
        starts = np.cumsum([0, *sizes])
        enters = np.concatenate([np.arange(b.n_rows) >= b.n_below for b in batches])
        order = np.argsort(enters, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self._places = [
            place[start : start + n] for start, n in zip(starts[:-1], sizes, strict=True)
        ]
        last = np.full(n_padding, order[-1])
        rows = np.concatenate([order, last])
        padding = np.arange(len(rows)) >= len(order)
        self.n_rows = len(rows)
        self.tokens: IntArray = np.concatenate([b.tokens for b in batches])[rows]
        self.positions: IntArray = np.concatenate([b.positions for b in batches])[rows]
        self.seqs: IntArray = np.concatenate([b.seqs for b in batches])[rows]
        self.outputs: npt.NDArray[np.bool_] = np.concatenate([b.outputs for b in batches])[rows]
        self.seqs[padding] = padding_seq
        self.positions[padding] = np.arange(n_padding)
        self.outputs[padding] = False
        fork_layer = max(batch.fork_layer for batch in batches)
        self.n_below = int((~enters).sum()) if enters.any() else self.n_rows
        self.plan = self._plan(batches, rows, padding, fork_layer)

    def wanted(self, i: int) -> list[int]:
        """Where the rows of the i-th batch lie whose logits are wanted, in their order."""
        return [int(row) for row in self._places[i] if self.outputs[row]]

    def _plan(
        self,
        batches: Sequence[Batch],
        rows: npt.NDArray[np.intp],
        padding: npt.NDArray[np.bool_],
        fork_layer: int,
    ) -> _core.Plan | None:
        parts = [batch.plan.part for batch in batches if batch.plan is not None]
        if not parts:
            return None
        n_parts = 0
        tables = []
        for batch in batches:
            tables.append(_table(batch.seqs, batch.plan, n_parts))
            n_parts += batch.plan is not None
        table = np.concatenate(tables)[rows]
        table[padding, 0] = self.seqs[padding]
        table[padding, 2:5] = NONE  # what enters a fork is all that padding takes part in
        if self.n_below == self.n_rows:
            table[padding, 1:] = NONE
        fork = _core.ForkPlan(layer=fork_layer, n_below=self.n_below) if fork_layer else None
        return _core.Plan(table, parts, fork=fork)


def single_plan(plan: RowPlan | None, seq: int) -> _core.Plan | None:
    """The plan of a batch that is decoded by itself, all rows in one sequence."""
    if plan is None:
        return None
    seqs = np.full(len(plan.rows), seq, np.int32)
    return _core.Plan(_table(seqs, plan, 0), [plan.part])


def _table(seqs: IntArray, plan: RowPlan | None, part: int) -> IntArray:
    """(n_rows, 6) int32: sequence, part, and what `RowPlan.rows` says; without a plan nothing."""
    table = np.full((len(seqs), 6), NONE, np.int32)
    table[:, 0] = seqs
    if plan is not None:
        table[:, 1], table[:, 2:] = part, plan.rows
    return table


def go_together(batches: Sequence[Batch]) -> bool:
    """Whether batches may share a decode."""
    if len(batches) == 1:
        return True
    context = batches[0].context
    if any(batch.context is not context for batch in batches):
        return False
    if not context.merges:
        seqs = np.concatenate([batch.seqs for batch in batches])
        return len(seqs) <= context.n_ubatch and len(np.unique(seqs)) == len(seqs)
    n_rows = sum(batch.n_rows for batch in batches)
    n_below = sum(batch.n_below for batch in batches)
    layers = {batch.fork_layer for batch in batches} - {0}
    if n_rows > context.n_ubatch or len(layers) > 1:
        return False
    if n_below in (0, n_rows):
        return True
    (layer,) = layers
    return n_rows <= FORK_ROWS and context.patch.fork_obstacle(layer, shrinks=True) == ""
