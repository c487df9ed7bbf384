"""Paired decoding: the original branch and the degraded one, step by step. Tokens only.

    engine.prefill(prompt, guidance)
    while ...:
        token = pick(engine.original_logits, engine.degraded_logits)
        engine.step(token)

How a step decodes them is up to `cmg_gguf.engine.steps`.

The branches are two sequences. Up to the first masked row they share their KV cells; from there on
the degraded branch has its own. Both are normally in the same context ("pair"); with two contexts
("contexts") each branch has its own cache, which costs about twice as much and needs nothing of the
cache but that it works: the reference, and the way for models with recurrent layers.

It knows no text, no chat format, no sampling, and nothing about sequence ids but what it is given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from cmg_gguf import _core
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.engine.context import Branch
from cmg_gguf.engine.fork import Forking, is_surveyed, survey
from cmg_gguf.engine.kept import PrefixReuse
from cmg_gguf.engine.lazy import Adaptive, Lazy, LazyApproximate, PromptEnd
from cmg_gguf.engine.rows import PromptRows, masked_rows
from cmg_gguf.engine.steps import EAGER, Masking, Plain, Stepper, Stepping, Together
from cmg_gguf.errors import BackendError, ContextLengthError, PromptError, UnsupportedError
from cmg_gguf.guidance import (
    Guidance,
    LayerRange,
    LayerSet,
    static_layers,
)
from cmg_gguf.prompt.segments import ImageSegment, Prompt

Progress = Callable[[int, int], None]


class PairedEngine:
    """Decodes a prompt and then token after token in both branches.

    original, degraded: where the branches live; the same context makes it a pair. selections: the
    store that the contexts' graph patches share. prefixes: what is kept from one prompt to the
    next; None = nothing. stepping: when the degraded branch is decoded; may be changed between
    answers.
    """

    def __init__(
        self,
        original: Branch,
        degraded: Branch,
        selections: _core.Selections,
        prefixes: PrefixReuse | None = None,
        *,
        stepping: Stepping = EAGER,
    ) -> None:
        self.stepping = stepping
        self.original = original
        self.degraded = degraded
        self.paired = original.context is degraded.context
        self.prefixes = prefixes or PrefixReuse(original, degraded)
        self.selections = selections
        self._prompt_logits = np.empty(original.context.n_vocab, np.float32)
        self.reset()

    def release(self) -> None:
        """Ends the answer: like `reset`, but a prompt that begins alike goes on from its cells."""
        try:
            if self._is_whole:
                self.prefixes.keep()
        finally:
            self.reset()

    def reset(self) -> None:
        """Forgets the prompt and all that followed; the cells are free again."""
        self.n_past = 0
        self.n_cells = 0
        self.n_reused = 0
        self._is_whole = False
        self.prefixes.drop()
        self.layers: tuple[int, ...] = ()
        self._guided = False
        self._stepper: Stepper | None = None
        for branch in (self.original, self.degraded):
            branch.context.truncate(branch.seq, 0)
            branch.context.patch.truncate_image_tokens(branch.seq, 0)

    def cells_needed(self, prompt: Prompt, guidance: Guidance) -> int:
        """KV cells that the prompt takes in the fullest context, before any answer."""
        n = prompt.n_tokens
        if not self._contrasts(prompt, guidance) or not self.paired:
            return n
        return 2 * n - int(masked_rows(prompt.is_image, guidance.scope).argmax())

    def check(self, prompt: Prompt, guidance: Guidance) -> None:
        """Raises what `prefill` would raise about its arguments, before anything is computed."""
        if prompt.n_tokens == 0:
            raise PromptError("the prompt is empty; give at least one token")
        if isinstance(prompt.segments[-1], ImageSegment):
            raise PromptError("the prompt ends with an image; put text behind it")
        n_ubatch = self.original.context.n_ubatch
        for segment in prompt.segments:
            if isinstance(segment, ImageSegment) and segment.needs_ubatch > n_ubatch:
                raise UnsupportedError(
                    f"this model decodes the {segment.n_tokens} tokens of an image at once and "
                    f"n_ubatch is {n_ubatch}; raise n_ubatch"
                )
        if isinstance(guidance.layers, LayerSet | LayerRange):
            static_layers(guidance.layers, self.original.context.n_layer)
        n_ctx = self.original.context.n_ctx
        per_step = self._cells_per_step(self._contrasts(prompt, guidance))
        needed = self.cells_needed(prompt, guidance) + per_step
        if needed > n_ctx:
            raise ContextLengthError(
                f"the prompt needs {needed} KV cells ({prompt.n_tokens} tokens, "
                f"{prompt.n_image_tokens} of them image tokens) and the context has {n_ctx}; "
                "raise n_ctx or shorten the prompt"
            )

    def prefill(self, prompt: Prompt, guidance: Guidance, progress: Progress | None = None) -> None:
        """Decodes the prompt in both branches; the logits of its last row are then there.

        With lazy stepping, the degraded branch's own rows wait until l_d is asked for.
        The answer before is released. progress(done, total) counts rows that are decoded. Raises
        PromptError, ContextLengthError, GuidanceError before computing, BackendError after; the
        engine is empty then.
        """
        self.release()
        self.check(prompt, guidance)
        try:
            self._prefill(prompt, guidance, progress or (lambda done, total: None))
        except BaseException:
            self.reset()
            raise
        self._is_whole = True

    def first_decoded_row(self, prompt: Prompt, guidance: Guidance) -> int:
        """First row that `prefill` would decode now: images before it need not be encoded.

        The engine is released or empty.
        """
        rows = self._rows_of(prompt, guidance)
        start = self.prefixes.start(prompt, rows)
        if not self._contrasts(prompt, guidance):
            return start.original
        return min(start.original, start.degraded or self._first_own_row(rows))

    def step(self, token: int) -> None:
        """Decodes one token, the same in both branches. Raises ContextLengthError when full."""
        if (stepper := self._stepper) is None:
            raise BackendError("nothing to continue: call prefill first")
        if not self.has_room:
            raise ContextLengthError(
                f"all {self.original.context.n_ctx} KV cells are taken; raise n_ctx"
            )
        self.prefixes.make_room(self.n_cells + self._cells_per_step(self._guided))
        was_whole, self._is_whole = self._is_whole, False
        stepper.step(token, self.n_past)
        self.n_past += 1
        self.n_cells += self._cells_per_step(self._guided)
        self.prefixes.grow(token)
        self._is_whole = was_whole

    @property
    def has_room(self) -> bool:
        """Whether another step fits into the KV cache."""
        needed = self._cells_per_step(self._guided)
        return self.n_cells + needed <= self.original.context.n_ctx

    @property
    def guided(self) -> bool:
        """Whether the degraded branch is running."""
        return self._guided

    @property
    def original_address(self) -> int:
        """Address of l_o, see `original_logits`; 0 before `prefill`."""
        return self._stepper.original_address if self._stepper else 0

    @property
    def degraded_address(self) -> int:
        """Address of l_d, see `degraded_logits`; 0 where there is none."""
        return self._stepper.degraded_address if self._stepper else 0

    @property
    def original_logits(self) -> FloatArray:
        """l_o: (n_vocab,) float32, a view that is valid until the next step or `reset`.

        Raises BackendError before `prefill`.
        """
        return logits_view(self.original_address, len(self._prompt_logits))

    @property
    def degraded_logits(self) -> FloatArray | None:
        """l_d: (n_vocab,) float32, a view like `original_logits`; None without guidance.

        With lazy stepping it is computed when it is first asked for, which raises what a step
        raises.
        """
        if not self._guided:
            return None
        return logits_view(self.degraded_address, len(self._prompt_logits))

    @property
    def attended(self) -> tuple[IntArray, ...]:
        """The image tokens masked for the newest row, by layer of `layers`; (n,) int32 each."""
        if not self._guided or self._stepper is None:
            return ()
        slot = self._stepper.newest
        return tuple(self.selections.tokens(slot, il) for il in self.layers)

    @staticmethod
    def _contrasts(prompt: Prompt, guidance: Guidance) -> bool:
        return guidance.contrasts and prompt.n_image_tokens > 0

    def _cells_per_step(self, guided: bool) -> int:
        return 2 if guided and self.paired else 1

    def _rows_of(self, prompt: Prompt, guidance: Guidance) -> PromptRows:
        guided = self._contrasts(prompt, guidance)
        rows = PromptRows(prompt, guidance, self.original.context.n_layer, guided=guided)
        if guided:
            forking = self._forking(rows.layers or ())
            if forking.pairs or self._is_lazy(guidance):
                rows.fork_at(forking.layer)
        return rows

    def _forking(self, layers: tuple[int, ...]) -> Forking:
        context = self.original.context
        if not self.stepping.fork or not self.paired:
            return Forking(context, ())
        if not is_surveyed(context):
            self.prefixes.make_room(2)
            survey(self.original, self.degraded)
        return Forking(context, layers)

    def _is_lazy(self, guidance: Guidance) -> bool:
        return self.stepping.lazy and guidance.beta > 0  # without a cut, every step needs both

    def _prefill(self, prompt: Prompt, guidance: Guidance, progress: Progress) -> None:
        self._guided = self._contrasts(prompt, guidance)
        rows = self._rows_of(prompt, guidance)
        needed = self.cells_needed(prompt, guidance)
        start = self.prefixes.resume(prompt, rows)
        self.prefixes.make_room(needed + self._cells_per_step(self._guided))
        self.n_reused = start.original
        own = start.degraded or self._first_own_row(rows)
        if start.original > own:  # only where no degraded rows are kept, see `PromptRows.variant`
            rows.fork_at(0)  # nothing notes the residuals of what is not decoded
        eager = self._guided and not self._is_lazy(guidance)
        report = counted(progress, rows.n - start.original + (rows.n - own if eager else 0))
        self.selections.resize(rows.n_slots)
        shares = self._guided and self.paired and not start.degraded
        if shares and start.original > 0:
            self._share_prefix(rows, min(start.original, own))

        def decoded(part: slice) -> None:
            if shares and part.start < own:
                self._share_prefix(rows, min(part.stop, own))
            report(part.stop - part.start)

        plan = rows.original_plan(self.original.seq, own, note_images=self.prefixes.keeps)
        address = decode_rows(self.original, rows, start.original, decoded, plan)
        np.copyto(self._prompt_logits, logits_view(address, len(self._prompt_logits)))
        if self._guided:
            self.layers = rows.chosen_layers(self.selections, self.original.context.patch)
            self._stepper = self._new_stepper(rows, guidance, own, report)
        else:
            self._stepper = Plain(self.original, self._prompt_logits.ctypes.data)
        self.n_past = rows.n_pos
        self.n_cells = needed

    def _first_own_row(self, rows: PromptRows) -> int:
        """First row that the degraded branch does not share with the original one."""
        return rows.first_masked if self.paired else 0

    def _share_prefix(self, rows: PromptRows, n: int) -> None:
        """Gives the degraded branch the first n rows, as soon as they are there: behind a sliding
        window, llama.cpp gives cells that one sequence alone holds to later rows."""
        context = self.degraded.context
        context.share(self.original.seq, self.degraded.seq, rows.position(n))
        shared = int(rows.is_image[:n].sum())
        context.patch.copy_image_tokens(self.original.seq, self.degraded.seq, shared)

    def _decode_degraded(self, rows: PromptRows, own: int, report: Callable[[int], None]) -> int:
        """Decodes the degraded branch's own rows of the prompt; returns the address of l_d.

        Can be called again where it failed.
        """
        context, seq = self.degraded.context, self.degraded.seq
        if own > 0 and not context.is_whole(seq):
            raise BackendError("llama.cpp gave cells of the image away while it was still needed")
        context.truncate(seq, rows.position(own))
        context.patch.truncate_image_tokens(seq, int(rows.is_image[:own].sum()))
        plan = rows.degraded_plan(seq, self.layers, own)
        address = decode_rows(
            self.degraded, rows, own, lambda part: report(part.stop - part.start), plan
        )
        self.prefixes.complete()
        return address

    def _new_stepper(
        self, rows: PromptRows, guidance: Guidance, own: int, report: Callable[[int], None]
    ) -> Stepper:
        """What decodes the answer; own: first row that the degraded branch decodes itself."""
        how, branches = self.stepping, (self.original, self.degraded)
        masking = Masking(
            layers=self.layers,
            policy=rows.policy,
            n_image_tokens=rows.n_image_tokens,
            observed=guidance.refresh == "step",
        )
        forking = self._forking(self.layers)
        if not self._is_lazy(guidance):
            degraded = self._decode_degraded(rows, own, report)
            self.selections.keep_last()
            addresses = self._prompt_logits.ctypes.data, degraded
            return Together(*branches, masking, forking, addresses)
        end = PromptEnd(
            self._prompt_logits,
            lambda: self._decode_degraded(rows, own, lambda n: None),
            slot=rows.n_slots - 1,
            n_slots=max(rows.n_slots, rows.n - own),
        )
        self.selections.grow(end.n_slots + self.degraded.context.n_ubatch)
        if how.approximate and self.paired:
            return LazyApproximate(*branches, masking, forking, end)
        if how.pair_above < 1 and self.paired:
            return Adaptive(*branches, masking, forking, end, pair_above=how.pair_above)
        return Lazy(*branches, masking, forking, end)


def decode_rows(
    branch: Branch,
    rows: PromptRows,
    first: int,
    decoded: Callable[[slice], None],
    new_plan: Callable[[slice], _core.Plan | None] = lambda part: None,
) -> int:
    """Decodes rows `first` and up into the branch; returns the address of the last row's logits.

    decoded: is told which rows, part by part. new_plan: what the patch does with a part.
    """
    context, last_in_batch = branch.context, 0
    for segment, part, position in rows.parts(first, context.n_ubatch):
        plan = new_plan(part)
        if isinstance(segment, ImageSegment):
            context.decode_image(segment, position, branch.seq, plan)
        else:
            n = len(segment.tokens)
            outputs = np.zeros(n, bool)
            outputs[-1] = part.stop == rows.n
            context.decode(
                segment.tokens,
                np.arange(position, position + n, dtype=np.int32),
                np.full(n, branch.seq, np.int32),
                outputs=outputs,
                plan=plan,
            )
            last_in_batch = n - 1
        decoded(part)
    return context.logits_address(last_in_batch)


def counted(progress: Progress, total: int) -> Callable[[int], None]:
    """Turns rows at a time into rows so far, of a total."""
    done = 0

    def report(n: int) -> None:
        nonlocal done
        done += n
        progress(done, total)

    return report


def logits_view(address: int, n: int) -> FloatArray:
    """(n,) float32 at an address; not a copy. Raises BackendError for address 0: none yet."""
    if address == 0:
        raise BackendError("there are no logits yet: call prefill first")
    return np.ctypeslib.as_array((ctypes.c_float * n).from_address(address))
