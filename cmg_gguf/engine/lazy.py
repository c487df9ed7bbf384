"""Steps that decode the degraded branch only where it is needed.

If one token alone is plausible by l_o, it is drawn whatever l_d says. So the degraded rows may
wait, those of the prompt too, until l_d is next asked for, and are then decoded together, each with
those image tokens hidden that its own row in the original branch chose. Causal attention makes the
rows of one batch what they would have been one after another: same tokens, fewer decodes; and where
nobody asks, none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cmg_gguf.arrays import FloatArray
from cmg_gguf.engine.fork import Forking
from cmg_gguf.engine.rows import NONE
from cmg_gguf.engine.steps import Masking, StepBatch, Together

if TYPE_CHECKING:
    from cmg_gguf.engine.context import Branch

SHARE_ASKED = 0.4
"""Share of the steps at which more than one token is plausible, while nothing else is known."""
_RATE = 0.1
"""Weight of the newest step in that share."""


@dataclass(frozen=True)
class PromptEnd:
    """Where an answer begins.

    logits: (n_vocab,) float32, l_o of the prompt's last row; overwritten with that of every step.
    decode_degraded: decodes the degraded branch's rows of the prompt and returns the address of
    l_d; called once, but where it fails. slot: what the last row hides. n_slots: slots that these
    rows need until then.
    """

    logits: FloatArray
    decode_degraded: Callable[[], int]
    slot: int = 0
    n_slots: int = 0


class Lazy:
    """The original branch at every step, the degraded one when it is asked for.

    `newest` is the slot of the newest row; rows that wait hold one slot each where they are
    observed. At most n_ubatch rows of an answer wait: with one more, they are decoded though nobody
    asked.
    """

    def __init__(
        self,
        original: Branch,
        degraded: Branch,
        masking: Masking,
        forking: Forking,
        prompt: PromptEnd,
    ) -> None:
        self._original, self._degraded = original, degraded
        self._masking = masking
        self._forking = forking
        self._prompt = prompt
        self._prompt_waits = True
        self._logits = prompt.logits
        self.original_address = prompt.logits.ctypes.data
        self._address = 0
        self._batch = StepBatch(1)
        self._waiting: list[tuple[int, int]] = []  # token, position
        self.newest = prompt.slot

    def step(self, token: int, position: int) -> None:
        if len(self._waiting) == self._degraded.context.n_ubatch:
            self._catch_up()
        context, place = self._original.context, self._next_place
        observed = self._masking.observed
        watch = (self._original.seq, place if observed else NONE, NONE)
        plan = self._masking.plan(context.n_layer, watch, fork=self._forking.noting([place]))
        self._batch.decode(self._original, token, position, plan)
        self._keep_original(context.logits_address(0))
        self._waiting.append((token, position))
        self.newest = place if observed else 0

    @property
    def degraded_address(self) -> int:
        self._catch_up()
        return self._address

    @property
    def _waits(self) -> bool:
        """Whether degraded rows wait."""
        return self._prompt_waits or bool(self._waiting)

    @property
    def _next_place(self) -> int:
        """The slot of the next row: of what it hides, if it is observed, and of its residual."""
        return self._prompt.n_slots + len(self._waiting)

    def _keep_original(self, address: int) -> None:
        """Copies l_o: the rows that wait replace the logits of their context."""
        ctypes.memmove(self.original_address, address, self._logits.nbytes)

    def _catch_up(self) -> None:
        """Decodes the rows that wait, in order; the last one with logits."""
        if self._prompt_waits:
            self._address = self._prompt.decode_degraded()
            self._prompt_waits = False
        if self._waiting:
            self._decode_waiting(self._prompt.n_slots)

    def _decode_waiting(self, first_place: int) -> None:
        """first_place: slot of the first row that waits."""
        context, seq, n = self._degraded.context, self._degraded.seq, len(self._waiting)
        tokens, positions = np.array(self._waiting, np.int32).T.copy()
        context.truncate(seq, int(positions[0]))  # what is left of an attempt that broke off
        places = range(first_place, first_place + n)
        hide = [(seq, NONE, place if self._masking.observed else 0) for place in places]
        fork = self._forking.entering(places)
        context.decode(
            tokens,
            positions,
            np.full(n, seq, np.int32),
            outputs=np.arange(n) == n - 1,
            plan=self._masking.plan(context.n_layer, *hide, fork=fork),
        )
        self._address = context.logits_address(n - 1)
        self._waiting.clear()


class Adaptive(Lazy):
    """As `Lazy` while few steps ask for l_d; as `Together` while many do.

    Any mixture of the two gives the same tokens. Nothing waits when it changes over: the step that
    makes it do so has asked.
    """

    def __init__(
        self,
        original: Branch,
        degraded: Branch,
        masking: Masking,
        forking: Forking,
        prompt: PromptEnd,
        *,
        pair_above: float,
    ) -> None:
        """pair_above: share of the steps that ask for l_d, see `Stepping`."""
        super().__init__(original, degraded, masking, forking, prompt)
        self._pair = Together(original, degraded, masking, forking, (0, 0))
        # A pair that cannot fork would attend to cells that forks left unwritten.
        self._pair_above = pair_above if forking.pairs or forking.layer == 0 else 1.0
        self._share = SHARE_ASKED
        self._asked = False

    def step(self, token: int, position: int) -> None:
        self._share += _RATE * (self._asked - self._share)
        self._asked = False
        if self._share > self._pair_above and not self._waits:
            self._pair.step(token, position)
            self._keep_original(self._pair.original_address)
            self._address, self.newest = self._pair.degraded_address, self._pair.newest
        else:
            super().step(token, position)

    @property
    def degraded_address(self) -> int:
        self._asked = True
        return super().degraded_address


class LazyApproximate(Lazy):
    """As `Lazy`, but a row that waited in vain is never decoded: the degraded branch then sees what
    the original one wrote for it.

    Costs one row where `Lazy` costs as many as waited, and is another method: for the degraded
    branch, such rows have seen the whole image. In one context only.
    """

    @property
    def _next_place(self) -> int:
        return self._prompt.n_slots

    def _decode_waiting(self, first_place: int) -> None:
        first, newest = self._waiting[0], self._waiting[-1]
        if first is not newest:
            self._degraded.context.share_more(
                self._original.seq, self._degraded.seq, first[1], newest[1]
            )
            self._waiting[:] = [newest]
        super()._decode_waiting(first_place)
