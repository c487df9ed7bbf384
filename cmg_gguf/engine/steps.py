"""How the steps of an answer are decoded: both branches together, or the degraded one when asked.

    together     two rows of one decode: the original's, and the degraded one
    waiting      the original's row alone; the degraded one waits until a token needs it, and is
                 then decoded with all that waited before it (catch-up rows)

If one token alone is plausible by l_o, it is drawn whatever l_d says, so a row may wait in vain.
Causal attention makes the rows of one batch what they would have been one after another: any
mixture of the two ways gives the same logits, but for rounding.

Beside other answers a step goes together: what fills a decode is then not one answer's to choose.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from cmg_gguf import _core
from cmg_gguf.engine.batch import NONE, RowPlan
from cmg_gguf.guidance import Guidance


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Which of these ways an engine takes.

    waiting: whether degraded rows wait: "never", "always", or where that is the cheaper way by the
    engine's own clock. fork: they are computed from the first masked layer on, where the graph
    allows it, see `cmg_gguf.engine.fork`. approximate: rows that waited in vain are never decoded:
    the degraded branch then sees what the original one wrote for them, which is another method.
    `fork` and `approximate` need both branches in one context, and do nothing in two.
    """

    waiting: Literal["never", "always", "cheapest"] = "never"
    fork: bool = False
    approximate: bool = False

    def may_wait(self, guidance: Guidance) -> bool:
        """Whether a row could wait in vain: without a cut, every token needs both branches."""
        return self.waiting != "never" and guidance.beta > 0


EAGER = Strategy()
EXACT = Strategy(fork=True)
AUTO = Strategy(waiting="cheapest", fork=True)
APPROXIMATE = Strategy(waiting="always", fork=True, approximate=True)

SHARE_ASKED = 0.4
"""Share of the steps at which more than one token is plausible, while nothing else is known."""


class Pace:
    """What either way of a step costs, timed while one answer alone is decoded.

    Each way is tried for a few steps; then the cheaper one is taken, and the other tried again now
    and then. Costs are medians of the newest times, in seconds a token. company: whether several
    answers are decoded; nothing is timed then.
    """

    N_TRIED = 5
    """Steps of each way before they are compared."""
    N_NEWEST = 9
    """Times that count: so few that one more try can change the verdict."""
    TRIED_AGAIN = 512
    """Steps after which the dearer way is tried again."""
    MARGIN = 0.02
    """How much cheaper the other way must be: changing over makes llama.cpp build a new graph."""

    def __init__(self) -> None:
        self.company = False
        self._together: deque[float] = deque(maxlen=self.N_NEWEST)
        self._alone: deque[float] = deque(maxlen=self.N_NEWEST)
        self._catch_up: dict[int, deque[float]] = {}
        self._share_asked = SHARE_ASKED
        self._is_together = True
        self._n_steps = 0

    @property
    def takes_together(self) -> bool:
        """Whether the next step is to decode both branches together."""
        return self._is_together or self.company

    def step(self, *, asked: bool) -> None:
        """Chooses the way of the next step. asked: whether the one before needed l_d."""
        if self.company:
            return
        self._share_asked += 0.1 * (asked - self._share_asked)
        self._n_steps += 1
        if len(self._together) < self.N_TRIED:
            self._is_together = True
        elif len(self._alone) < self.N_TRIED or not self._catch_up:
            self._is_together = False
        elif self._n_steps % self.TRIED_AGAIN < self.N_TRIED:
            self._is_together = not self._together_is_cheaper()
        else:
            self._is_together = self._together_is_cheaper()

    def together_took(self, seconds: float | None) -> None:
        """Notes what a step of both branches took; None = not known."""
        if seconds is not None:
            self._together.append(seconds)

    def alone_took(self, seconds: float | None) -> None:
        """Notes what a step of the original branch took."""
        if seconds is not None:
            self._alone.append(seconds)

    def catch_up_took(self, n_rows: int, seconds: float | None) -> None:
        """Notes what it took to decode n_rows rows that had waited."""
        if seconds is not None:
            self._catch_up.setdefault(n_rows, deque(maxlen=5)).append(seconds)

    def _together_is_cheaper(self) -> bool:
        together, waiting = median(self._together), self._waiting_costs()
        if self._is_together:
            return together <= waiting * (1 + self.MARGIN)
        return together * (1 + self.MARGIN) < waiting

    def _waiting_costs(self) -> float:
        """Rows that catch up: as many as steps lie between two that ask."""
        n_rows = 1 / max(self._share_asked, 1e-3)
        known = sorted(self._catch_up)
        costs = [median(self._catch_up[n]) for n in known]
        beyond = max(1.0, n_rows / known[-1])
        return median(self._alone) + self._share_asked * beyond * float(
            np.interp(n_rows, known, costs)
        )


class Filling:
    """In how many rows a small decode is best made: as it is, or filled up with rows of no use.

    CPU kernels take rows by four, so a decode of three can cost more than one of four. Both are
    tried for each shape; then the one that took less is taken.
    """

    N_TRIED = 3
    """Times of each shape that are compared."""
    MARGIN = 0.02
    """How much less the filled one must have taken."""
    MOST = 16
    """Rows from which on a few more or less are all one."""

    def __init__(self) -> None:
        self._times: dict[tuple[int, int], deque[float]] = {}

    def n_padding(self, n_below: int, n_rows: int) -> int:
        """Rows to add to n_rows, of which n_below are computed from the start."""
        filled = -(-n_rows // 4) * 4
        if n_rows < 2 or n_rows >= self.MOST or filled == n_rows:
            return 0
        plain = self._times.get((n_below, n_rows), ())
        if len(plain) < self.N_TRIED:
            return 0
        # Where nothing enters a fork, padding is computed from the start as well.
        below = filled if n_below == n_rows else n_below
        padded = self._times.get((below, filled), ())
        cheaper = len(padded) < self.N_TRIED or median(padded) < (1 - self.MARGIN) * median(plain)
        return filled - n_rows if cheaper else 0

    def took(self, n_below: int, n_rows: int, seconds: float) -> None:
        """Notes what a decode of so many rows took, padding included."""
        if n_rows <= self.MOST:
            self._times.setdefault((n_below, n_rows), deque(maxlen=5)).append(seconds)


@dataclass(frozen=True, kw_only=True)
class Masking:
    """What the degraded rows of an answer's tokens may not see.

    layers: masked ones, ascending. observed: whether each row chooses its own image tokens, by its
    attention in the original branch; else all hide what slot 0 holds. recording: where what the
    original's rows attend to is recorded; None = nowhere.
    """

    selections: _core.Selections
    residuals: _core.Residuals
    layers: tuple[int, ...]
    policy: _core.TokenPolicy
    n_image_tokens: int
    observed: bool
    recording: _core.Recording | None = None

    def plan(
        self,
        rows: Sequence[tuple[int, int, int]],
        *,
        fork_layer: int = 0,
        n_below: int = 0,
        record: int = NONE,
    ) -> RowPlan:
        """What the patch does with a batch. rows: slot observed into, slot hidden, residual.
        record: slot of the recording for the newest original row; nothing without a recording."""
        part = _core.Part(
            selections=self.selections,
            residuals=self.residuals,
            observe_layers=list(self.layers),
            mask_layers=list(self.layers),
            policy=self.policy,
            n_image_tokens=self.n_image_tokens,
            recording=self.recording,
            record=NONE if self.recording is None else record,
        )
        table = np.array([(NONE, *row) for row in rows], np.int32)
        if fork_layer == 0:
            table[:, 3] = NONE
        return RowPlan(part, table, fork_layer, n_below)
