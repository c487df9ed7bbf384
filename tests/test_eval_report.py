"""Reports: their figures are the task's own, and they say what is not shown."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evals import ran, squares
from rich.console import Console
from tiny_llava import TinyPair

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.plots import write_plots
from cmg_gguf.evaluation.report import MIN_CLUSTERS, Report, make_report, verdict
from cmg_gguf.evaluation.report_text import markdown, rendered, write_report
from cmg_gguf.evaluation.run import Run
from cmg_gguf.evaluation.statistics import Estimate

NAMES = "greedy,sample,cut,cmg,yes-bias"


@pytest.fixture(scope="module")
def run(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("report")
    return ran(squares(home / "pictures"), pair, NAMES, home / "run")


@pytest.fixture(scope="module")
def report(run: Run) -> Report:
    return make_report(run, n_samples=200)


def test_figures_are_the_tasks_own(run: Run, report: Report) -> None:
    assert [part.name for part in report.parts] == ["all", "even", "odd"]
    assert [part.n_items for part in report.parts] == [12, 6, 6]
    records = {record.key: record for record in run.records}
    for part in report.parts:
        items = [i for i in run.items if part.name in ("all", i.part) and "broken" not in i.id]
        for row in part.rows:
            sums: dict[str, float] = {}
            for item in items:
                counts = run.task.counts(item, records[item.id, row.method].answer)
                sums = {name: sums.get(name, 0.0) + value for name, value in counts.items()}
            figures = run.task.figures({k: np.array(v) for k, v in sums.items()})
            for name, value in figures.items():
                assert row.figures[name].own.value == pytest.approx(float(value))


def test_differences_costs_and_changes_are_to_greedy(run: Run, report: Report) -> None:
    records = {record.key: record for record in run.records}
    rows = {row.method: row for row in report.parts[0].rows}
    base = rows["greedy"]
    assert (base.cost, base.changes.count) == (1.0, 0)
    assert all(result.difference is None for result in base.figures.values())
    items = [item for item in run.items if records[item.id, "greedy"].problem is None]
    for name, row in rows.items():
        changed = sum(records[i.id, name].answer != records[i.id, "greedy"].answer for i in items)
        assert row.changes.count == changed
        assert row.cost == pytest.approx(row.seconds / base.seconds)
        if name != "greedy":
            gap = row.figures["letters"].difference
            assert gap is not None
            values = row.figures["letters"].own.value, base.figures["letters"].own.value
            assert gap.value == pytest.approx(values[0] - values[1])


def test_the_area_under_the_curve_is_that_of_the_margins(run: Run, report: Report) -> None:
    for row in report.parts[0].rows:
        told = [r for r in run.records if r.method == row.method and r.problem is None]
        labels = {item.id: item.truth["label"] for item in run.items}
        ups, downs = (
            [r.yes_margin for r in told if labels[r.item] == label and r.yes_margin is not None]
            for label in ("yes", "no")
        )
        won = [(up > down) + 0.5 * (up == down) for up in ups for down in downs]
        assert row.figures["auc"].own.value == pytest.approx(100 * sum(won) / len(won))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 2.0, "higher"),
        (-2.0, -0.1, "lower"),
        (-0.1, 0.1, "no difference shown"),
        (0.0, 1.0, "no difference shown"),
        (-1.0, 0.0, "no difference shown"),
        (math.nan, math.nan, "undefined"),
    ],
)
def test_an_interval_with_zero_in_it_shows_nothing(low: float, high: float, said: str) -> None:
    estimate = Estimate((low + high) / 2, low, high)
    assert verdict(estimate, MIN_CLUSTERS) == said
    assert verdict(estimate, MIN_CLUSTERS - 1) == "too few"


def test_every_way_of_writing_tells_what_must_be_known(report: Report, tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(rendered(report))
        shown = console.export_text()
    for text in (shown, markdown(report)):
        assert "13 items, 1 not answered by every method, 1 broken and skipped" in text
        assert "All items: n = 12, 4 clusters, majority rate 50.00" in text
        assert "too few" in text
        assert "control for what the cut does to sampling" in text
        assert "fitted on the other half" in text
        assert all(name in text for name in NAMES.split(","))
    assert '"alpha": 3.0' in markdown(report)
    write_report(report, tmp_path / "out")
    with (tmp_path / "out" / "figures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 5 * 3
    assert {row["verdict"] for row in rows if row["method"] == "greedy"} == {""}
    assert (tmp_path / "out" / "report.md").read_text() == markdown(report)


def test_changed_answers_are_weighed_where_counts_allow(report: Report, run: Run) -> None:
    assert report.parts[0].rows[1].changes.better is None

    class Judged:
        name, yes_no = "judged", True
        items, load, figures = run.task.items, run.task.load, run.task.figures

        def counts(self, item: object, answer: str) -> dict[str, float]:
            return {"answers": 1.0, "long": 0.0, "letters": 0.0, "right": float("the" in answer)}

    records = {record.key: record for record in run.records}
    judged = make_report(replace(run, task=Judged()), n_samples=10)
    for row in judged.parts[0].rows:
        pairs = [
            (records[i.id, "greedy"].answer, records[i.id, row.method].answer) for i in run.items
        ]
        better = sum("the" in new and "the" not in old for old, new in pairs)
        worse = sum("the" in old and "the" not in new for old, new in pairs)
        assert (row.changes.better, row.changes.worse) == (better, worse)


def test_without_greedy_the_first_method_is_compared_with(pair: TinyPair, tmp_path: Path) -> None:
    task = squares(tmp_path / "pictures", n=2, yes_no=False)
    report = make_report(ran(task, pair, "cmg,sample", tmp_path / "run"), n_samples=10)
    assert report.baseline == "cmg"
    assert "greedy was not run" in markdown(report)
    assert "Differences to cmg" in markdown(report)
    assert "auc" not in report.parts[0].rows[0].figures


def test_any_method_can_be_the_baseline(run: Run) -> None:
    report = make_report(run, baseline="yes-bias", n_samples=10)
    rows = {row.method: row for row in report.parts[0].rows}
    assert rows["yes-bias"].figures["letters"].difference is None
    assert rows["cmg"].figures["letters"].difference is not None
    with pytest.raises(EvaluationError, match=r"'best' was not run in .*; name one of greedy"):
        make_report(run, baseline="best")


def test_a_run_without_answers_has_no_report(pair: TinyPair, tmp_path: Path) -> None:
    task = squares(tmp_path / "pictures", n=1, max_tokens=1)
    for k in range(1):
        (task.folder / f"{k}.png").write_bytes(b"broken too")
    run = ran(task, pair, "greedy", tmp_path / "run")
    with pytest.raises(EvaluationError, match=r"none of the 4 items .* skipped\.jsonl"):
        make_report(run)


def test_plots_are_written_as_pictures(report: Report, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert [path.name for path in write_plots(report, tmp_path)] == ["changes.png"]
    renamed = replace(
        report,
        parts=tuple(
            replace(
                part,
                rows=tuple(
                    replace(row, figures={**row.figures, "yes_ratio": row.figures["letters"]})
                    for row in part.rows
                ),
            )
            for part in report.parts
        ),
        run=replace(run, records=tuple(replace(r, yes_margin=None) for r in run.records)),
    )
    paths = write_plots(renamed, tmp_path)
    assert [path.name for path in paths] == ["accuracy-by-yes.png", "changes.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
