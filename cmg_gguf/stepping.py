"""How a step is decoded: which branches, which rows, and when.

    Plain     the original branch alone
    Together  both branches at every step
    Lazy      the original branch; the degraded one when it is asked for: `cmg_gguf.lazy`

Not all of the degraded branch is needed. Below the first masked layer a row of it is what the
original's is: same token, same position, and all it attends to is the same in turn. A fork computes
it from there on only; its cells in the layers below stay unwritten, for only rows of its own branch
would read them, and those are left out there as well. Once a row of an answer is, all later ones
must be.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cmg_gguf import _core
from cmg_gguf.errors import BackendError
from cmg_gguf.rows import NONE
from cmg_gguf.runtime.protocol import Context

if TYPE_CHECKING:
    from cmg_gguf.engine import Branch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stepping:
    """When the degraded branch is decoded.

    lazy: only where l_d is asked for; else at every step. fork: only from its first masked layer
    on, where the graph allows it. pair_above: with `lazy`, share of the steps that ask for l_d
    above which both branches are decoded together, 0 to 1; 1 = never. approximate: with `lazy`, see
    `LazyApproximate`. All but `lazy` need both branches in one context, and do nothing in two.
    """

    lazy: bool = False
    fork: bool = False
    pair_above: float = 1.0
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
        self._left_out = False

    @property
    def possible(self) -> bool:
        """Whether nothing has spoken against it yet."""
        return self._layer > 0

    def can_pair(self, whole_pair: Callable[[_core.ForkPlan], None]) -> bool:
        """Whether both branches may be decoded together without computing a row that others left.

        whole_pair: decodes both as this plan says, and takes it back; called once a context, for
        the survey. Always True where nothing is left out at all.
        """
        if self._layer == 0:
            return True
        if self._obstacle(2, 1) is None:
            whole_pair(_core.ForkPlan(layer=self._layer, n_below=2, slots=[0, 0], survey=True))
        return self._obstacle(2, 1) == ""

    def plan(self, slots: Sequence[int], n_below: int) -> _core.ForkPlan | None:
        """The fork of a batch, or None. slots: the residual of each row; see csrc/fork.hpp.

        The first single row is surveyed on the way, with all that it needs to be entered later.
        """
        if self._layer == 0:
            return None
        n_rows, layer = len(slots), self._layer
        obstacle = self._obstacle(n_rows, n_below)
        if obstacle:
            if self._left_out:
                raise BackendError(f"rows were left out below layer {layer} and no longer can be")
            _log.debug("no fork at layer %d: %s", layer, obstacle)
            self._layer = 0
            return None
        self._left_out = self._left_out or n_below < n_rows
        return _core.ForkPlan(
            layer=layer, n_below=n_below, slots=list(slots), survey=obstacle is None
        )

    def _obstacle(self, n_rows: int, n_below: int) -> str | None:
        """Why such a decode cannot be; "" = it can, None = its graph was not surveyed yet."""
        patch = self._context.patch
        return patch.fork_obstacle(self._layer, n_rows=n_rows, n_below=n_below)


class Plain:
    """The original branch alone."""

    newest = NONE
    is_whole = False
    degraded_address = 0

    def __init__(self, original: Branch, address: int) -> None:
        self._branch = original
        self._batch = StepBatch(1)
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
        forking: Forking,
    ) -> None:
        self._original, self._degraded = original, degraded
        self._masking = masking
        self._paired = original.context is degraded.context
        self._forking = forking
        self._watch = (original.seq, 0 if masking.observed else NONE, NONE)
        self._hide = (degraded.seq, NONE, 0)
        self._batches = [StepBatch(2)] if self._paired else [StepBatch(1), StepBatch(1)]
        self.original_address, self.degraded_address = addresses

    @property
    def is_whole(self) -> bool:
        return not self._forking.possible

    def step(self, token: int, position: int) -> None:
        original, degraded = self._original, self._degraded
        if self._paired:
            self.possible(token, position)
            self._decode_pair(token, position, self._forking.plan((0, 0), n_below=1))
        else:
            plan, n_layer = self._masking.plan, original.context.n_layer
            self._batches[0].decode(original, token, position, plan(n_layer, self._watch))
            self._batches[1].decode(degraded, token, position, plan(n_layer, self._hide))
        self.original_address = original.context.logits_address(0)
        self.degraded_address = degraded.context.logits_address(1 if self._paired else 0)

    def possible(self, token: int, position: int) -> bool:
        """See `Forking.can_pair`; surveys with this step, if that has to be, and takes it back."""

        def whole_pair(survey: _core.ForkPlan) -> None:
            self._decode_pair(token, position, survey)
            for branch in (self._original, self._degraded):
                branch.context.truncate(branch.seq, position)

        return self._forking.can_pair(whole_pair)

    def _decode_pair(self, token: int, position: int, fork: _core.ForkPlan | None) -> None:
        plan = self._masking.plan(
            self._original.context.n_layer, self._watch, self._hide, fork=fork
        )
        seqs = self._original.seq, self._degraded.seq
        self._batches[0].decode(self._original, token, position, plan, seqs=seqs)


class StepBatch:
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
