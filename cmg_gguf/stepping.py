"""How a step is decoded: which branches, which rows, and when.

The degraded branch is not always needed. If one token alone is plausible by l_o, it is drawn
whatever l_d says, so the degraded row may wait until l_d is next asked for, and is then decoded
together with all others that waited, each with the image tokens hidden that its own row in the
original branch chose. Causal attention makes the rows of one batch what they would have been one
after another: same tokens, fewer decodes.

    Plain     the original branch alone
    Together  both branches at every step
    Lazy      the original branch; the degraded one when `degraded_address` is asked for

Nor is all of it needed. Below the first masked layer a row of the degraded branch is what the
original's is: same token, same position, and all it attends to is the same in turn. A fork computes
it from there on only; its cells in the layers below stay unwritten, for only rows of its own branch
would read them, and those are left out there as well. Once a row of an answer is, all later ones
must be: whether an answer forks is decided at its first step and does not change.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cmg_gguf import _core
from cmg_gguf.rows import NONE
from cmg_gguf.runtime.protocol import Context, FloatArray

if TYPE_CHECKING:
    from cmg_gguf.engine import Branch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stepping:
    """When the degraded branch is decoded.

    lazy: only where l_d is asked for; else at every step. fork: only from its first masked layer
    on, where the graph allows it. approximate: see `LazyApproximate`; only with `lazy`. The last
    two need both branches in one context, and do nothing in two.
    """

    lazy: bool = False
    fork: bool = False
    approximate: bool = False


EAGER = Stepping()


class Stepper(Protocol):
    """Decodes the tokens of one answer, from the end of its prompt on."""

    newest: int
    """Slot of the selections that the newest row hides."""

    @property
    def is_whole(self) -> bool:
        """Whether the newest row of the degraded branch is in the cache of every layer."""
        ...

    def step(self, token: int, position: int) -> None:
        """Decodes one token. Where that fails, the newest row is still the one before."""
        ...

    @property
    def original_address(self) -> int:
        """Address of l_o of the newest row, valid until the next step."""
        ...

    @property
    def degraded_address(self) -> int:
        """Address of l_d of the newest row, computed if need be; 0 = there is none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Masking:
    """What the degraded rows of an answer may not see.

    layers: masked ones, ascending. observed: whether each row chooses its own image tokens, by its
    attention in the original branch; else all hide what slot 0 holds.
    """

    layers: tuple[int, ...]
    policy: _core.TokenPolicy
    n_image_tokens: int
    observed: bool

    def plan(
        self, n_layer: int, *rows: tuple[int, int, int], fork: _core.ForkPlan | None = None
    ) -> _core.Plan:
        """What the patch does with a batch. rows: sequence, slot observed into, slot hidden."""
        return _core.Plan(
            np.array([(seq, NONE, observe, hide) for seq, observe, hide in rows], np.int32),
            n_layer=n_layer,
            observe_layers=list(self.layers),
            mask_layers=list(self.layers),
            policy=self.policy,
            n_image_tokens=self.n_image_tokens,
            fork=fork,
        )


class Forking:
    """Where the decodes of one answer fork, if they can."""

    def __init__(self, context: Context, masking: Masking, wanted: bool) -> None:
        self._context = context
        self._layer = masking.layers[0] if wanted and masking.layers else 0

    @property
    def possible(self) -> bool:
        """Whether nothing has spoken against it yet."""
        return self._layer > 0

    def plan(self, slots: Sequence[int], n_below: int) -> _core.ForkPlan | None:
        """The fork of a batch, or None. slots: the residual of each row; see csrc/fork.hpp.

        The first plan of a kind asks for a survey of the graph, and leaves nothing out.
        """
        if self._layer == 0:
            return None
        n_rows, layer = len(slots), self._layer
        obstacle = self._context.patch.fork_obstacle(layer, n_rows=n_rows, n_below=n_below)
        if obstacle:
            _log.debug("no fork at layer %d: %s", layer, obstacle)
            self._layer = 0
            return None
        survey = obstacle is None
        return _core.ForkPlan(
            layer=layer, n_below=n_rows if survey else n_below, slots=list(slots), survey=survey
        )


class Plain:
    """The original branch alone."""

    newest = NONE
    is_whole = False
    degraded_address = 0

    def __init__(self, original: Branch, address: int) -> None:
        self._branch = original
        self._batch = _Batch(1)
        self.original_address = address

    def step(self, token: int, position: int) -> None:
        self._batch.decode(self._branch, token, position, None)
        self.original_address = self._branch.context.logits_address(0)


