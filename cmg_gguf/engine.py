"""Paired decoding: the original branch and the degraded one, step by step. Tokens only.

    engine.prefill(prompt, guidance)
    while ...:
        token = pick(engine.original_logits, engine.degraded_logits)
        engine.step(token)

How a step decodes them is up to `cmg_gguf.stepping`.

The branches are two sequences. Up to the first masked row they share their KV cells; from there on
the degraded branch has its own. Both are normally in the same context ("pair"); with two contexts
("contexts") each branch has its own cache, which costs about twice as much and needs nothing of the
cache but that it works: the reference, and the way for models with recurrent layers.

It knows no text, no chat format, no sampling, and nothing about sequence ids but what it is given.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cmg_gguf import _core
from cmg_gguf.errors import BackendError, ContextLengthError, PromptError, UnsupportedError
from cmg_gguf.guidance import (
    AttentionMass,
    Guidance,
    LayerRange,
    LayerSet,
    LowestCosine,
    layers_by_cosine,
    layers_by_mass,
    static_layers,
)
from cmg_gguf.lazy import Adaptive, Lazy, LazyApproximate
from cmg_gguf.reuse import PrefixReuse, Start
from cmg_gguf.rows import PromptRows, masked_rows
from cmg_gguf.runtime.protocol import Context, FloatArray, ImageSegment, IntArray, Prompt
from cmg_gguf.stepping import EAGER, Forking, Masking, Plain, Stepper, Stepping, Together

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Branch:
    """Where a branch lives: a sequence of a context."""

    context: Context
    seq: int


class PairedEngine:
    """Decodes a prompt and then token after token in both branches.

    original, degraded: where the branches live; the same context makes it a pair. selections: the
    store that the contexts' graph patches share. stepping: when the degraded branch is decoded; may
    be changed between answers. prefixes: what is kept from one prompt to the next; None = nothing.
    """

    def __init__(
        self,
        original: Branch,
        degraded: Branch,
        selections: _core.Selections,
        *,
        stepping: Stepping = EAGER,
        prefixes: PrefixReuse | None = None,
    ) -> None:
        self.stepping = stepping
        self.original = original
        self.degraded = degraded
        self.paired = original.context is degraded.context
        self.selections = selections
        self.prefixes = prefixes or PrefixReuse(original, degraded)
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
        self._last_in_batch = 0
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
        """First row that `prefill` would decode now: images before it need not be encoded."""
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
        self.prefixes.grow(token, both=stepper.is_whole)
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
        return self._view(self.original_address)

    @property
    def degraded_logits(self) -> FloatArray | None:
        """l_d: (n_vocab,) float32, a view like `original_logits`; None without guidance.

        With lazy stepping it is computed when it is first asked for after a step, which raises what
        a step raises.
        """
        return self._view(self.degraded_address) if self._guided else None

    def _view(self, address: int) -> FloatArray:
        if address == 0:
            raise BackendError("there are no logits yet: call prefill first")
        return _view(address, len(self._prompt_logits))

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
        return PromptRows(prompt, guidance, self.original.context.n_layer, guided=guided)

    def _prefill(self, prompt: Prompt, guidance: Guidance, progress: Progress) -> None:
        self._guided = self._contrasts(prompt, guidance)
        rows = self._rows_of(prompt, guidance)
        needed = self.cells_needed(prompt, guidance)
        start = self.prefixes.resume(prompt, rows)
        self.prefixes.make_room(needed + self._cells_per_step(self._guided))
        self.n_reused = start.original
        own = start.degraded or self._first_own_row(rows)
        total = rows.n - start.original + (rows.n - own if self._guided else 0)
        self.selections.resize(rows.n_slots)
        plan = rows.original_plan(self.original.seq, note_images=self.prefixes.keeps)
        done = self._decode_rows(self.original, rows, start.original, plan, progress, 0, total)
        address = self.original.context.logits_address(self._last_in_batch)
        np.copyto(self._prompt_logits, _view(address, len(self._prompt_logits)))
        if self._guided:
            self.layers = self._choose_layers(rows, guidance)
            first = self._share_prefix(rows, start)
            plan = rows.degraded_plan(self.degraded.seq, self.layers)
            self._decode_rows(self.degraded, rows, first, plan, progress, done, total)
            degraded = self.degraded.context.logits_address(self._last_in_batch)
            if guidance.refresh == "step":
                self.selections.keep_last()
            self._stepper = self._new_stepper(rows, guidance, degraded)
        else:
            self._stepper = Plain(self.original, self._prompt_logits.ctypes.data)
        self.n_past = rows.n_pos
        self.n_cells = needed

    def _first_own_row(self, rows: PromptRows) -> int:
        """First row that the degraded branch does not share with the original one."""
        return rows.first_masked if self.paired else 0

    def _share_prefix(self, rows: PromptRows, start: Start) -> int:
        """Gives the degraded branch its first rows; returns the first that it decodes itself."""
        if start.degraded:
            return start.degraded
        first = self._first_own_row(rows)
        context = self.degraded.context
        if self.paired:
            context.share(self.original.seq, self.degraded.seq, rows.position(first))
            shared = int(rows.is_image[:first].sum())
            context.patch.copy_image_tokens(self.original.seq, self.degraded.seq, shared)
        return first

    def _decode_rows(
        self,
        branch: Branch,
        rows: PromptRows,
        first: int,
        new_plan: Callable[[slice], _core.Plan | None],
        progress: Progress,
        done: int,
        total: int,
    ) -> int:
        """Decodes rows `first` and up into the branch; returns the new count of done rows."""
        for segment, part, position in rows.parts(first, branch.context.n_ubatch):
            plan = new_plan(part)
            if isinstance(segment, ImageSegment):
                branch.context.decode_image(segment, position, branch.seq, plan)
            else:
                n = len(segment.tokens)
                outputs = np.zeros(n, bool)
                outputs[-1] = part.stop == rows.n
                branch.context.decode(
                    segment.tokens,
                    np.arange(position, position + n, dtype=np.int32),
                    np.full(n, branch.seq, np.int32),
                    outputs=outputs,
                    plan=plan,
                )
                self._last_in_batch = n - 1
            done += part.stop - part.start
            progress(done, total)
        return done

    def _choose_layers(self, rows: PromptRows, guidance: Guidance) -> tuple[int, ...]:
        policy = guidance.layers
        if isinstance(policy, AttentionMass):
            last = rows.n_slots - 1
            mass = [
                float(self.selections.influence(last, il).sum(dtype=np.float64))
                for il in range(self.original.context.n_layer)
            ]
            return layers_by_mass(policy.share, np.array(mass))
        if isinstance(policy, LowestCosine):
            return layers_by_cosine(policy.share, self.original.context.patch.cosines)
        return rows.observe_layers

    def _new_stepper(self, rows: PromptRows, guidance: Guidance, degraded: int) -> Stepper:
        """What decodes the answer. degraded: address of l_d of the prompt's last row."""
        masking = Masking(
            layers=self.layers,
            policy=rows.policy,
            n_image_tokens=rows.n_image_tokens,
            observed=guidance.refresh == "step",
        )
        how, branches = self.stepping, (self.original, self.degraded)
        forking = Forking(self.original.context, masking, how.fork and self.paired)
        if not how.lazy or guidance.beta == 0:  # without a cut, every step needs both
            addresses = self._prompt_logits.ctypes.data, degraded
            return Together(*branches, masking, addresses, forking)
        self.selections.grow(self.degraded.context.n_ubatch)
        put_off = (*branches, masking, self._prompt_logits, degraded, forking)
        if how.approximate and self.paired:
            return LazyApproximate(*put_off)
        if how.pair_above < 1 and self.paired:
            return Adaptive(*put_off, pair_above=how.pair_above)
        return Lazy(*put_off)


def _view(address: int, n: int) -> FloatArray:
    return np.ctypeslib.as_array((ctypes.c_float * n).from_address(address))
