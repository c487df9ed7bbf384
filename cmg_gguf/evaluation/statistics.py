"""How sure a figure is: tables of counts a cluster, and intervals by paired resampling of clusters.

    tables = {method: table(task, items, answers[method]) for method in answers}
    results = bootstrap(task.figures, tables, baseline="plain", seed=0)
    results["guided"]["accuracy"].difference  # Estimate(value=1.2, low=0.3, high=2.2)

All methods see the same resampled clusters, so a difference is taken within each sample: what the
methods share (hard images) cancels. Intervals are percentiles of the samples (Efron and Tibshirani,
"An Introduction to the Bootstrap", 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmg_gguf.errors import EvaluationError, shown
from cmg_gguf.evaluation.task import Counts, CountsByCluster, Item, Sums, Task

Floats = NDArray[np.float64]
Values = dict[str, dict[str, float]]
"""Figures by method and name."""
Samples = dict[str, dict[str, Floats]]
"""The same, (n,) of each: a value a sample."""

LEVEL = 0.95
"""Share of the samples between the two ends of an interval."""
_CELLS = 8_000_000  # weights held at a time: 64 MB


@dataclass(frozen=True)
class CountTable:
    """Counts of each cluster. values: (n_clusters, n_counts) float64; clusters and names sorted."""

    clusters: tuple[str, ...]
    names: tuple[str, ...]
    values: Floats


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its interval, in the figure's unit; nan where undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """A figure of one method. difference: to the baseline, paired; None for the baseline itself."""

    own: Estimate
    difference: Estimate | None


def table(task: Task, items: Sequence[Item], answers: Sequence[str]) -> CountTable:
    """The counts of each cluster of the items; `answers[i]` is the answer to `items[i]`.

    The order of the items does not matter. Raises EvaluationError where there is not one answer an
    item.
    """
    if len(items) != len(answers):
        raise EvaluationError(
            f"{len(answers)} answers to {len(items)} items: give one answer for each item"
        )
    groups: dict[str, list[tuple[Item, str]]] = {}
    for item, answer in zip(items, answers, strict=True):
        groups.setdefault(item.cluster, []).append((item, answer))
    return table_of(list(groups), [_counts(task, group) for group in groups.values()])


def table_of(clusters: Sequence[str], counts: Sequence[Counts]) -> CountTable:
    """The counts of each cluster; those of the same cluster are added."""
    totals: dict[str, dict[str, float]] = {}
    for cluster, own in zip(clusters, counts, strict=True):
        add_counts(totals.setdefault(cluster, {}), own)
    ordered = tuple(sorted(totals))
    return _table(ordered, [totals[cluster] for cluster in ordered])


def _table(clusters: tuple[str, ...], counts: Sequence[Counts]) -> CountTable:
    names = tuple(sorted({name for found in counts for name in found}))
    rows = [[found.get(name, 0.0) for name in names] for found in counts]
    values = np.array(rows, dtype=np.float64).reshape(len(clusters), len(names))
    return CountTable(clusters, names, values)


def _counts(task: Task, answered: Sequence[tuple[Item, str]]) -> Counts:
    if isinstance(task, CountsByCluster):
        return task.cluster_counts(answered)
    total: dict[str, float] = {}
    for item, answer in answered:
        add_counts(total, task.counts(item, answer))
    return total


def add_counts(total: dict[str, float], counts: Mapping[str, float]) -> None:
    """Adds counts to a total, name by name."""
    for name, count in counts.items():
        total[name] = total.get(name, 0.0) + count


def sums(counts: CountTable) -> dict[str, Floats]:
    """The sum over all clusters, each of shape (): what `Task.figures` takes."""
    totals = counts.values.sum(axis=0)
    return {name: np.asarray(totals[i]) for i, name in enumerate(counts.names)}


def bootstrap(
    figures: Callable[[Sums], Mapping[str, Floats]],
    tables: Mapping[str, CountTable],
    *,
    baseline: str,
    n: int = 2000,
    seed: int = 0,
) -> dict[str, dict[str, Result]]:
    """Every figure of every method, and its difference to the baseline, with 95 % intervals.

    Args:
        figures: `Task.figures`.
        tables: by method, all of the same clusters.
        baseline: the method that the others are compared with.
        n: samples, >= 1. Each draws as many clusters as there are, with replacement.
        seed: of the resampling.

    Samples in which a figure is undefined are left out of its interval.

    Raises:
        EvaluationError: the methods' clusters differ, the baseline is none of the methods, there is
            no cluster, or n is below 1.
    """
    return compared(*resampled(figures, tables, baseline=baseline, n=n, seed=seed), baseline)


def resampled(
    figures: Callable[[Sums], Mapping[str, Floats]],
    tables: Mapping[str, CountTable],
    *,
    baseline: str,
    n: int = 2000,
    seed: int = 0,
) -> tuple[Values, Samples]:
    """Every figure of every method, and its (n,) values in samples that all methods share.

    Arguments and errors are those of `bootstrap`, which makes estimates of them.
    """
    clusters = _shared_clusters({name: t.clusters for name, t in tables.items()}, baseline)
    drawn: dict[str, list[Floats]] = {name: [] for name in tables}
    for weights in _weights(len(clusters), n, seed):
        for name, counts in tables.items():
            drawn[name].append(weights @ counts.values)
    values: Values = {}
    samples: Samples = {}
    for name, counts in tables.items():
        sampled = np.concatenate(drawn[name])
        columns = {key: sampled[:, i] for i, key in enumerate(counts.names)}
        values[name] = {key: float(v) for key, v in figures(sums(counts)).items()}
        samples[name] = dict(figures(columns))
    return values, samples


def auc(margins: Floats, labels: NDArray[np.bool_], weights: Floats | None = None) -> Floats:
    """The chance that a positive has the larger margin than a negative, 0 to 1; a tie is a half.

    Args:
        margins: (n,), logit of yes minus logit of no.
        labels: (n,), True = positive.
        weights: (n,) or (B, n), how often each item counts; None = once.

    Returns shape () or (B,); nan without positives or without negatives. Mann and Whitney, "On a
    test of whether one of two random variables is stochastically larger than the other", 1947.
    """
    w = np.ones(len(margins)) if weights is None else np.asarray(weights, dtype=np.float64)
    order = np.argsort(margins, kind="stable")
    ordered, positive, w = margins[order], labels[order], w[..., order]
    if not positive.any() or positive.all():
        return np.full(w.shape[:-1], np.nan)
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ups = np.add.reduceat(w * positive, starts, axis=-1)
    downs = np.add.reduceat(w * ~positive, starts, axis=-1)
    below = np.cumsum(downs, axis=-1) - downs
    won = np.sum(ups * (below + downs / 2), axis=-1)
    return ratio(won, ups.sum(axis=-1) * downs.sum(axis=-1))


def bootstrap_auc(
    margins: Mapping[str, Floats],
    labels: NDArray[np.bool_],
    clusters: Sequence[str],
    *,
    baseline: str,
    n: int = 2000,
    seed: int = 0,
) -> dict[str, Result]:
    """The AUC of each method in percent, and its difference to the baseline, with intervals.

    margins: by method, (n_items,). labels: (n_items,), True = yes. clusters: of each item.

    Raises EvaluationError as `bootstrap` does, and where the lengths differ or a margin is nan.
    """
    _check_margins(margins, labels, clusters)
    names = tuple(sorted(set(clusters)))
    _shared_clusters(dict.fromkeys(margins, names), baseline)
    index = np.searchsorted(np.array(names), np.array(clusters))
    samples: Samples = {name: {"auc": np.empty(0)} for name in margins}
    for weights in _weights(len(names), n, seed, width=len(clusters)):
        for name, margin in margins.items():
            part = 100 * auc(margin, labels, weights[:, index])
            samples[name]["auc"] = np.append(samples[name]["auc"], part)
    values = {name: {"auc": 100 * float(auc(m, labels))} for name, m in margins.items()}
    found = compared(values, samples, baseline)
    return {name: results["auc"] for name, results in found.items()}


def ratio(above: Floats, below: Floats) -> Floats:
    """`above / below`, nan where `below` is 0; shapes are broadcast."""
    top, bottom = np.broadcast_arrays(
        np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    )
    quotient = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=quotient, where=bottom != 0)
    return quotient


def column(totals: Sums, name: str) -> Floats:
    """The sums of that name; 0 where nothing was counted under it."""
    return totals.get(name, np.zeros(()))


def percent(above: Floats, below: Floats) -> Floats:
    """`100 * above / below`, nan where `below` is 0."""
    return 100 * ratio(above, below)


def _shared_clusters(clusters: Mapping[str, tuple[str, ...]], baseline: str) -> tuple[str, ...]:
    if baseline not in clusters:
        raise EvaluationError(
            f"baseline {shown(baseline)} is not among the methods: give one of "
            f"{', '.join(sorted(clusters)) or 'none'}"
        )
    first = clusters[baseline]
    for name, others in clusters.items():
        if others != first:
            raise EvaluationError(
                f"{shown(name)} has {len(others)} clusters and {shown(baseline)} has "
                f"{len(first)}, or others: compare methods on the same items"
            )
    if not first:
        raise EvaluationError("no item was answered: an interval needs at least one")
    return first


def _check_margins(
    margins: Mapping[str, Floats], labels: NDArray[np.bool_], clusters: Sequence[str]
) -> None:
    for name, values in margins.items():
        if len(values) != len(labels) or len(values) != len(clusters):
            raise EvaluationError(
                f"{shown(name)} has {len(values)} margins, {len(labels)} labels and "
                f"{len(clusters)} clusters: give one of each for each item"
            )
        if np.isnan(values).any():
            raise EvaluationError(
                f"{shown(name)} has margins that are nan: leave those items out of all methods"
            )


def _weights(n_clusters: int, n: int, seed: int, width: int | None = None) -> Iterator[Floats]:
    """How often each cluster is drawn, (up to B, n_clusters) at a time, `n` rows in all."""
    if n < 1:
        raise EvaluationError(f"n={n} samples: give at least 1")
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS // max(n_clusters, width or 0))
    shares = np.full(n_clusters, 1 / n_clusters)
    for start in range(0, n, block):
        rows = min(block, n - start)
        yield rng.multinomial(n_clusters, shares, size=rows).astype(np.float64)


def compared(
    values: Mapping[str, Mapping[str, float]], samples: Samples, baseline: str
) -> dict[str, dict[str, Result]]:
    """Estimates of each figure and of its difference to the baseline's."""
    found: dict[str, dict[str, Result]] = {}
    for name, figures in values.items():
        found[name] = {}
        for figure, value in figures.items():
            own = estimate(value, samples[name][figure])
            difference = None
            if name != baseline:
                difference = estimate(
                    value - values[baseline][figure],
                    samples[name][figure] - samples[baseline][figure],
                )
            found[name][figure] = Result(own, difference)
    return found


def estimate(value: float, samples: Floats) -> Estimate:
    """With percentiles of the samples, (n,); those that are undefined are left out."""
    known = samples[np.isfinite(samples)]
    if not len(known):
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))
