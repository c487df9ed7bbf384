"""How a step is decoded: which branches, which rows, and when.

    Plain     the original branch alone
    Together  both branches at every step
    Lazy      the original branch; the degraded one when it is asked for: `cmg_gguf.engine.lazy`

Not all of the degraded branch is needed, see `cmg_gguf.engine.fork`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cmg_gguf import _core
from cmg_gguf.engine.fork import Forking
from cmg_gguf.engine.rows import NONE

if TYPE_CHECKING:
    from cmg_gguf.engine.context import Branch


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


class Plain:
    """The original branch alone."""

    newest = NONE
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
        forking: Forking,
        addresses: tuple[int, int],
    ) -> None:
        """addresses: of l_o and l_d of the prompt's last row."""
        self._original, self._degraded = original, degraded
        self._masking = masking
        self._paired = original.context is degraded.context
        self._forking = forking
        self._watch = (original.seq, 0 if masking.observed else NONE, NONE)
        self._hide = (degraded.seq, NONE, 0)
        self._batches = [StepBatch(2)] if self._paired else [StepBatch(1), StepBatch(1)]
        self.original_address, self.degraded_address = addresses

    def step(self, token: int, position: int) -> None:
        original, degraded = self._original, self._degraded
        plan, n_layer = self._masking.plan, original.context.n_layer
        if self._paired:
            both = plan(n_layer, self._watch, self._hide, fork=self._forking.pair)
            seqs = original.seq, degraded.seq
            self._batches[0].decode(original, token, position, both, seqs=seqs)
        else:
            self._batches[0].decode(original, token, position, plan(n_layer, self._watch))
            self._batches[1].decode(degraded, token, position, plan(n_layer, self._hide))
        self.original_address = original.context.logits_address(0)
        self.degraded_address = degraded.context.logits_address(1 if self._paired else 0)


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
