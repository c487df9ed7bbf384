"""The rows of a prompt: which are images, which are masked, what the patch does with each.

A row is a token of a prompt or batch. Rows, positions and image tokens are counted separately: an
image row is a row, has a position (under M-RoPE shared with others) and an image token number.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cmg_gguf import _core
from cmg_gguf.arrays import IntArray
from cmg_gguf.engine.batch import NONE, Batch, ImageBatch, RowPlan, text_batch
from cmg_gguf.engine.context import Branch, Context
from cmg_gguf.errors import GuidanceError, UnsupportedError, shown
from cmg_gguf.guidance import (
    BLIND,
    AttentionMass,
    CumulativeMass,
    Guidance,
    LayerRange,
    LayerSet,
    LowestCosine,
    MeanStd,
    Scope,
    TokenPolicy,
    TopRatio,
    layers_by_cosine,
    layers_by_mass,
    static_layers,
)
from cmg_gguf.prompt.segments import ImageSegment, Prompt

PlanOf: TypeAlias = Callable[[slice], RowPlan | None]
"""What the graph patch does with some rows of a prompt."""


def masked_rows(prompt: Prompt, scope: Scope) -> npt.NDArray[np.bool_]:
    """(n_tokens,) bool: rows of the degraded branch that are masked, of a prompt with an image.

    Text between the tiles of a picture counts as a part of it: only "all" masks it.
    """
    in_picture = prompt.in_picture
    rows = np.arange(len(in_picture))
    pictures = np.flatnonzero(in_picture)
    if scope == "decode":
        return np.asarray(rows == len(rows) - 1)
    if scope == "question":
        return np.asarray(rows > pictures[-1])
    behind_first = rows >= pictures[0]
    return np.asarray(behind_first if scope == "all" else behind_first & ~in_picture)


def rows_of(prompt: Prompt, guidance: Guidance, context: Context) -> PromptRows:
    """The rows of a prompt under guidance. Raises GuidanceError for what is none."""
    if not isinstance(guidance, Guidance):
        raise GuidanceError(f"{shown(guidance)} is no Guidance; write Guidance(alpha=1.0)")
    guided = guidance.contrasts and prompt.n_image_tokens > 0
    if guided and guidance.states == "unread" and not context.has_state:
        raise GuidanceError('states="unread": no layer of this model has one; use "read"')
    attending = context.attention_layers if guided else None
    return PromptRows(prompt, guidance, context.n_layer, guided=guided, attending=attending)


def core_policy(policy: TokenPolicy) -> _core.TokenPolicy:
    """The token policy as the extension takes it."""
    if isinstance(policy, TopRatio):
        return _core.TokenPolicy(_core.TokenRule.top_ratio, policy.ratio)
    if isinstance(policy, MeanStd):
        return _core.TokenPolicy(_core.TokenRule.mean_std, policy.factor)
    assert isinstance(policy, CumulativeMass)
    return _core.TokenPolicy(_core.TokenRule.cumulative_mass, policy.mass)


class PromptRows:
    """What the two branches do with each row of a prompt.

    prompt: as given, images encoded or not. guided: whether there is a degraded branch. n: rows.
    n_pos: positions. is_image, masked: (n,) bool. image_token, slot, observed: (n,) int32,
    `NONE` where there is none. n_slots: slots that the prompt's selections take. first_masked,
    first_observed: the first such row, n if there is none. layers: masked ones; None where they are
    only known behind the prompt. is_blind: text rows behind the first image see none of it in the
    degraded branch. fork_layer: where the degraded branch's rows enter, see `fork_at`.
    """

    def __init__(
        self,
        prompt: Prompt,
        guidance: Guidance,
        n_layer: int,
        *,
        guided: bool,
        attending: Sequence[int] | None = None,
    ) -> None:
        """attending: the layers that attend, ascending; None = all. Raises GuidanceError where
        others are to be masked, UnsupportedError where there are none."""
        if guided and attending is not None and not attending:
            raise UnsupportedError(
                "no layer of this model attends, so no image token can be masked; ask it without "
                "guidance (alpha=0)"
            )
        self.prompt = prompt
        self.guided = guided
        self._layer_policy = guidance.layers
        self._n_layer = n_layer
        self._attending = tuple(range(n_layer) if attending is None else attending)
        self.policy = core_policy(guidance.tokens)
        self.n = prompt.n_tokens
        self.n_pos = sum(s.n_pos for s in prompt.segments)
        self.is_image = prompt.is_image
        self.n_image_tokens = prompt.n_image_tokens
        self.image_token = _numbered(self.is_image)
        self.masked = masked_rows(prompt, guidance.scope) if guided else np.zeros(self.n, bool)
        if guidance.refresh == "step":
            self.slot = self.observed = _numbered(self.masked)
        else:
            self.slot = np.where(self.masked, 0, NONE).astype(np.int32)
            self.observed = np.full(self.n, NONE, np.int32)
            self.observed[-1] = self.slot[-1]
        self.n_slots = int(self.slot.max()) + 1
        self.layers = (
            static_layers(guidance.layers, n_layer, self._attending)
            if isinstance(guidance.layers, LayerSet | LayerRange)
            else None
        )
        self.observe_layers = self._attending if self.layers is None else self.layers
        self.unread = guided and guidance.states == "unread"
        hides = (guidance.tokens, guidance.scope) == (BLIND.tokens, BLIND.scope)
        self.is_blind = guided and hides and self.layers == self._attending and not self.unread
        self.first_masked = int(self.masked.argmax()) if guided else self.n
        observed = self.observed != NONE
        self.first_observed = int(observed.argmax()) if observed.any() else self.n
        self.fork_layer = 0
        self._variant: Hashable = None
        if guided and self.layers and guidance.refresh == "step" and guidance.scope != "decode":
            self._variant = (guidance.scope, guidance.tokens, self.layers, guidance.states)
            if guidance.scope == "question":  # rows do not tell what a later picture makes of them
                self._variant += (self.first_masked,)

    @property
    def variant(self) -> Hashable:
        """All that the degraded branch's rows depend on besides the prompt before them; None where
        they depend on more, such as which row is the prompt's last."""
        return None if self._variant is None else (self._variant, self.fork_layer)

    @property
    def first_changed(self) -> int:
        """First row before which both branches are alike, state and all."""
        first = self.first_masked
        return min(first, self.pictures[0].start) if self.unread else first

    @property
    def pictures(self) -> list[slice]:
        """The rows of each picture, ascending; text between its tiles is part of it."""
        edges = np.flatnonzero(np.diff(np.r_[False, self.prompt.in_picture, False]))
        return [slice(int(a), int(b)) for a, b in edges.reshape(-1, 2)]

    @property
    def picture_end(self) -> int:
        """Row behind the last picture up to which no row is masked or observed; 0 = there is none.
        As far as that both branches are alike, whatever is asked next."""
        most = min(self.first_masked, self.first_observed, self.n - 1)
        return max((p.stop for p in self.pictures if p.stop <= most), default=0)

    def fork_at(self, layer: int) -> None:
        """Lets the degraded branch's rows enter at this layer; 0 = at none. Images never do: where
        one is among these rows, none does."""
        self.fork_layer = 0 if self.is_image[self.first_masked :].any() else layer

    def chosen_layers(self, selections: _core.Selections) -> tuple[int, ...]:
        """The masked layers, once the original branch has decoded the prompt as planned."""
        if self.layers is not None:
            return self.layers
        if isinstance(self._layer_policy, LowestCosine):
            cosines = selections.cosines
            return layers_by_cosine(self._layer_policy.share, cosines, self._attending)
        assert isinstance(self._layer_policy, AttentionMass)
        last = self.n_slots - 1
        mass = [
            float(selections.influence(last, il).sum(dtype=np.float64))
            for il in range(self._n_layer)
        ]
        return layers_by_mass(self._layer_policy.share, np.array(mass))

    def position(self, row: int) -> int:
        """Position behind which the rows from `row` on lie. Inside an image whose rows share
        positions (M-RoPE) that is its end: the rows before are all within."""
        rows = positions = 0
        for segment in self.prompt.segments:
            if row < rows + segment.n_tokens:
                inside = row - rows
                shares = segment.n_pos != segment.n_tokens
                return positions + (segment.n_pos if inside and shares else inside)
            rows += segment.n_tokens
            positions += segment.n_pos
        return positions

    def first_own(self, *, paired: bool) -> int:
        """First row that the degraded branch does not share with the original one."""
        return self.first_masked if paired else 0

    def batches(
        self,
        branch: Branch,
        first: int,
        plan: PlanOf,
        *,
        cuts: Sequence[int] = (),
        most_text: int | None = None,
    ) -> Iterator[tuple[slice, Batch | ImageBatch]]:
        """The rows from `first` on, in batches of up to the context's n_ubatch rows, of text up to
        `most_text`. The logits of the last row are wanted. plan: what the patch does with some
        rows. cuts: rows that a batch begins with."""
        n_ubatch = branch.context.n_ubatch
        n_text = n_ubatch if most_text is None else min(n_ubatch, most_text)
        row = position = 0
        for segment in self.prompt.segments:
            n = segment.n_tokens
            most = n_ubatch if isinstance(segment, ImageSegment) else n_text
            for start, stop in _spans(max(0, first - row), n, most, [c - row for c in cuts]):
                part = slice(row + start, row + stop)
                if isinstance(segment, ImageSegment):
                    image = ImageBatch(branch, segment, start, stop - start, position, plan(part))
                    yield part, image
                    continue
                positions = np.arange(start, stop, dtype=np.int32) + position
                wanted = -1 if part.stop == self.n else None
                tokens = segment.tokens[start:stop]
                yield part, text_batch(branch, tokens, positions, plan(part), wanted=wanted)
            row += n
            position += segment.n_pos

    def original_plan(
        self,
        selections: _core.Selections,
        residuals: _core.Residuals,
        first_own: int,
        *,
        note_images: bool = False,
        recording: _core.Recording | None = None,
    ) -> PlanOf:
        """The original branch notes where images lie and observes the masked rows' attention.

        first_own: first row that the degraded branch decodes itself. note_images: note them without
        guidance too. recording: where the last row's attention is recorded, in slot 0.
        """

        def plan(part: slice) -> RowPlan | None:
            is_last = part.stop == self.n
            notes = note_images and self.is_image[part].any()
            records = is_last and recording is not None
            if not (self.masked.any() or notes or records):
                return None
            shared = _core.Part(
                selections=selections,
                residuals=residuals,
                observe_layers=list(self.observe_layers) if self.masked.any() else [],
                policy=self.policy,
                n_image_tokens=self.n_image_tokens,
                keep_influence=is_last and isinstance(self._layer_policy, AttentionMass),
                read_residual=is_last and isinstance(self._layer_policy, LowestCosine),
                recording=recording if records else None,
                record=0 if records else NONE,
            )
            table = self._table(part, observed=self.observed)
            return self._forked(RowPlan(shared, table), part, first_own, entering=False)

        return plan

    def degraded_plan(
        self,
        selections: _core.Selections,
        residuals: _core.Residuals,
        layers: tuple[int, ...],
        first_own: int,
    ) -> PlanOf:
        """The degraded branch notes its own images and hides each masked row's selection."""

        def plan(part: slice) -> RowPlan | None:
            shared = _core.Part(
                selections=selections,
                residuals=residuals,
                mask_layers=list(layers),
                policy=self.policy,
                n_image_tokens=self.n_image_tokens,
            )
            table = self._table(part, masked=self.slot)
            return self._forked(RowPlan(shared, table), part, first_own, entering=True)

        return plan

    def _forked(self, plan: RowPlan, part: slice, first_own: int, *, entering: bool) -> RowPlan:
        """Residuals of rows from `first_own` on are noted by one branch, for the other to enter
        with."""
        if self.fork_layer == 0 or part.stop <= first_own:
            return plan
        rows = np.arange(part.start, part.stop)
        plan.rows[:, 3] = np.where(rows >= first_own, rows - first_own, NONE)
        return replace(plan, fork_layer=self.fork_layer, n_below=0 if entering else len(rows))

    def _table(
        self, part: slice, *, observed: IntArray | None = None, masked: IntArray | None = None
    ) -> IntArray:
        """(rows, 4) int32: see `RowPlan`."""
        table = np.full((part.stop - part.start, 4), NONE, np.int32)
        table[:, 0] = self.image_token[part]
        for column, slots in ((1, observed), (2, masked)):
            if slots is not None:
                table[:, column] = slots[part]
        return table


def _spans(first: int, n: int, most: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """`first` to n in pieces of at most `most`, none across a cut."""
    start = first
    while start < n:
        stop = min([start + most, n, *(cut for cut in cuts if cut > start)])
        yield start, stop
        start = stop


def _numbered(flags: npt.NDArray[np.bool_]) -> IntArray:
    """0, 1, 2, ... where `flags`, else NONE."""
    return np.where(flags, np.cumsum(flags) - 1, NONE).astype(np.int32)
