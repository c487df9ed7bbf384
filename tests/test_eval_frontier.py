"""Curves of strengths: what is run, what they reach, and how they are shown."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from embedded.frontier import matched, sampled
from evals import GUIDANCE
from numpy.typing import NDArray
from rich.console import Console

from cmg_gguf import EvaluationError, Guidance, LayerRange, TopRatio
from cmg_gguf.evaluation.frontier import curves, reached_at, strength_at, swept, value_at
from cmg_gguf.evaluation.items import item_hash
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.method import point_name, point_of
from cmg_gguf.evaluation.methods import METHODS, Cmg
from cmg_gguf.evaluation.plots import write_plots
from cmg_gguf.evaluation.relatives import M3id, Vcd
from cmg_gguf.evaluation.report import make_report
from cmg_gguf.evaluation.report_text import markdown, rendered
from cmg_gguf.evaluation.run import evaluate, read_run
from cmg_gguf.evaluation.tasks.scenes import SceneCaptions, ScenePope
from cmg_gguf.guidance import Disagreement
from cmg_gguf.tiny.pair import embedded_pair

NAMES = ["greedy", "cmg", "no-image", "vcd", "m3id", "icd", "first-logit", "residual"]


def test_every_method_gets_the_same_strengths() -> None:
    found = curves([m.name for m in swept(NAMES, GUIDANCE, [2, 0.5])])
    assert list(found) == [
        *("cmg-1/3", "cmg-1/3-gate", "cmg-0", "cmg-0-gate"),
        *("no-image", "vcd", "m3id", "icd", "first-logit", "residual"),
    ]
    for name, points in found.items():
        assert points == ("greedy", f"{name}@0.5", f"{name}@2")


def test_a_point_is_its_method_at_that_strength() -> None:
    guidance = replace(GUIDANCE, beta=0.3, scope="all")
    points = {m.name: m for m in swept(NAMES, guidance, [2.0])}
    assert points["vcd@2"] == Vcd(alpha=2.0, beta=0.3, name="vcd@2")
    m3id = points["m3id@2"]
    assert isinstance(m3id, M3id)
    assert m3id.strength(7) == pytest.approx(2 * M3id().strength(7))
    for name, start, gate in (
        ("cmg-1/3@2", 1 / 3, None),
        ("cmg-1/3-gate@2", 1 / 3, Disagreement()),
        ("cmg-0@2", 0.0, None),
        ("cmg-0-gate@2", 0.0, Disagreement()),
    ):
        expected = replace(guidance, alpha=2.0, layers=LayerRange(start, 1), gate=gate)
        assert points[name] == Cmg(expected, name)
    own = Disagreement(7.0)
    (gated,) = (
        m for m in swept(NAMES, replace(guidance, gate=own), [1]) if m.name == "cmg-0-gate@1"
    )
    assert isinstance(gated, Cmg)
    assert gated.guidance.gate == own


def test_what_has_no_strength_is_run_once() -> None:
    methods = swept(["greedy", "sample", "cut", "icd"], GUIDANCE, [1, 2])
    assert [m.name for m in methods] == ["greedy", "sample", "cut", "icd@1", "icd@2"]
    assert curves([m.name for m in methods]) == {"icd": ("greedy", "icd@1", "icd@2")}


@pytest.mark.parametrize(
    ("names", "strengths", "said"),
    [
        (["vcd"], [1.0], "add greedy to the methods"),
        (["greedy", "vcd"], [], "give at least one, each once"),
        (["greedy", "vcd"], [1.0, 1.0], "give at least one, each once"),
        (["greedy", "vcd"], [0.0], r"strength 0 is out of range: above 0, to 100 \(0 is greedy\)"),
        (["greedy", "vcd"], [101.0], "strength 101 is out of range"),
        (["greedy", "best"], [1.0], "method 'best' is unknown"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    names: list[str], strengths: list[float], said: str
) -> None:
    with pytest.raises(EvaluationError, match=said):
        swept(names, GUIDANCE, strengths)


def test_names_of_points_are_read_back() -> None:
    assert point_of(point_name("a@b", 0.25)) == ("a@b", 0.25)
    assert [point_of(name) for name in (*METHODS, "a@b", "@1")] == [None] * len(METHODS) + [
        None,
        ("", 1.0),
    ]


def dense(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """The piecewise linear path at many points."""
    at = np.linspace(0, len(path) - 1, 20001)
    return np.interp(at, np.arange(len(path)), path)


@pytest.mark.parametrize("seed", range(20))
def test_what_a_curve_reaches_is_the_least_of_its_points_that_keep_enough(seed: int) -> None:
    across, up = np.random.default_rng(seed).uniform(0, 100, (2, 5))
    for least in (across[0] - 5, across[0], across[0] + 10):
        fine = dense(up)[dense(across) >= least]
        found = reached_at(across, up, least)
        if across.max() < least:
            assert np.isnan(found)
        else:
            assert found == pytest.approx(fine.min(), abs=0.1)
    # Many curves at once are each by itself.
    both = reached_at(np.stack([across, across], 1), np.stack([up, up], 1), np.array([0.0, 1e3]))
    assert both[0] == up.min()
    assert np.isnan(both[1])


def test_a_strength_is_found_where_a_curve_first_falls_so_low() -> None:
    up = np.array([40.0, 30.0, 35.0, 20.0])
    for target, index in ((40, 0), (45, 0), (35, 0.5), (30, 1), (25, 2 + 2 / 3), (20, 3)):
        assert strength_at(up, target) == pytest.approx(index)
    assert np.isnan(strength_at(up, 19.9))
    many = strength_at(np.stack([up, up + 1], 1), np.array([35.0, 20.5]))
    assert many[0] == pytest.approx(0.5)
    assert np.isnan(many[1])
    path = np.array([1.0, 3.0, 3.0, 9.0])
    for index, value in ((0, 1), (0.25, 1.5), (1.5, 3), (2.5, 6), (3, 9)):
        assert value_at(path, np.array(index)) == pytest.approx(value)
    assert np.isnan(value_at(path, np.array(np.nan)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of three curves on a few drawn scenes, that was stopped and gone on with."""
    task = SceneCaptions("tune", "both", 4)
    home = tmp_path_factory.mktemp("frontier") / "run"

    def stop(done: int, total: int) -> None:
        assert total == 8 * (1 + 6 * 2)
        if done == 30:
            raise KeyboardInterrupt

    model = ModelFiles(*embedded_pair(), {"n_threads": 1, "n_parallel": 1})
    names = ["greedy", "cmg", "no-image", "first-logit"]
    run = partial(evaluate, task, model, folder=home)
    with pytest.raises(KeyboardInterrupt):
        run(swept(names, Guidance(tokens=TopRatio(1.0)), [1, 3]), progress=stop)
    run(swept(names, Guidance(tokens=TopRatio(1.0)), [1, 3]))
    return home


