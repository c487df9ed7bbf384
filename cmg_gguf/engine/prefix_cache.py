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

Where layers have a state, it is kept as it stood, with the rows before it: such a prefix is reused
as a whole or not at all. So a prompt leaves several, one where each state may be of use: behind its
picture, behind both branches' prompt, and, where nothing is masked, behind its answer.

Kept prefixes give way: the one that was not used for longest first, when the cells that may be kept
are full, or when an answer needs room. Of those whose images a new prompt begins with, the new one
takes the place.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cmg_gguf.engine.context import Branches, Context
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
    salt_item,
)
from cmg_gguf.engine.rows import PromptRows
from cmg_gguf.prompt.segments import Prompt

UNREAD = "unread"
"""The variant of a degraded branch that is the original's up to its first masked row, but for a
state that never read the picture."""


@dataclass(frozen=True, order=True)
class Start:
    """Rows that a prompt finds decoded: by the original branch, and by the degraded one."""

    original: int = 0
    degraded: int = 0


@dataclass(eq=False)
class Lease:
    """What an answer holds, and how much of it lies in kept prefixes too.

    branches: the sequences it works in. items: what the original branch has decoded or will, prompt
    and answer. original, degraded: cells that a prefix held when they were shared, or holds since.
    unread: see `PromptRows.unread`. n_prompt: rows of the prompt; the degraded branch is only known
    to be whole as far as that, once `is_complete`: it has decoded its part of the prompt. cells:
    both branches', each once.
    """

    branches: Branches
    start: Start
    items: list[Item]
    n_prompt: int
    variant: Hashable
    first_own: int
    unread: bool
    original: Cells
    degraded: Cells
    is_complete: bool = False
    cells: Cells = field(init=False)

    def __post_init__(self) -> None:
        self.name(self.original, self.degraded)

    def name(self, original: Cells, degraded: Cells) -> None:
        """Says which names the cells of either branch have, as far as they have one."""
        self.original, self.degraded = original, degraded
        self.cells = np.union1d(original, degraded)

    @property
    def n_degraded(self) -> int:
        """Rows that the degraded branch holds and that can be kept."""
        if self.variant is None:
            return 0
        return self.n_prompt if self.is_complete else len(self.degraded)


