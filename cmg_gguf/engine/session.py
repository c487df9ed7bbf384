"""One answer: where it stands in both branches, and which rows it wants decoded next.

    engine.prefill(session)            # runs session.prefill(): the prompt
    session.l_o                        # (n_vocab,) float32: logits of the newest row
    engine.degraded(session)           # runs session.catch_up(): degraded rows that wait, if any
    session.l_d                        # the same of the degraded branch; None while it waits
    engine.step(session, token)        # runs session.step(token): one token more

`prefill`, `catch_up` and `step` decode nothing: they are generators that yield batches and are sent
what came of them (`cmg_gguf.engine.batch`). A session knows its two branches and no other session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from cmg_gguf import _core
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.engine.batch import NONE, Decodes, copied_row, text_batch
from cmg_gguf.engine.context import Branch, Branches
from cmg_gguf.engine.fork import Forking
from cmg_gguf.engine.prefix_cache import Lease, PrefixCache
from cmg_gguf.engine.replay import replay
from cmg_gguf.engine.rows import PromptRows
from cmg_gguf.engine.steps import Masking, Pace, Strategy
from cmg_gguf.errors import BackendError
from cmg_gguf.guidance import Guidance


class Session:
    """An answer under guidance, or plain where there is no image or no contrast.

    guided: whether there is a degraded branch. n_past: positions decoded. n_cells: KV cells that
    the answer counts as its own in the fullest context, from before it has decoded them: those of
    rows that wait, and of a step or a prompt under way. n_reserved: cells set aside for it. layers:
    masked ones, known once the prompt is decoded. is_whole: the original branch has decoded every
    row of its items in every layer, so that they may be kept. selections: what rows of the original
    branch chose to hide. recording: what the rows that tokens are drawn from attend to among the
    image tokens, a slot each; None = it is not recorded, see `record`.
    """

    def __init__(
        self,
        branches: Branches,
        rows: PromptRows,
        guidance: Guidance,
        lease: Lease,
        *,
        strategy: Strategy,
        pace: Pace,
        prefixes: PrefixCache | None = None,
        first_blind: int | None = None,
    ) -> None:
        """prefixes: where what is decoded may be kept, for prompts that go on from it. first_blind:
        the first row that `replay` decodes itself; None = it will not be asked for."""
        context = branches.original.context
        self.branches, self.rows, self.lease = branches, rows, lease
        self.guided = rows.guided
        self.layers: tuple[int, ...] = ()
        self.n_past = 0
        self.n_cells = cells_of(rows, paired=branches.paired, first_blind=first_blind)
        self.n_reserved = 0
        self.is_whole = False
        self.l_o: FloatArray = np.zeros(context.n_vocab, np.float32)
        self.l_d: FloatArray | None = None
        self.selections, self._residuals = _core.Selections(context.n_layer), _core.Residuals()
        self._strategy, self._pace = strategy, pace
        self.recording: _core.Recording | None = None
        self._prefixes = prefixes
        self._has_state = context.has_state
        self._n_drawn = 0  # tokens behind the prompt
        self._observed = guidance.refresh == "step"
        self._may_wait = self.guided and strategy.may_wait(guidance)
        self._forking = Forking(context, ())
        self._prompt_waits = False
        self._waiting: list[tuple[int, int]] = []  # token, position
        self._first_slot = 0  # of rows that wait
        self._newest = 0  # slot that the newest row hides
        self._asked = False  # whether l_d of the newest row was needed
        own = rows.first_own(paired=branches.paired)
        self._own = lease.start.degraded or own
        self.first_blind = None if first_blind is None else min(first_blind, own)
        if lease.start.original > self._own:  # only where no degraded rows are kept
            rows.fork_at(0)  # nothing notes the residuals of what is not decoded

    @property
    def first_row(self) -> int:
        """First row that is decoded: images before it need not be encoded."""
        own = self._own if self.guided else self.rows.n
        blind = self.rows.n if self.first_blind is None else self.first_blind
        return min(self.lease.start.original, own, blind)

    @property
    def n_ahead(self) -> int:
        """Rows that `prefill` decodes."""
        n_degraded = self.rows.n - self._own if self.guided and not self._may_wait else 0
        return self.rows.n - self.lease.start.original + n_degraded

    @property
    def decoded_pictures(self) -> bool:
        """Whether `prefill` decodes image rows."""
        return bool(self.rows.is_image[self.lease.start.original :].any())

    @property
    def is_blind(self) -> bool:
        """Whether l_d is that of `replay`: every row behind the picture sees none of it."""
        return self.rows.is_blind and not self._strategy.approximate

    @property
    def n_named(self) -> int:
        """Of its cells, those that kept prompts may share: they are known by name."""
        return len(self.lease.cells)

    @property
    def n_reused(self) -> int:
        """Rows of the prompt whose KV cells were there."""
        return self.lease.start.original

    @property
    def cells_a_step(self) -> int:
        """KV cells that a token takes in one context."""
        twice = self.guided or self.first_blind is not None
        return 2 if twice and self.branches.paired else 1

    @property
    def has_room(self) -> bool:
        """Whether another token fits into the KV cache."""
        return self.n_cells + self.cells_a_step <= self.branches.original.context.n_ctx

    def attended(self) -> tuple[IntArray, ...]:
        """The image tokens masked for the newest row, by layer of `layers`; (n,) int32 each."""
        return tuple(self.selections.tokens(self._newest, il) for il in self.layers)

    def record(self) -> None:
        """Lets the attention of the row that each token is drawn from be recorded, in all layers
        that attend. Before `prefill`."""
        layers = list(self.branches.original.context.attention_layers)
        self.recording = _core.Recording(layers, self.rows.n_image_tokens)

    @property
    def _notes_images(self) -> bool:
        """Whether the patch must know the image's cells: for who masks, observes or goes on."""
        wanted = self.recording, self._prefixes, self.first_blind
        return any(who is not None for who in wanted)

    def prefill(self) -> Decodes:
        """The prompt's rows, its images encoded from `first_row` on. Where degraded rows may wait,
        those of the prompt do."""
        rows, start, own = self.rows, self.lease.start, self._own
        original, selections = self.branches.original, self.selections
        selections.resize(rows.n_slots)
        if not self.guided and self.first_blind is not None:
            own = self.first_blind
        shares = self.cells_a_step == 2 and not start.degraded
        if shares and min(start.original, own) > 0:
            self._share_prefix(min(start.original, own))
        plan = rows.original_plan(
            selections,
            self._residuals,
            own,
            note_images=self._notes_images,
            recording=self.recording,
        )
        picture_end, unread = rows.picture_end, self._unread(0, own) if shares else []
        cuts = (own, picture_end, *_edges(unread)) if self._has_state else ()
        for part, batch in rows.batches(original, start.original, plan, cuts=cuts):
            self._set_state_aside(original, part, unread)
            decoded = yield batch
            if shares and part.start < own:
                self._share_prefix(min(part.stop, own))
                self._take_state(part, unread)
            if part.stop == picture_end:
                self._keep_state(part.stop)
        self.l_o = decoded.logits[-1]
        if self.guided:
            self.layers = rows.chosen_layers(selections)
        self._prepare_steps()
        if self.guided:
            self._newest = rows.n_slots - 1
            if not self._may_wait:
                yield from self._decode_prompt_degraded()
                selections.keep_last()
                self._newest = 0
        self.n_past = rows.n_pos
        self.is_whole = True
        if self.lease.is_complete:
            self._keep_state(rows.n)

    def step(self, token: int) -> Decodes:
        """One token, the same in both branches. Where it fails, the newest row is still the one
        before."""
        was_whole, self.is_whole = self.is_whole, False
        self.n_cells += self.cells_a_step
        try:
            if not self.guided:
                plan = None
                if self.recording is not None:
                    plan = self._masking.plan([(NONE, NONE, NONE)], record=self._slot_recorded)
                decoded = yield text_batch(self.branches.original, [token], [self.n_past], plan)
                self.l_o = decoded.logits[0]
            elif self._takes_together():
                if self._waiting:
                    yield from self._decode_waiting()
                yield from self._step_together(token)
            else:
                yield from self._step_alone(token)
        except BaseException as exc:
            self.n_cells -= self.cells_a_step
            self.is_whole = was_whole and isinstance(exc, GeneratorExit)  # nothing was decoded
            cut_back((self.branches.original, self.branches.degraded), (self.n_past, self.n_past))
            raise
        self._asked = False
        self.n_past += 1
        self._n_drawn += 1
        self.lease.items.append(token)
        self.is_whole = was_whole

    def catch_up(self) -> Decodes:
        """The degraded rows that wait, in order, so that l_d is there. None without guidance."""
        if not self.guided:
            return
        self._asked = True
        if self._prompt_waits:
            yield from self._decode_prompt_degraded()
            if self.is_whole and self.n_past == self.rows.n_pos:
                self._keep_state(self.rows.n)
        if self._waiting:
            yield from self._decode_waiting()

    @property
    def _slot_recorded(self) -> int:
        """Where the row that is decoded next is recorded: the prompt's last row has slot 0."""
        return self._n_drawn + 1

    def replay(self, tokens: Sequence[int], take: Callable[[FloatArray], None]) -> Decodes:
        """The whole answer, `tokens`, read blind, see `cmg_gguf.engine.replay`: take(l_d) of each.
        Behind it there is no degraded branch to go on with, and nothing to keep."""
        assert self.first_blind is not None
        self.is_whole, self.l_d = False, None
        yield from replay(self.branches, self.rows.prompt, self.first_blind, tokens, take)

    def _prepare_steps(self) -> None:
        context, rows = self.branches.original.context, self.rows
        if self._strategy.fork and self.branches.paired:
            self._forking = Forking(context, self.layers)
        self._masking = Masking(
            selections=self.selections,
            residuals=self._residuals,
            layers=self.layers,
            policy=rows.policy,
            n_image_tokens=rows.n_image_tokens,
            observed=self._observed,
            recording=self.recording,
        )
        if self._may_wait:
            self._prompt_waits = True
            self._first_slot = max(rows.n_slots, rows.n - self._own)
            self.selections.grow(self._first_slot + context.n_ubatch)

    def _share_prefix(self, n: int) -> None:
        """Gives the degraded branch the first n rows, as soon as they are there: behind a sliding
        window, llama.cpp gives cells that one sequence alone holds to later rows."""
        original, degraded = self.branches.original, self.branches.degraded
        degraded.context.share(original.seq, degraded.seq, self.rows.position(n))
        n_images = int(self.rows.is_image[:n].sum())
        degraded.context.patch.copy_image_tokens(original.seq, degraded.seq, n_images)

    def _unread(self, first: int, stop: int) -> list[slice]:
        """The pictures among these rows that the degraded branch's state is not to have read."""
        pictures = self.rows.pictures if self.rows.unread else []
        return [p for p in pictures if first <= p.start and p.stop <= stop]

    def _set_state_aside(self, branch: Branch, part: slice, unread: Sequence[slice]) -> None:
        """Before a picture: as it stands in the branch that is to decode it."""
        aside = self.branches.aside
        if aside is not None and any(part.start == picture.start for picture in unread):
            branch.context.set_aside(branch.seq, aside)

    def _take_state(self, part: slice, unread: Sequence[slice]) -> None:
        """Behind a picture: the degraded branch goes on as if it had not read it."""
        aside, degraded = self.branches.aside, self.branches.degraded
        if aside is not None and any(part.stop == picture.stop for picture in unread):
            degraded.context.take_state(aside, degraded.seq, self.rows.position(part.stop))

    def _keep_state(self, n: int) -> None:
        """Keeps n rows, behind which a state stands that it will be gone from. Rows without a state
        are kept when all are there."""
        if self._has_state and self._prefixes is not None:
            self._prefixes.keep(self.lease, n)

    def _decode_prompt_degraded(self) -> Decodes:
        """The degraded branch's own rows of the prompt. Can be begun again where it failed."""
        rows, own, degraded = self.rows, self._own, self.branches.degraded
        context, seq = degraded.context, degraded.seq
        if own > 0 and not context.is_whole(seq):
            raise BackendError("llama.cpp gave cells of the image away while it was still needed")
        context.truncate(seq, rows.position(own))
        context.patch.truncate_image_tokens(seq, int(rows.is_image[:own].sum()))
        plan = rows.degraded_plan(self.selections, self._residuals, self.layers, own)
        unread = self._unread(own, rows.n)
        for part, batch in rows.batches(degraded, own, plan, cuts=_edges(unread)):
            self._set_state_aside(degraded, part, unread)
            decoded = yield batch
            self._take_state(part, unread)
        self.l_d = decoded.logits[-1]
        self._prompt_waits = False
        self.lease.is_complete = True

    def _takes_together(self) -> bool:
        """Whether both branches are decoded at once. The prompt's rows are not hurried for it: an
        answer of one word may never need them."""
        if not self._may_wait:
            return True
        # A pair that cannot fork would attend to cells that forks left unwritten.
        mixes = self._forking.pairs or self._forking.layer == 0
        if self._strategy.waiting != "cheapest" or not self.branches.paired or not mixes:
            return False
        self._pace.step(asked=self._asked)
        return self._pace.takes_together and not self._prompt_waits

    def _step_together(self, token: int) -> Decodes:
        original, degraded = self.branches.original, self.branches.degraded
        observe = 0 if self._observed else NONE
        if self.branches.paired:
            watch, hide = (observe, NONE, 0), (NONE, 0, 0)
            layer = self._forking.layer if self._forking.pairs else 0
            plan = self._masking.plan(
                [watch, hide], fork_layer=layer, n_below=1, record=self._slot_recorded
            )
            decoded = yield copied_row((original, degraded), token, (self.n_past,) * 2, plan)
            l_o, l_d = decoded.logits
            self._pace.together_took(decoded.seconds)
        else:
            plan = self._masking.plan([(observe, NONE, NONE)], record=self._slot_recorded)
            decoded = yield text_batch(original, [token], [self.n_past], plan)
            (l_o,) = decoded.logits
            plan = self._masking.plan([(NONE, 0, NONE)])
            decoded = yield text_batch(degraded, [token], [self.n_past], plan)
            (l_d,) = decoded.logits
        self.l_o, self.l_d = l_o, l_d
        self._newest = 0

    def _step_alone(self, token: int) -> Decodes:
        """The original's row; the degraded one waits. No more than a micro-batch of them do."""
        original = self.branches.original
        if len(self._waiting) == original.context.n_ubatch:
            yield from self.catch_up()
        slot = self._slot(len(self._waiting))
        watch = slot if self._observed else NONE, NONE, slot
        plan = self._masking.plan(
            [watch], fork_layer=self._forking.layer, n_below=1, record=self._slot_recorded
        )
        decoded = yield text_batch(original, [token], [self.n_past], plan)
        self._pace.alone_took(decoded.seconds)
        self.l_o, self.l_d = decoded.logits[0], None
        self._waiting.append((token, self.n_past))
        self._newest = slot if self._observed else 0

    def _slot(self, i_waiting: int) -> int:
        """Where what a waiting row hides is put, and its residual."""
        return self._first_slot + (0 if self._strategy.approximate else i_waiting)

    def _decode_waiting(self) -> Decodes:
        original, degraded = self.branches.original, self.branches.degraded
        if self._strategy.approximate and self.branches.paired and len(self._waiting) > 1:
            first, newest = self._waiting[0][1], self._waiting[-1][1]
            degraded.context.share_more(original.seq, degraded.seq, first, newest)
            self._waiting[:] = self._waiting[-1:]
        tokens, positions = np.array(self._waiting, np.int32).T
        degraded.context.truncate(degraded.seq, int(positions[0]))  # what a failed attempt left
        slots = [self._slot(i) for i in range(len(tokens))]
        hide = [(NONE, slot if self._observed else 0, slot) for slot in slots]
        plan = self._masking.plan(hide, fork_layer=self._forking.layer, n_below=0)
        decoded = yield text_batch(degraded, tokens, positions, plan)
        self._pace.catch_up_took(len(tokens), decoded.seconds)
        self.l_d = decoded.logits[0]
        self._waiting.clear()


def cells_of(rows: PromptRows, *, paired: bool, first_blind: int | None = None) -> int:
    """KV cells that a prompt takes in the fullest context, before any answer. first_blind: see
    `Session`."""
    first = rows.n if first_blind is None else first_blind
    return 2 * rows.n - min(rows.first_masked, first) if paired else rows.n


def cut_back(branches: Sequence[Branch], positions: Sequence[int]) -> None:
    """Drops what a failed decode wrote behind these positions. A recurrent state cannot be cut."""
    for branch, position in zip(branches, positions, strict=True):
        with suppress(BackendError):
            branch.context.truncate(branch.seq, position)


def _edges(pictures: Sequence[slice]) -> list[int]:
    return [row for picture in pictures for row in (picture.start, picture.stop)]
