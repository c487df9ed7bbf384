"""A degraded branch with a prompt of its own: another image, no image, another instruction.

    noised = Contrast("Is there a fork?", [noise], strength=None)
    vlm.generate("Is there a fork?", [image], guidance=Guidance(alpha=1.0), contrast=noised)

Cross-Modal Guidance masks attention and keeps the prompt; its relatives keep attention and change
the prompt. `ContrastEngine` decodes them in the same two branches, so that all are compared on the
same footing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmg_gguf.arrays import FloatArray
from cmg_gguf.engine.engine import PairedEngine, Progress, counted, decode_rows, logits_view
from cmg_gguf.engine.rows import PromptRows
from cmg_gguf.errors import BackendError, ContextLengthError
from cmg_gguf.guidance import Guidance
from cmg_gguf.prompt.images import ImageSource
from cmg_gguf.prompt.segments import Prompt, Segment, TextSegment

_PLAIN = Guidance(alpha=0.0, beta=0.0)


@dataclass(frozen=True, eq=False)
class Contrast:
    """What the degraded branch is asked instead.

    prompt, images: as `GuidedVLM.generate` takes them. strength: alpha of the draw behind n tokens,
    by n; None = `Guidance.alpha` for all.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    images: Sequence[ImageSource] = ()
    strength: Callable[[int], float] | None = None


class ContrastEngine:
    """Decodes two prompts and then the same tokens behind each.

    It borrows the branches of a `PairedEngine`, which must not be used until its `reset`. Rows that
    both prompts begin with are computed once where the branches share a context.
    """

    def __init__(self, engine: PairedEngine) -> None:
        self._engine = engine
        self._branches = engine.original, engine.degraded
        self._n_vocab = engine.original.context.n_vocab
        self._rows: tuple[FloatArray, FloatArray] | None = None
        self._addresses = (0, 0)
        self._n_past = np.zeros(2, np.int32)
        self._n_cells = 0

    def check(self, original: Prompt, degraded: Prompt) -> None:
        """Raises what `prefill` would raise about its arguments, before anything is computed."""
        for prompt in (original, degraded):
            self._engine.check(prompt, _PLAIN)
        paired = self._engine.paired
        needed = original.n_tokens + degraded.n_tokens + 2 if paired else 0
        if needed > self._n_ctx:
            raise ContextLengthError(
                f"the two prompts need {needed} KV cells ({original.n_tokens} and "
                f"{degraded.n_tokens} tokens) and the context has {self._n_ctx}; raise n_ctx or "
                "shorten the prompt"
            )

    def prefill(self, original: Prompt, degraded: Prompt, progress: Progress | None = None) -> None:
        """Decodes each prompt, its images encoded, in its branch.

        progress(done, total) counts rows. Raises PromptError, ContextLengthError, UnsupportedError
        before computing, BackendError after; the engine is empty then.
        """
        self._engine.reset()
        self.check(original, degraded)
        self._engine.prefixes.make_room(original.n_tokens + degraded.n_tokens + 2)
        report = progress or (lambda done, total: None)
        try:
            self._prefill(original, degraded, report)
        except BaseException:
            self._rows = None
            self._engine.reset()
            raise

    def step(self, token: int) -> None:
        """Decodes one token in both branches, each at its own position.

        Raises ContextLengthError when full.
        """
        if self._rows is None:
            raise BackendError("nothing to continue: call prefill first")
        if not self.has_room:
            raise ContextLengthError(f"all {self._n_ctx} KV cells are taken; raise n_ctx")
        self._engine.prefixes.make_room(self._n_cells + 2)
        tokens = np.full(2, token, np.int32)
        seqs = np.array([branch.seq for branch in self._branches], np.int32)
        context = self._branches[0].context
        if self._engine.paired:
            context.decode(tokens, self._n_past, seqs, outputs=np.ones(2, bool), plan=None)
            self._addresses = context.logits_address(0), context.logits_address(1)
        else:
            for i, branch in enumerate(self._branches):
                row = slice(i, i + 1)
                outputs = np.ones(1, bool)
                branch.context.decode(
                    tokens[row], self._n_past[row], seqs[row], outputs=outputs, plan=None
                )
            first, second = (branch.context.logits_address(0) for branch in self._branches)
            self._addresses = first, second
        self._n_past += 1
        self._n_cells += 2

    @property
    def has_room(self) -> bool:
        """Whether another step fits into the KV cache."""
        if self._engine.paired:
            return self._n_cells + 2 <= self._n_ctx
        return int(self._n_past.max()) + 1 <= self._n_ctx

    @property
    def original_address(self) -> int:
        """Address of l_o: (n_vocab,) float32."""
        return self._addresses[0]

    @property
    def degraded_address(self) -> int:
        """Address of l_d, like `original_address`."""
        return self._addresses[1]

    @property
    def original_logits(self) -> FloatArray:
        """l_o: (n_vocab,) float32, a view that is valid until the next step."""
        return logits_view(self._addresses[0], self._n_vocab)

    @property
    def degraded_logits(self) -> FloatArray | None:
        """l_d: (n_vocab,) float32, a view like `original_logits`."""
        return logits_view(self._addresses[1], self._n_vocab)

    @property
    def _n_ctx(self) -> int:
        return self._engine.original.context.n_ctx

    def _prefill(self, original: Prompt, degraded: Prompt, progress: Progress) -> None:
        prompts = original, degraded
        layout = [PromptRows(p, _PLAIN, 1, guided=False) for p in prompts]
        shared = shared_rows(original, degraded) if self._engine.paired else 0
        total = original.n_tokens + degraded.n_tokens - shared
        report = counted(progress, total)
        logits = []
        for i, (branch, rows) in enumerate(zip(self._branches, layout, strict=True)):
            first = shared if i else 0
            if first:
                position = rows.position(first)
                branch.context.share(self._branches[0].seq, branch.seq, position)
            address = decode_rows(branch, rows, first, lambda p: report(p.stop - p.start))
            # A copy, for the next decode of the same context takes its row away.
            logits.append(logits_view(address, self._n_vocab).copy())
        self._rows = logits[0], logits[1]
        self._addresses = logits[0].ctypes.data, logits[1].ctypes.data
        self._n_past[:] = [rows.n_pos for rows in layout]
        self._n_cells = total


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