class PrefixCache:
    """The kept prefixes of an engine, in the contexts of its branches.

    contexts: those of the original and of the degraded branches, the same one twice for pairs.
    slots: pairs of sequences that prefixes may lie in, of the original and of the degraded branch;
    none = nothing is kept. max_cells: KV cells that all prefixes together may hold. In two contexts
    only the original branch is kept.
    """

    def __init__(
        self,
        contexts: tuple[Context, Context],
        slots: Sequence[tuple[int, int]] = (),
        max_cells: int = 0,
    ) -> None:
        self._contexts = contexts
        self._paired = contexts[0] is contexts[1]
        self._has_state = contexts[0].has_state
        self._slots = tuple(slots)
        self._max_cells = max_cells
        self._store = PrefixStore(len(self._slots))
        self._leases: list[Lease] = []
        self._n_changes = 0  # one more behind each
        self._counted = (-1, 0)
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

    def lease(self, prompt: Prompt, rows: PromptRows, branches: Branches) -> Lease:
        """Shares what is kept of a prompt into the empty sequences of an answer, until `end`.

        The degraded branch gets rows only where it has some of its own.
        """
        items = items_of(prompt)
        start, prefix = self._best(items, rows)
        original = degraded = NO_CELLS
        if prefix is not None:
            self._store.touch(prefix)
            self._share(prefix, start, branches)
            original = prefix.original[: start.original]
            degraded = prefix.degraded[: start.degraded]
        lease = Lease(
            branches,
            start,
            list(items),
            rows.n,
            self._variant(rows),
            rows.first_masked,
            self._paired and rows.unread,
            original,
            degraded,
        )
        self._leases.append(lease)
        self._n_changes += 1
        return lease

    def n_held(self) -> int:
        """KV cells that prefixes hold and answers share with them, each once.

        From any thread: a count is of the changes before it began, so that one which another
        thread has made meanwhile is not taken for today's.
        """
        n_changes, counted = self._n_changes, self._counted
        if counted[0] == n_changes:
            return counted[1]
        held = [self._store.cells, *(lease.cells for lease in self._leases)]
        n_held = len(np.unique(np.concatenate(held)))
        self._counted = n_changes, n_held
        return n_held

    def n_leased(self, prompt: Prompt | None, rows: PromptRows | None) -> tuple[int, int]:
        """KV cells with a name that answers hold, each once, and as many as one to `prompt` would
        add to them; and those that it would share with a prefix."""
        claimed = NO_CELLS
        if prompt is not None and rows is not None:
            start, prefix = self._best(items_of(prompt), rows)
            if prefix is not None:
                parts = prefix.original[: start.original], prefix.degraded[: start.degraded]
                claimed = np.union1d(*parts)
        held = [claimed, *(lease.cells for lease in self._leases)]
        return len(np.unique(np.concatenate(held))), len(claimed)

    def make_room(self, n_own: int) -> bool:
        """Lets prefixes go until answers can hold n_own cells that no prefix knows; whether they
        can."""
        n_ctx = self._contexts[0].n_ctx
        while n_own + self.n_held() > n_ctx:
            if (oldest := self._store.oldest) is None:
                return False
            self._let_go(oldest)
        return True

    def keep(self, lease: Lease, n: int | None = None) -> None:
        """Keeps what an answer has decoded. The original branch must be whole: every row of every
        layer. It may go on; then its cells are known by the names that the prefix has. n: rows of
        it that are kept; None = all."""
        if not self.keeps or not self._is_whole(lease):
            return
        items, original, degraded = self._fitting(lease, n)
        if not items:
            return
        for prefix in self._store.superseded(items, whole=self._has_state):
            self._let_go(prefix)
        cells = np.union1d(original, degraded)
        while (slot := self._store.free_slot) is None or (
            len(cells) + self._store.n_cells(beside=cells) > self._max_cells
        ):
            oldest = self._store.oldest
            assert oldest is not None
            self._let_go(oldest)
        self._unsettled.add(slot)
        branches = lease.branches
        self._move(branches.original.context, branches.original.seq, self._slots[slot][0], items)
        if len(degraded):
            shared = head(items, len(degraded))
            context, seq = branches.degraded.context, branches.degraded.seq
            self._move(context, seq, self._slots[slot][1], shared)
        variant = UNREAD if _parts_here(lease, len(original)) else lease.variant
        self._store.add(Prefix(slot, items, original, degraded, variant))
        lease.name(original, degraded)
        self._n_changes += 1
        self._unsettled.discard(slot)

    def part(self, lease: Lease, n_rows: int) -> None:
        """The answer's degraded branch goes back to its first n_rows rows, and on from there on its
        own: what prefixes hold of it beyond is theirs alone."""
        lease.variant, lease.is_complete = None, False
        lease.name(lease.original, lease.degraded[:n_rows])
        self._n_changes += 1

    def end(self, lease: Lease) -> None:
        """The answer holds nothing any more. Does nothing for one that ended."""
        if lease in self._leases:
            self._leases.remove(lease)
            self._n_changes += 1

    def settle(self) -> None:
        """Clears what was left unfinished by an interrupted `keep`."""
        for slot in tuple(self._unsettled):
            self._clear(slot)

    def forget(self, salt: str | None = None) -> None:
        """Lets all prefixes go, or those of one salt."""
        for prefix in self._store:
            if salt is None or prefix.items[:1] == (salt_item(salt),):
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
        if self._has_state and common < n_rows(prefix.items):
            return Start()
        unread = prefix.variant == UNREAD and len(prefix.degraded)
        if rows.unread and unread and common == rows.first_masked:
            return Start(common, common)
        variant = self._variant(rows)
        same = variant is not None and variant == prefix.variant and len(prefix.degraded)
        both = min(common, len(prefix.degraded))
        if same and both > rows.first_masked:
            return Start(both, both)
        if self._has_state:
            return Start(common if common <= min(rows.first_observed, rows.first_changed) else 0)
        return Start(min(common, rows.first_observed))

    def _variant(self, rows: PromptRows) -> Hashable:
        return rows.variant if self._paired else None

    def _holds_all(self, prefix: Prefix) -> bool:
        """Whether no cell was lost behind a sliding window; lets it go otherwise."""
        seqs = self._slots[prefix.slot]
        whole = self._contexts[0].is_whole(seqs[0]) and (
            not len(prefix.degraded) or self._contexts[1].is_whole(seqs[1])
        )
        if not whole:
            self._let_go(prefix)
        return whole

    def _is_whole(self, lease: Lease) -> bool:
        branches = [lease.branches.original]
        if self._paired and lease.n_degraded:
            branches.append(lease.branches.degraded)
        return all(branch.context.is_whole(branch.seq) for branch in branches)

    def _share(self, prefix: Prefix, start: Start, branches: Branches) -> None:
        seqs = self._slots[prefix.slot]
        shared = head(prefix.items, start.original)
        self._move(self._contexts[0], seqs[0], branches.original.seq, shared)
        if start.degraded:
            shared = head(prefix.items, start.degraded)
            self._move(self._contexts[1], seqs[1], branches.degraded.seq, shared)

    @staticmethod
    def _move(context: Context, source: int, target: int, items: tuple[Item, ...]) -> None:
        """Makes `target` share the rows of `items`, and what is known of their images."""
        context.share(source, target, n_positions(items))
        context.patch.copy_image_tokens(source, target, n_image_rows(items))

    def _fitting(self, lease: Lease, n: int | None) -> tuple[tuple[Item, ...], Cells, Cells]:
        """As much of an answer's first n rows as may be kept: (items, original, degraded)."""
        items = tuple(lease.items) if n is None else head(lease.items, n)
        original = self._named(lease.original, n_rows(items))
        degraded = NO_CELLS
        if _parts_here(lease, len(original)) and len(original) <= self._max_cells:
            degraded = original
        elif lease.n_degraded > 0 and (not self._has_state or lease.n_degraded == len(original)):
            known = lease.degraded
            if not len(known):
                known = original[: lease.first_own]
            degraded = self._named(known, lease.n_degraded)
            if len(np.union1d(original, degraded)) > self._max_cells:
                degraded = NO_CELLS
        if not len(degraded):
            items = head(items, self._max_cells)
            if self._has_state and not _is_of_use(lease, len(original), n_rows(items)):
                items = ()
        return items, original[: n_rows(items)], degraded

    def _named(self, known: Cells, n: int) -> Cells:
        """The cells of n rows: those known, and new names for the rest."""
        first = self._n_named
        self._n_named += n - len(known)
        return np.concatenate([known, np.arange(first, self._n_named, dtype=np.int64)])

    def _let_go(self, prefix: Prefix) -> None:
        self._unsettled.add(prefix.slot)
        self._store.remove(prefix)
        self._n_changes += 1
        self._clear(prefix.slot)

    def _clear(self, slot: int) -> None:
        pairs = list(zip(self._contexts, self._slots[slot], strict=True))
        for context, seq in pairs[: 2 if self._paired else 1]:
            context.truncate(seq, 0)
            context.patch.truncate_image_tokens(seq, 0)
        self._unsettled.discard(slot)


def _parts_here(lease: Lease, n: int) -> bool:
    """Whether the degraded branch has a state of its own behind n rows, and not yet a row."""
    return lease.unread and n == lease.first_own


def _is_of_use(lease: Lease, n: int, n_fitting: int) -> bool:
    """Whether the original branch's state behind n rows is of use without the degraded one's: where
    nothing before it is masked, in a prompt like this one."""
    masks_newest_alone = lease.first_own >= lease.n_prompt - 1
    return n == n_fitting and (n <= lease.first_own or masks_newest_alone)
