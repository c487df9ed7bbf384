"""Forks: rows of the degraded branch are decoded from the first masked layer on.

Below that layer such a row is what the original's is: same token, same position, and all it
attends to is the same in turn. So the original's residual stream is noted there, and the degraded
row enters with it. Its cells in the layers below stay unwritten, for only rows of its own branch
would read them, and those are left out there as well: once a row is, all later ones must be.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from cmg_gguf import _core
from cmg_gguf.engine.context import Branches, Context
from cmg_gguf.engine.rows import NONE

_log = logging.getLogger(__name__)


class Forking:
    """The forks of one answer.

    layer: where rows enter; 0 = nowhere. pairs: whether they can in a decode that computes the
    original's row as well, and not only in one of their own.
    """

    def __init__(self, context: Context, layers: Sequence[int]) -> None:
        """layers: masked ones, ascending. The context was surveyed, see `survey`."""
        self.layer = layers[0] if layers else 0
        self.pairs = False
        if self.layer > 0:
            alone, paired = (
                context.patch.fork_obstacle(self.layer, n_rows=n, n_below=n - 1) for n in (1, 2)
            )
            for obstacle in dict.fromkeys((alone, paired)):
                if obstacle != "":
                    _log.debug("no fork at layer %d: %s", self.layer, obstacle)
            self.layer = self.layer if alone == "" else 0
            self.pairs = paired == ""

    @property
    def pair(self) -> _core.ForkPlan | None:
        """For a decode of a row and the degraded row that is its copy."""
        if not self.pairs:
            return None
        return _core.ForkPlan(layer=self.layer, n_below=1, slots=[0, 0])

    def noting(self, slots: Sequence[int]) -> _core.ForkPlan | None:
        """For rows of the original branch. slots: where each one's residual is put."""
        if self.layer == 0:
            return None
        return _core.ForkPlan(layer=self.layer, n_below=len(slots), slots=list(slots))

    def entering(self, slots: Sequence[int]) -> _core.ForkPlan | None:
        """For rows of the degraded branch. slots: where each one's residual was put."""
        if self.layer == 0:
            return None
        return _core.ForkPlan(layer=self.layer, n_below=0, slots=list(slots))


def is_surveyed(context: Context) -> bool:
    """Whether `survey` was made."""
    return context.patch.fork_obstacle(1, n_rows=2, n_below=1) is not None


def survey(branches: Branches) -> None:
    """Learns what the graphs of a context allow. Its branches are empty, and two cells free."""
    context = branches.original.context
    first, second = branches.original.seq, branches.degraded.seq
    for seqs in ((first,), (first, second)):
        n = len(seqs)
        zeros = np.zeros(n, np.int32)
        plan = _core.Plan(
            np.full((n, 4), NONE, np.int32),
            n_layer=context.n_layer,
            observe_layers=[],
            mask_layers=[],
            policy=_core.TokenPolicy(_core.TokenRule.top_ratio, 1.0),
            n_image_tokens=0,
            fork=_core.ForkPlan(layer=0, n_below=n, slots=[], survey=True),
        )
        context.decode(zeros, zeros, np.array(seqs, np.int32), outputs=np.ones(n, bool), plan=plan)
        for seq in seqs:
            context.truncate(seq, 0)
