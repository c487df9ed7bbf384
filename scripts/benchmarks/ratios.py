"""Medians with their intervals, and runs in turns: how every figure of the benchmark is taken.

Times of one machine differ from hour to hour; ratios of runs that lie next to each other differ
less. So what is compared runs in the same process, by turns, and each round begins with another.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

Times = dict[str, list[float]]
"""What was measured in each round, by name: milliseconds, or MiB."""

T = TypeVar("T")


@dataclass(frozen=True)
class Middle:
    """Median of n values and its 95% interval: order statistics, the whole range below n = 6."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Middle:
        ordered = sorted(values)
        n = len(ordered)
        # Values i and n-1-i enclose the median but for a chance of 2 P(binomial(n, 1/2) <= i).
        below = accumulate(math.comb(n, i) / 2**n for i in range(n))
        i = max(0, sum(2 * chance <= 0.05 for chance in below) - 1)
        return cls(statistics.median(ordered), ordered[i], ordered[n - 1 - i], n)

    @classmethod
    def of_ratios(cls, values: Sequence[float], bases: Sequence[float]) -> Middle:
        """Of each value to the base of the same round."""
        return cls.of(value / base for value, base in zip(values, bases, strict=True))

    def __str__(self) -> str:
        interval = f" [{self.low:.2f}, {self.high:.2f}]" if self.n > 1 else ""
        return f"{self.median:.2f}{interval}"


def milliseconds(run: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def rotated(ways: Mapping[str, T], by: int) -> list[tuple[str, T]]:
    """The ways with their names, beginning with another one for each `by`."""
    items = list(ways.items())
    by %= len(items)
    return items[by:] + items[:by]


def in_turns(
    ways: Mapping[str, Callable[[], object]],
    n_rounds: int,
    report: Callable[[], None] = lambda: None,
) -> Times:
    """Milliseconds of every way in every round. report: called after each round."""
    times: Times = {name: [] for name in ways}
    for i in range(n_rounds):
        for name, run in rotated(ways, i):
            times[name].append(milliseconds(run))
        report()
    return times
