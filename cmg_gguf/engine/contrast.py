"""A degraded branch with a prompt of its own: another image, no image, another instruction.

Cross-Modal Guidance masks attention and keeps the prompt; its relatives keep attention and change
the prompt. `ContrastSession` is such an answer in the same two branches, so that all are compared
on the same footing.
"""

from __future__ import annotations

import numpy as np

from cmg_gguf.arrays import FloatArray
from cmg_gguf.engine.batch import Decodes, copied_row, text_batch
from cmg_gguf.engine.context import Branches
from cmg_gguf.engine.rows import PromptRows
from cmg_gguf.engine.session import cut_back
from cmg_gguf.guidance import PLAIN
from cmg_gguf.prompt.segments import Prompt, Segment, TextSegment


class ContrastSession:
    """An answer behind two prompts: the same tokens, each at its own positions.

    Rows that both prompts begin with are computed once where the branches share a context. Its
    attributes are those of `cmg_gguf.engine.session.Session`; nothing waits, nothing is kept.
    """

    guided = True
    is_blind = is_whole = False
    n_reused = first_row = n_named = 0
    layers: tuple[int, ...] = ()
    recording = None

    def __init__(self, branches: Branches, original: Prompt, degraded: Prompt) -> None:
        """original, degraded: the two prompts, their images encoded."""
        self.branches = branches
        self._rows = [PromptRows(p, PLAIN, 1, guided=False) for p in (original, degraded)]
        self._n_shared = shared_rows(original, degraded) if branches.paired else 0
        self._n_past = [0, 0]
        n = cells_of_both(original.n_tokens, degraded.n_tokens, branches)
        self.n_cells = n - self._n_shared
        self.n_reserved = 0
        self.l_o: FloatArray = np.zeros(branches.original.context.n_vocab, np.float32)
        self.l_d: FloatArray | None = None

    @property
    def n_ahead(self) -> int:
        """Rows that `prefill` decodes."""
        return sum(rows.n for rows in self._rows) - self._n_shared

    @property
    def cells_a_step(self) -> int:
        """KV cells that a token takes in one context."""
        return 2 if self.branches.paired else 1

    @property
    def has_room(self) -> bool:
        """Whether another token fits into the KV cache."""
        return self.n_cells + self.cells_a_step <= self.branches.original.context.n_ctx

    def prefill(self) -> Decodes:
        """Each prompt in its branch."""
        original, degraded = self.branches.original, self.branches.degraded
        first, second = self._rows
        n = self._n_shared
        cuts = (n,) if original.context.has_state else ()
        for part, batch in first.batches(original, 0, lambda part: None, cuts=cuts):
            decoded = yield batch
            if part.start < n <= part.stop:
                degraded.context.share(original.seq, degraded.seq, second.position(n))
        self.l_o = decoded.logits[-1]
        for _, batch in second.batches(degraded, self._n_shared, lambda part: None):
            decoded = yield batch
        self.l_d = decoded.logits[-1]
        self._n_past = [first.n_pos, second.n_pos]

    def step(self, token: int) -> Decodes:
        """One token in both branches."""
        branches = self.branches.original, self.branches.degraded
        self.n_cells += self.cells_a_step
        try:
            if self.branches.paired:
                decoded = yield copied_row(branches, token, self._n_past, None)
                l_o, l_d = decoded.logits
            else:
                decoded = yield text_batch(branches[0], [token], self._n_past[:1], None)
                (l_o,) = decoded.logits
                decoded = yield text_batch(branches[1], [token], self._n_past[1:], None)
                (l_d,) = decoded.logits
        except BaseException:
            self.n_cells -= self.cells_a_step
            cut_back(branches, self._n_past)
            raise
        self.l_o, self.l_d = l_o, l_d
        self._n_past = [n + 1 for n in self._n_past]

    def catch_up(self) -> Decodes:
        """Nothing: l_d is always there."""
        yield from ()


def cells_of_both(n_original: int, n_degraded: int, branches: Branches) -> int:
    """KV cells that two prompts of this many rows take in the fullest context, nothing shared."""
    return n_original + n_degraded if branches.paired else max(n_original, n_degraded)


def shared_rows(first: Prompt, second: Prompt) -> int:
    """How many rows both prompts begin with, images encoded; never all of `second`.

    Images are the same if their embeddings are.
    """
    n = 0
    for a, b in zip(first.segments, second.segments, strict=False):
        same = _same_rows(a, b)
        n += same
        if same < a.n_tokens or same < b.n_tokens:
            break
    return min(n, second.n_tokens - 1)


def _same_rows(a: Segment, b: Segment) -> int:
    if isinstance(a, TextSegment) and isinstance(b, TextSegment):
        n = min(a.n_tokens, b.n_tokens)
        equal = a.tokens[:n] == b.tokens[:n]
        return n if equal.all() else int(equal.argmin())
    if isinstance(a, TextSegment) or isinstance(b, TextSegment) or a.embd is None:
        return 0
    return a.n_tokens if b.embd is not None and np.array_equal(a.embd, b.embd) else 0