def test_the_report_compares_curves_at_matched_recall(folder: Path) -> None:
    report = make_report(read_run(folder), n_samples=300)
    assert [part.name for part in report.parts] == ["all", "typical", "counter"]
    for part in report.parts:
        found = part.frontier
        assert found is not None
        assert (found.across, found.up, found.reference) == ("recall", "chair_i", "cmg-1/3")
        rows = {row.method: row for row in part.rows}
        reached = {(one.curve, one.loss): one for one in found.reached}
        assert len(reached) == 6 * 3
        for (curve, loss), one in reached.items():
            across, up = (
                np.array([rows[name].figures[key].own.value for name in found.curves[curve]])
                for key in ("recall", "chair_i")
            )
            assert one.own.value == pytest.approx(reached_at(across, up, across[0] - loss))
            if curve == found.reference:
                assert one.difference is None
                continue
            assert one.difference is not None
            gap = one.own.value - reached[found.reference, loss].own.value
            assert one.difference.value == pytest.approx(gap)
            assert one.difference.low <= gap + 1e-9
            assert gap - 1e-9 <= one.difference.high


def test_differences_of_curves_are_taken_within_each_sample(folder: Path) -> None:
    """Of a curve with itself under another name there is none in any sample."""
    run = read_run(folder)
    told = run.manifest["methods"]
    twins = [n for n in told if n.startswith("cmg-1/3@")]
    names = {name: name.replace("cmg-1/3@", "twin@") for name in twins}
    methods = {**told, **{names[name]: told[name] for name in twins}}
    copies = [replace(r, method=names[r.method]) for r in run.records if r.method in names]
    copied = replace(
        run, manifest={**run.manifest, "methods": methods}, records=(*run.records, *copies)
    )
    for part in make_report(copied, n_samples=200).parts:
        assert part.frontier is not None
        gaps = [one.difference for one in part.frontier.reached if one.curve == "twin"]
        assert len(gaps) == 3
        assert all(g is not None and (g.value, g.low, g.high) == (0, 0, 0) for g in gaps)


def test_curves_are_told_and_drawn(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = make_report(read_run(folder), n_samples=50)
    text = markdown(report)
    assert text.count("chair i at matched recall, 95% intervals:") == 3
    assert "linear between neighbouring strengths" in text
    assert "| curve | recall given up | chair i | interval | to cmg-1/3 |" in text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(rendered(report))
    shown = console.export_text()
    assert "cmg-0-gate" in shown
    differences = shown[shown.index("Differences to") :] if "Differences to" in shown else ""
    assert "@" not in differences
    names = [path.name for path in write_plots(report, tmp_path)]
    assert names == ["chair-by-recall.png"]


def test_both_kinds_are_the_parts_of_one_run() -> None:
    whole = list(SceneCaptions("tune", "both", 3).items())
    assert [item.part for item in whole] == ["typical"] * 3 + ["counter"] * 3
    apart = [
        item for kind in ("typical", "counter") for item in SceneCaptions("tune", kind, 3).items()
    ]
    assert [replace(item, part="all") for item in whole] == apart
    hashes = [[item_hash("t", item) for item in items] for items in (whole, apart)]
    assert hashes[0] == hashes[1]
    pixels = SceneCaptions("tune", "both", 3).load(whole[4])
    np.testing.assert_array_equal(pixels, SceneCaptions("tune", "counter", 3).load(apart[4]))
    parts = {item.part for item in ScenePope("tune", "both", 1).items()}
    assert parts == {
        f"{kind} {part}"
        for kind in ("typical", "counter")
        for part in ("random", "popular", "adversarial")
    }


def test_kinds_are_compared_where_a_curve_does_as_well_on_one_of_them(folder: Path) -> None:
    run = read_run(folder)
    found = matched(run, "cmg-0@1")
    values = {part: sampled(run, part, 0)[0] for part in ("counter", "typical")}
    for curve, figures in found.items():
        names = curves(run.methods)[curve]
        up = np.array([values["counter"][name]["chair_i"] for name in names])
        index = strength_at(up, values["counter"]["cmg-0@1"]["chair_i"])
        for key, (own, gap) in figures.items():
            path = np.array([values["typical"][name][key] for name in names])
            assert own.value == pytest.approx(float(value_at(path, index)), nan_ok=True)
            there = values["typical"]["cmg-0@1"][key]
            assert gap.value == pytest.approx(own.value - there, nan_ok=True)
    own = found["cmg-0"]["recall"][0]
    assert not np.isnan(own.value)