class Together:
    """Both branches at every step: two rows of one decode, or a decode in each context."""

    newest = 0

    def __init__(
        self,
        original: Branch,
        degraded: Branch,
        masking: Masking,
        addresses: tuple[int, int],
        *,
        fork: bool,
    ) -> None:
        self._original, self._degraded = original, degraded
        self._masking = masking
        self._paired = original.context is degraded.context
        self._forking = Forking(original.context, masking, fork and self._paired)
        self._batches = [_Batch(2)] if self._paired else [_Batch(1), _Batch(1)]
        self.original_address, self.degraded_address = addresses

    @property
    def forks(self) -> bool:
        """Whether the degraded row is left out below its first masked layer, if only later on."""
        return self._forking.possible

    @property
    def is_whole(self) -> bool:
        return not self.forks

    def step(self, token: int, position: int) -> None:
        original, degraded, plan = self._original, self._degraded, self._masking.plan
        n_layer = original.context.n_layer
        watch = (original.seq, 0 if self._masking.observed else NONE, NONE)
        hide = (degraded.seq, NONE, 0)
        if self._paired:
            both = plan(n_layer, watch, hide, fork=self._forking.plan((0, 0), n_below=1))
            seqs = original.seq, degraded.seq
            self._batches[0].decode(original, token, position, both, seqs=seqs)
        else:
            self._batches[0].decode(original, token, position, plan(n_layer, watch))
            self._batches[1].decode(degraded, token, position, plan(n_layer, hide))
        self.original_address = original.context.logits_address(0)
        self.degraded_address = degraded.context.logits_address(1 if self._paired else 0)


class Lazy:
    """The original branch at every step, the degraded one when it is asked for.

    `newest` is the slot of the newest row; rows that wait hold one slot each where they are
    observed. At most n_ubatch rows wait: with one more, they are decoded though nobody asked.
    """

    def __init__(
        self,
        original: Branch,
        degraded: Branch,
        masking: Masking,
        logits: FloatArray,
        degraded_address: int,
        *,
        fork: bool,
    ) -> None:
        """logits: (n_vocab,) float32, l_o so far; overwritten with that of every step."""
        self._original, self._degraded = original, degraded
        self._masking = masking
        paired = original.context is degraded.context
        self._forking = Forking(original.context, masking, fork and paired)
        self._logits = logits
        self.original_address = logits.ctypes.data
        self._address = degraded_address
        self._batch = _Batch(1)
        self._waiting: list[tuple[int, int]] = []  # token, position
        self.newest = 0
        self.is_whole = False

    @property
    def forks(self) -> bool:
        """Whether the rows that wait are left out below their first masked layer."""
        return self._forking.possible

    def step(self, token: int, position: int) -> None:
        if len(self._waiting) == self._degraded.context.n_ubatch:
            self._catch_up()
        context, place = self._original.context, self._next_place
        watch = (self._original.seq, place if self._masking.observed else NONE, NONE)
        fork = self._forking.plan((place,), n_below=1)
        plan = self._masking.plan(context.n_layer, watch, fork=fork)
        self._batch.decode(self._original, token, position, plan)
        # The rows that wait are decoded in the same context, whose logits they replace.
        ctypes.memmove(self.original_address, context.logits_address(0), self._logits.nbytes)
        self._waiting.append((token, position))
        self.newest = place if self._masking.observed else 0

    @property
    def degraded_address(self) -> int:
        if self._waiting:
            self._catch_up()
        return self._address

    @property
    def _next_place(self) -> int:
        """The slot of the next row: of what it hides, if it is observed, and of its residual."""
        return len(self._waiting)

    def _catch_up(self) -> None:
        """Decodes the rows that wait, in order; the last one with logits."""
        context, seq, n = self._degraded.context, self._degraded.seq, len(self._waiting)
        tokens, positions = np.array(self._waiting, np.int32).T.copy()
        observed = self._masking.observed
        hide = [(seq, NONE, place if observed else 0) for place in range(n)]
        context.decode(
            tokens,
            positions,
            np.full(n, seq, np.int32),
            outputs=np.arange(n) == n - 1,
            plan=self._masking.plan(
                context.n_layer, *hide, fork=self._forking.plan(range(n), n_below=0)
            ),
        )
        self._address = context.logits_address(n - 1)
        self._waiting.clear()


class LazyApproximate(Lazy):
    """As `Lazy`, but a row that waited in vain is never decoded: the degraded branch then sees what
    the original one wrote for it.

    Costs one row where `Lazy` costs as many as waited, and is another method: for the degraded
    branch, such rows have seen the whole image. In one context only.
    """

    @property
    def _next_place(self) -> int:
        return 0

    def _catch_up(self) -> None:
        first, newest = self._waiting[0], self._waiting[-1]
        if first is not newest:
            self._degraded.context.share_more(
                self._original.seq, self._degraded.seq, first[1], newest[1]
            )
            self._waiting[:] = [newest]
        super()._catch_up()


class _Batch:
    """Arrays of a step's batch, allocated once."""

    def __init__(self, n: int) -> None:
        self._tokens = np.zeros(n, np.int32)
        self._positions = np.zeros(n, np.int32)
        self._seqs = np.zeros(n, np.int32)
        self._outputs = np.ones(n, bool)

    def decode(
        self,
        branch: Branch,
        token: int,
        position: int,
        plan: _core.Plan | None,
        *,
        seqs: tuple[int, ...] | None = None,
    ) -> None:
        """Decodes one token at one position in the branch, or in all of these sequences."""
        self._tokens[:] = token
        self._positions[:] = position
        self._seqs[:] = (branch.seq,) if seqs is None else seqs
        branch.context.decode(
            self._tokens, self._positions, self._seqs, outputs=self._outputs, plan=plan
        )
