"""Tables of counts, paired resampling of clusters, and the area under the curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.statistics import (
    CountTable,
    auc,
    bootstrap,
    bootstrap_auc,
    percent,
    ratio,
    sums,
    table,
)
from cmg_gguf.evaluation.task import Item, Sums

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Echo:
    """Counts answers, and those that say x."""

    name: ClassVar[str] = "echo"
    yes_no: ClassVar[bool] = False

    def items(self) -> Sequence[Item]:
        return [Item(f"i{k}", None, "?", cluster=f"c{k % 3}") for k in range(7)]

    def load(self, item: Item) -> Path:
        raise AssertionError("no item has an image")

    def counts(self, item: Item, answer: str) -> Mapping[str, float]:
        return {"n": 1, "x": answer.count("x")}

    def figures(self, sums: Sums) -> dict[str, Floats]:
        return {"share": percent(sums["x"], sums["n"])}


class Pairs(Echo):
    """Counts clusters all of whose answers say x."""

    def cluster_counts(self, answered: Sequence[tuple[Item, str]]) -> Mapping[str, float]:
        return {"n": 1, "x": float(all(answer == "x" for _, answer in answered))}


ANSWERS = ["x", "x", "", "x", "", "", "x"]  # clusters: c0 = x x x, c1 = x -, c2 = - -


def random_table(seed: int, n: int = 40) -> CountTable:
    rng = np.random.default_rng(seed)
    right = rng.integers(0, 4, n).astype(float)
    return CountTable(
        tuple(f"{k:03}" for k in range(n)), ("n", "x"), np.stack([np.full(n, 3.0), right], axis=1)
    )


def test_a_table_has_the_counts_of_each_cluster() -> None:
    found = table(Echo(), Echo().items(), ANSWERS)
    assert (found.clusters, found.names) == (("c0", "c1", "c2"), ("n", "x"))
    np.testing.assert_array_equal(found.values, [[3, 3], [2, 1], [2, 0]])
    assert {name: float(v) for name, v in sums(found).items()} == {"n": 7, "x": 4}


def test_a_task_can_count_a_cluster_as_a_whole() -> None:
    found = table(Pairs(), Echo().items(), ANSWERS)
    np.testing.assert_array_equal(found.values, [[1, 1], [1, 0], [1, 0]])


def test_the_order_of_items_does_not_matter() -> None:
    items = Echo().items()
    for task in (Echo(), Pairs()):
        first = table(task, items, ANSWERS)
        order = np.random.default_rng(0).permutation(len(items))
        second = table(task, [items[i] for i in order], [ANSWERS[i] for i in order])
        assert first.clusters == second.clusters
        np.testing.assert_array_equal(first.values, second.values)


def test_a_table_wants_one_answer_an_item() -> None:
    with pytest.raises(EvaluationError, match="6 answers to 7 items"):
        table(Echo(), Echo().items(), ANSWERS[1:])


def test_a_table_of_no_items_is_empty() -> None:
    found = table(Echo(), [], [])
    assert (found.clusters, found.names, found.values.shape) == ((), (), (0, 0))
    assert sums(found) == {}


def test_the_bootstrap_equals_a_plain_loop() -> None:
    tables = {"plain": random_table(1), "guided": random_table(2)}
    n, size, seed = 300, 40, 5
    rng = np.random.default_rng(seed)
    own: dict[str, list[float]] = {name: [] for name in tables}
    for _ in range(n):
        weights = rng.multinomial(size, [1 / size] * size)
        for name, counts in tables.items():
            total = np.zeros(2)
            for row, times in zip(counts.values, weights, strict=True):
                for _ in range(times):
                    total += row
            own[name].append(100 * total[1] / total[0])
    found = bootstrap(Echo().figures, tables, baseline="plain", n=n, seed=seed)
    for name in tables:
        result = found[name]["share"].own
        low, high = np.quantile(own[name], [0.025, 0.975])
        assert (result.low, result.high) == pytest.approx((low, high))
        assert result.value == pytest.approx(
            100 * tables[name].values[:, 1].sum() / tables[name].values[:, 0].sum()
        )
    gains = np.array(own["guided"]) - np.array(own["plain"])
    difference = found["guided"]["share"].difference
    assert difference is not None
    assert (difference.low, difference.high) == pytest.approx(
        tuple(np.quantile(gains, [0.025, 0.975]))
    )
    assert found["plain"]["share"].difference is None


def test_samples_are_paired_so_that_a_constant_gain_has_no_spread() -> None:
    base = random_table(3)
    better = CountTable(base.clusters, base.names, base.values + np.array([0, 0.3]))
    found = bootstrap(Echo().figures, {"a": base, "b": better}, baseline="a", n=200)
    difference = found["b"]["share"].difference
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == pytest.approx((10, 10, 10))
    assert found["b"]["share"].own.high - found["b"]["share"].own.low > 5


def test_results_depend_on_the_seed_alone() -> None:
    tables = {"a": random_table(1), "b": random_table(2)}

    def run(seed: int) -> float:
        return bootstrap(Echo().figures, tables, baseline="a", n=100, seed=seed)["b"][
            "share"
        ].own.low

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_large_tables_are_resampled_in_blocks_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = {"a": random_table(1), "b": random_table(2)}
    whole = bootstrap(Echo().figures, tables, baseline="a", n=101, seed=4)
    monkeypatch.setattr("cmg_gguf.evaluation.statistics._CELLS", 400)
    assert bootstrap(Echo().figures, tables, baseline="a", n=101, seed=4) == whole


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng, truth, hits, runs = np.random.default_rng(0), 0.7, 0, 200
    for run in range(runs):
        right = rng.binomial(5, truth, 60).astype(float)
        values = np.stack([np.full(60, 5.0), right], axis=1)
        counts = CountTable(tuple(map(str, range(60))), ("n", "x"), values)
        own = bootstrap(Echo().figures, {"a": counts}, baseline="a", n=400, seed=run)["a"][
            "share"
        ].own
        hits += own.low <= 100 * truth <= own.high
    assert 0.88 <= hits / runs <= 0.99


def test_clusters_are_resampled_whole() -> None:
    """Ten equal answers an image are one observation, not ten: the interval is as wide."""
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, 50).astype(float)
    names = tuple(f"{k:02}" for k in range(50))
    one = CountTable(names, ("n", "x"), np.stack([np.ones(50), right], axis=1))
    ten = CountTable(names, ("n", "x"), 10 * one.values)
    results = [
        bootstrap(Echo().figures, {"a": t}, baseline="a", n=500)["a"]["share"] for t in (one, ten)
    ]
    assert results[0].own.low == pytest.approx(results[1].own.low)
    assert results[0].own.high == pytest.approx(results[1].own.high)


def test_undefined_figures_give_nan_and_no_warning() -> None:
    empty = CountTable(("a", "b"), ("n", "x"), np.zeros((2, 2)))
    tables = {"plain": empty, "guided": empty}
    result = bootstrap(Echo().figures, tables, baseline="plain", n=10)["guided"]["share"]
    assert result.difference is not None
    for estimate in (result.own, result.difference):
        assert np.isnan([estimate.value, estimate.low, estimate.high]).all()


def test_samples_without_the_figure_are_left_out_of_its_interval() -> None:
    counts = CountTable(("a", "b"), ("n", "x"), np.array([[1.0, 1.0], [0.0, 0.0]]))
    own = bootstrap(Echo().figures, {"m": counts}, baseline="m", n=100)["m"]["share"].own
    assert (own.value, own.low, own.high) == (100, 100, 100)


@pytest.mark.parametrize(
    ("tables", "baseline", "n", "message"),
    [
        ({"a": random_table(1)}, "b", 10, "baseline 'b' is not among the methods: give one of a"),
        ({"a": random_table(1), "b": random_table(1, 39)}, "a", 10, "39 clusters and 'a' has 40"),
        ({"a": random_table(1, 0)}, "a", 10, "no item was answered"),
        ({"a": random_table(1)}, "a", 0, "n=0 samples: give at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tables: dict[str, CountTable], baseline: str, n: int, message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        bootstrap(Echo().figures, tables, baseline=baseline, n=n)


def loop_auc(margins: Floats, labels: NDArray[np.bool_], weights: Floats) -> float:
    won = total = 0.0
    for m, w in zip(margins[labels], weights[labels], strict=True):
        for other, v in zip(margins[~labels], weights[~labels], strict=True):
            won += w * v * (1.0 if m > other else 0.5 if m == other else 0.0)
            total += w * v
    return won / total


def test_auc_equals_the_count_of_ordered_pairs_with_ties_and_weights() -> None:
    rng = np.random.default_rng(1)
    margins = rng.integers(-3, 4, 60).astype(float)  # many ties
    labels = rng.random(60) < 0.4
    weights = rng.integers(0, 3, (5, 60)).astype(float)
    assert float(auc(margins, labels)) == pytest.approx(loop_auc(margins, labels, np.ones(60)))
    np.testing.assert_allclose(
        auc(margins, labels, weights), [loop_auc(margins, labels, w) for w in weights]
    )


def test_auc_of_perfect_reversed_and_blind_margins() -> None:
    labels = np.array([True, True, False, False])
    assert auc(np.array([2.0, 3.0, 0.0, 1.0]), labels) == 1
    assert auc(np.array([0.0, 1.0, 2.0, 3.0]), labels) == 0
    assert auc(np.zeros(4), labels) == 0.5


def test_auc_without_one_of_the_classes_is_nan() -> None:
    assert np.isnan(auc(np.arange(3.0), np.ones(3, dtype=bool)))
    weights = np.array([[0.0, 1.0], [1.0, 1.0]])
    found = auc(np.array([1.0, 0.0]), np.array([True, False]), weights)
    assert np.isnan(found[0])
    assert found[1] == 1


def test_auc_intervals_resample_clusters_and_are_paired() -> None:
    rng = np.random.default_rng(2)
    labels = rng.random(120) < 0.5
    weak = rng.standard_normal(120) + labels
    margins = {"plain": weak, "shifted": weak + 3, "strong": weak + 2 * labels}
    clusters = [f"image{k // 3}" for k in range(120)]
    found = bootstrap_auc(margins, labels, clusters, baseline="plain", n=300)
    same, better = found["shifted"].difference, found["strong"].difference
    assert same is not None
    assert better is not None
    assert (same.value, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-9)
    assert 0 < better.low < better.value < better.high
    assert found["plain"].own.value == pytest.approx(100 * float(auc(weak, labels)))
    assert found["plain"].own.low < found["plain"].own.value < found["plain"].own.high


def test_auc_intervals_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(3)
    labels, margins = rng.random(30) < 0.5, rng.standard_normal(30)
    clusters = [f"{k % 7}" for k in range(30)]
    found = bootstrap_auc({"a": margins}, labels, clusters, baseline="a", n=50, seed=9)["a"].own
    draws = np.random.default_rng(9)
    values = []
    for _ in range(50):
        weights = draws.multinomial(7, [1 / 7] * 7)
        each = np.array([weights[int(cluster)] for cluster in clusters], dtype=float)
        values.append(100 * loop_auc(margins, labels, each))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


@pytest.mark.parametrize(
    ("margins", "message"),
    [([1.0], "1 margins, 2 labels and 2 clusters"), ([1.0, float("nan")], "margins that are nan")],
)
def test_margins_that_do_not_fit_are_refused(margins: list[float], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        bootstrap_auc(
            {"a": np.array(margins)}, np.array([True, False]), ["x", "y"], baseline="a", n=5
        )


def test_ratios_never_divide_by_zero() -> None:
    found = ratio(np.array([1.0, 0.0, 3.0]), np.array([2.0, 0.0, 0.0]))
    np.testing.assert_array_equal(found, [0.5, np.nan, np.nan])
    assert np.isnan(percent(np.zeros(()), np.zeros(())))
