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
from cmg_gguf.engine.batch import NONE
from cmg_gguf.engine.context import Context

_log = logging.getLogger(__name__)

FORK_ROWS = 31
"""Most rows of a decode in which some enter a fork and others are computed below it. Two are the
fewest. From 32 rows on ggml computes nodes elsewhere whose weights lie on the host."""


class Forking:
    """The forks of one answer.

    layer: where rows enter; 0 = nowhere. pairs: whether they can in a decode that computes the
    original's row as well, and not only in one of their own.
    """

    def __init__(self, context: Context, layers: Sequence[int]) -> None:
        """layers: masked ones, ascending. Nothing forks in a context that was not surveyed."""
        self.layer = layers[0] if layers else 0
        self.pairs = False
        if self.layer > 0:
            alone, paired = (
                context.patch.fork_obstacle(self.layer, shrinks=shrinks)
                for shrinks in (False, True)
            )
            for why in dict.fromkeys((alone, paired)):
                if why:
                    _log.debug("no fork at layer %d: %s", self.layer, why)
            self.layer = self.layer if alone == "" else 0
            self.pairs = paired == ""


def is_surveyed(context: Context) -> bool:
    """Whether `survey` was made."""
    return context.patch.fork_obstacle(1, shrinks=True) is not None


def obstacles(context: Context, *, paired: bool) -> dict[int, str]:
    """Why degraded rows cannot enter at layer 1, 2, ... while their originals are computed below;
    "" where they can. paired: both branches are in this context. Surveys it where it was not.
    """
    why = ""
    if context.has_state:
        why = "some layers keep a state, which would miss them"
    elif not paired:
        why = "each branch has a context of its own"
    elif not is_surveyed(context):
        survey(context)
    layers = range(1, context.n_layer)
    return {il: why or context.patch.fork_obstacle(il, shrinks=True) or "" for il in layers}


def survey(context: Context) -> None:
    """Learns what the graphs of a context allow. As many cells as the most rows are free."""
    seq = context.spare_seq
    for n in (2, min(FORK_ROWS, context.n_ubatch)):
        plan = _core.Plan(
            np.array([(seq, *[NONE] * 5)] * n, np.int32),
            [],
            fork=_core.ForkPlan(layer=0, n_below=n, survey=True),
        )
        context.decode(
            np.zeros(n, np.int32),
            np.arange(n, dtype=np.int32),
            np.full(n, seq, np.int32),
            outputs=np.ones(n, bool),
            plan=plan,
        )
        context.truncate(seq, 0)
