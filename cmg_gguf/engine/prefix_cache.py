"""The prefix cache: a prompt goes on from a kept one that begins like it.

A kept prefix is a pair of sequences beside those that an answer works in. Sharing and keeping are
metadata: no KV cell is copied, and a prefix holds nothing but cells that an answer had taken.

What may be reused of it, exactly:

    original branch    the common rows, but none that must be observed anew, and never the last row
    degraded branch    the common rows of the kept answer's own prompt that it decoded, if they
                       depend on nothing but the rows before them and the same settings
                       (`PromptRows.variant`); then no common row need be observed

An answer's rows in the degraded branch are not kept: they may not have been decoded at all, and
neither may the prompt's (`cmg_gguf.engine.steps`). Rows that were left out below a fork are of use
to those that are left out there too (`cmg_gguf.engine.fork`).

Kept prefixes give way: the one that was not used for longest first, when the cells that may be kept
are full, or when an answer needs room. Of those whose images a new prompt begins with, the new one
takes the place.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from cmg_gguf.engine.context import Branch, Branches
from cmg_gguf.engine.prefixes import (
    NO_CELLS,
    Cells,
    Item,
    Prefix,
    PrefixStore,
    head,
    items_of,
    n_common,
    n_image_rows,
    n_positions,
    n_rows,
)
from cmg_gguf.engine.rows import PromptRows
from cmg_gguf.prompt.segments import Prompt


@dataclass(frozen=True, order=True)
class Start:
    """Rows that a prompt finds decoded: by the original branch, and by the degraded one."""

    original: int = 0
    degraded: int = 0


@dataclass
class Lease:
    """What an answer holds, and how much of it lies in kept prefixes too. Ended by `end` or `keep`.

    items: what the original branch has decoded or will, prompt and answer. original, degraded:
    cells that a prefix holds as well. n_beside: KV cells that prefixes hold beside this answer's.
    n_prompt: rows of the prompt; the degraded branch is only known to be whole as far as that, once
    `is_complete`: it has decoded its part of the prompt.
    """

    start: Start
    items: list[Item]
    n_prompt: int
    variant: Hashable
    first_own: int
    original: Cells
    degraded: Cells
    n_beside: int = 0
    is_complete: bool = False

    @property
    def n_degraded(self) -> int:
        """Rows that the degraded branch holds and that can be kept."""
        if self.variant is None:
            return 0
        return self.n_prompt if self.is_complete else len(self.degraded)

    @property
    def cells(self) -> Cells:
        """Cells shared with a prefix, of both branches."""
        return np.concatenate([self.original, self.degraded])


class PrefixCache:
    """The kept prefixes of an engine, in the contexts of its branches.

    slots: pairs of sequences that prefixes may lie in, of the original and of the degraded branch;
    none = nothing is kept. max_cells: KV cells that all prefixes together may hold. In two contexts
    only the original branch is kept.
    """

    def __init__(
        self, branches: Branches, slots: Sequence[tuple[int, int]] = (), max_cells: int = 0
    ) -> None:
        self._original, self._degraded = branches.original, branches.degraded
        self._paired = branches.paired
        self._slots = tuple(slots)
        self._max_cells = max_cells
        self._store = PrefixStore(len(self._slots))
        self._n_named = 0
        self._unsettled: set[int] = set()

    @property
    def keeps(self) -> bool:
        """Whether anything is ever kept."""
        return bool(self._slots) and self._max_cells > 0

    @property
    def n_prefixes(self) -> int:
        """How many are kept."""
        return len(self._store)

    @property
    def n_cells(self) -> int:
        """KV cells they hold; what they share with each other counts once."""
        return self._store.n_cells()

    def lease(self, prompt: Prompt, rows: PromptRows) -> Lease:
        """Shares what is kept of a prompt into the empty sequences of an answer.

        The degraded branch gets rows only where it has some of its own.
        """
        items = items_of(prompt)
        start, prefix = self._best(items, rows)
        original = degraded = NO_CELLS
        if prefix is not None:
            self._store.touch(prefix)
            self._share(prefix, start)
            original = prefix.original[: start.original]
            degraded = prefix.degraded[: start.degraded]
        variant, first_own = self._variant(rows), rows.first_masked
        lease = Lease(start, list(items), rows.n, variant, first_own, original, degraded)
        lease.n_beside = self._store.n_cells(beside=lease.cells)
        return lease

    def make_room(self, n_cells: int, lease: Lease | None = None) -> None:
        """Lets prefixes go until an answer can hold n_cells in all."""
        cells = NO_CELLS if lease is None else lease.cells
        n_beside = self._store.n_cells() if lease is None else lease.n_beside
        while n_cells + n_beside > self._original.context.n_ctx:
            if (oldest := self._store.oldest) is None:
                return
            self._let_go(oldest)
            n_beside = self._store.n_cells(beside=cells)
            if lease is not None:
                lease.n_beside = n_beside

    def keep(self, lease: Lease) -> None:
        """Keeps what an answer has decoded. The original branch must be whole: every row of every
        layer."""
        if not self.keeps or not self._is_whole(lease):
            return
        items, original, degraded = self._fitting(lease)
        if not items:
            return
        for prefix in self._store.superseded(items):
            self._let_go(prefix)
        cells = np.union1d(original, degraded)
        while (slot := self._store.free_slot) is None or (
            len(cells) + self._store.n_cells(beside=cells) > self._max_cells
        ):
            oldest = self._store.oldest
            assert oldest is not None
            self._let_go(oldest)
        self._unsettled.add(slot)
        self._move(self._original, self._original.seq, self._slots[slot][0], items)
        if len(degraded):
            shared = head(items, len(degraded))
            self._move(self._degraded, self._degraded.seq, self._slots[slot][1], shared)
        self._store.add(Prefix(slot, items, original, degraded, lease.variant))
        self._unsettled.discard(slot)

    def settle(self) -> None:
        """Clears what was left unfinished by an interrupted `keep`."""
        for slot in tuple(self._unsettled):
            self._clear(slot)

    def forget(self) -> None:
        """Lets all prefixes go."""
        for prefix in self._store:
            self._let_go(prefix)

    def _best(self, items: tuple[Item, ...], rows: PromptRows) -> tuple[Start, Prefix | None]:
        best: tuple[Start, Prefix | None] = Start(), None
        for prefix in self._store:
            start = self._start_from(prefix, items, rows)
            if start > best[0] and self._holds_all(prefix):
                best = start, prefix
        return best

    def _start_from(self, prefix: Prefix, items: tuple[Item, ...], rows: PromptRows) -> Start:
        common = n_rows(items[: n_common(items, prefix.items)])
        common = min(common, rows.n - 1)
        variant = self._variant(rows)
        same = variant is not None and variant == prefix.variant and len(prefix.degraded)
        both = min(common, len(prefix.degraded))
        if same and both > rows.first_masked:
            return Start(both, both)
        return Start(min(common, rows.first_observed))

    def _variant(self, rows: PromptRows) -> Hashable:
        return rows.variant if self._paired else None

    def _holds_all(self, prefix: Prefix) -> bool:
        """Whether no cell was lost behind a sliding window; lets it go otherwise."""
        seqs = self._slots[prefix.slot]
        whole = self._original.context.is_whole(seqs[0]) and (
            not len(prefix.degraded) or self._degraded.context.is_whole(seqs[1])
        )
        if not whole:
            self._let_go(prefix)
        return whole

    def _is_whole(self, lease: Lease) -> bool:
        branches = [self._original]
        if self._paired and lease.n_degraded:
            branches.append(self._degraded)
        return all(branch.context.is_whole(branch.seq) for branch in branches)

    def _share(self, prefix: Prefix, start: Start) -> None:
        seqs = self._slots[prefix.slot]
        self._move(self._original, seqs[0], self._original.seq, head(prefix.items, start.original))
        if start.degraded:
            shared = head(prefix.items, start.degraded)
            self._move(self._degraded, seqs[1], self._degraded.seq, shared)

    @staticmethod
    def _move(branch: Branch, source: int, target: int, items: tuple[Item, ...]) -> None:
        """Makes `target` share the rows of `items`, and what is known of their images."""
        branch.context.share(source, target, n_positions(items))
        branch.context.patch.copy_image_tokens(source, target, n_image_rows(items))

    def _fitting(self, lease: Lease) -> tuple[tuple[Item, ...], Cells, Cells]:
        """As much of an answer as may be kept: (items, original, degraded)."""
        items = tuple(lease.items)
        original = self._named(lease.original, n_rows(items))
        degraded = NO_CELLS
        if lease.n_degraded > 0:
            known = lease.degraded
            if not len(known):
                known = original[: lease.first_own]
            degraded = self._named(known, lease.n_degraded)
            if len(np.union1d(original, degraded)) > self._max_cells:
                degraded = NO_CELLS
        if not len(degraded):
            items = head(items, self._max_cells)
        return items, original[: n_rows(items)], degraded

    def _named(self, known: Cells, n: int) -> Cells:
        """The cells of n rows: those known, and new names for the rest."""
        first = self._n_named
        self._n_named += n - len(known)
        return np.concatenate([known, np.arange(first, self._n_named, dtype=np.int64)])

    def _let_go(self, prefix: Prefix) -> None:
        self._unsettled.add(prefix.slot)
        self._store.remove(prefix)
        self._clear(prefix.slot)

    def _clear(self, slot: int) -> None:
        original, degraded = self._slots[slot]
        branches = [(self._original, original), (self._degraded, degraded)]
        for branch, seq in branches[: 2 if self._paired else 1]:
            branch.context.truncate(seq, 0)
            branch.context.patch.truncate_image_tokens(seq, 0)
        self._unsettled.discard(slot)
