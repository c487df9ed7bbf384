"""Names for the ways of stepping, and how one is chosen by what each costs. Values only.

    STEPPING["lazy"]    # Stepping(lazy=True, fork=True)
    costs.best()        # "adaptive"; for `costs` see `cmg_gguf.calibration`

All but "lazy-approximate" give the same tokens, but for rounding; that one is never chosen here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from cmg_gguf.engine.lazy import SHARE_ASKED
from cmg_gguf.engine.steps import Stepping
from cmg_gguf.errors import UnsupportedError

Strategy = Literal["auto", "eager", "fork", "lazy", "adaptive", "lazy-approximate"]

STEPPING: dict[str, Stepping] = {
    "eager": Stepping(),
    "fork": Stepping(fork=True),
    "lazy": Stepping(lazy=True, fork=True),
    "adaptive": Stepping(lazy=True, fork=True, pair_above=0.5),
    "lazy-approximate": Stepping(lazy=True, fork=True, approximate=True),
}
CAUGHT_UP = (1, 4, 8)
"""Rows that wait, in the batches that are timed."""


def check_strategy(strategy: str, pairing: str) -> None:
    """Raises UnsupportedError for a name that is none, or a strategy this pairing cannot follow."""
    if strategy not in get_args(Strategy):
        raise UnsupportedError(
            f"strategy={strategy!r} is unknown: one of {', '.join(get_args(Strategy))}"
        )
    if strategy == "lazy-approximate" and pairing == "contexts":
        raise UnsupportedError(
            'strategy="lazy-approximate" shares KV cells and two contexts have none in common; '
            'use "lazy"'
        )


@dataclass(frozen=True)
class Costs:
    """Median milliseconds of what steps are made of.

    plain: a step of the original branch alone. pair, fork: of both. lazy: of the original branch
    with what catching up needs. catch_up: of decoding this many rows that waited, by `CAUGHT_UP`.
    forks: whether the graph let the pair and the rows that waited leave layers out.
    """

    plain: float
    pair: float
    fork: float
    lazy: float
    catch_up: tuple[float, ...]
    forks: tuple[bool, bool]

    def __post_init__(self) -> None:
        times = (self.plain, self.pair, self.fork, self.lazy, *self.catch_up)
        if len(self.catch_up) != len(CAUGHT_UP) or not all(0 < ms < math.inf for ms in times):
            raise ValueError(f"costs {times} are no {4 + len(CAUGHT_UP)} positive times")

    def per_token(self, share_asked: float = SHARE_ASKED) -> dict[str, float]:
        """Expected milliseconds of a guided token by exact strategy.

        share_asked: of the steps, above 0 to 1, that need the degraded branch.
        """
        n_waiting, most = 1 / share_asked, CAUGHT_UP[-1]
        waiting = float(np.interp(n_waiting, CAUGHT_UP, self.catch_up)) * max(1, n_waiting / most)
        lazy = self.lazy + share_asked * waiting
        return {
            "eager": self.pair,
            "fork": self.fork,
            "lazy": lazy,
            "adaptive": min(self.fork, lazy),
        }

    def best(self) -> str:
        """The exact strategy with the lowest expected cost: "adaptive", unless "eager" costs no
        more. What "fork" or "lazy" would win, "adaptive" does."""
        costs = self.per_token()
        return min(("eager", "adaptive"), key=lambda name: costs[name])

    def stepping(self, name: str) -> Stepping:
        """The way of stepping of this name, with the share at which "adaptive" changes over."""
        if name != "adaptive":
            return STEPPING[name]
        shares = [share / 100 for share in range(1, 101)]
        lazy = [share for share in shares if self.per_token(share)["lazy"] < self.fork]
        return replace(STEPPING[name], pair_above=max(lazy, default=0.0))
