"""A report as pictures. Needs matplotlib, which the extra `eval` brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmg_gguf.errors import UnsupportedError
from cmg_gguf.evaluation.frontier import curves
from cmg_gguf.evaluation.method import point_of
from cmg_gguf.evaluation.records import Record
from cmg_gguf.evaluation.report import Part, Report
from cmg_gguf.evaluation.statistics import Estimate

_PLANES = (
    ("accuracy-by-yes.png", "yes_ratio", "accuracy"),
    ("chair-by-recall.png", "recall", "chair_i"),
    ("chair-by-cover.png", "cover", "chair"),
)


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Writes the plots that the run has figures for; their paths.

    Accuracy against the yes ratio; CHAIR against recall; where methods changed the answer. Raises
    UnsupportedError without matplotlib.
    """
    figure_class = _matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    figures = report.parts[0].rows[0].figures
    for name, across, up in _PLANES:
        if across in figures and up in figures:
            _plane(figure_class, report, across, up).savefig(folder / name, dpi=150)
            written.append(folder / name)
    if any(_is_apart(report, name) for name in report.run.methods):
        _changes(figure_class, report).savefig(folder / "changes.png", dpi=150)
        written.append(folder / "changes.png")
    return written


def _matplotlib() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise UnsupportedError(
            "plots need matplotlib: pip install matplotlib, or leave them out (--no-plots)"
        ) from exc
    return Figure


def _plane(figure_class: Any, report: Report, across: str, up: str) -> Any:
    """A point for each method and part, with its interval in both directions; the points of a curve
    are joined, from plain decoding on, without intervals."""
    figure, axes = _panels(figure_class, len(report.parts))
    for axis, part in zip(axes, report.parts, strict=True):
        rows = {row.method: row for row in part.rows}
        for number, (name, points) in enumerate(curves(list(rows)).items()):
            x, y = ([rows[p].figures[key].own.value for p in points] for key in (across, up))
            colour, line = f"C{number % 10}", ("-", "--")[number // 10 % 2]
            axis.plot(x, y, line, marker=".", color=colour, label=name)
        joined = {name for points in curves(list(rows)).values() for name in points[1:]}
        for row in (row for row in part.rows if row.method not in joined):
            one, other = row.figures[across].own, row.figures[up].own
            style = {"fmt": "o", "capsize": 2, "label": row.method}
            if joined:
                style["color"] = "0.4"
            axis.errorbar(one.value, other.value, xerr=_bars(one), yerr=_bars(other), **style)
        axis.set(title=_title(part), xlabel=f"{_label(across)} in %")
    axes[0].set_ylabel(f"{_label(up)} in %")
    axes[-1].legend(fontsize="small")
    return figure


def _changes(figure_class: Any, report: Report) -> Any:
    """Where the answer changed: margins against the baseline's, or counts where there are none."""
    records = {record.key: record for record in report.run.records}
    others = [name for name in report.run.methods if _is_apart(report, name)]
    pairs = {
        method: [
            (records[item.id, report.baseline], records[item.id, method])
            for item in report.run.items
        ]
        for method in others
    }
    known = {method: [p for p in found if _has_margins(p)] for method, found in pairs.items()}
    if not all(known.values()):
        return _counts(figure_class, report, others)
    figure, axes = _panels(figure_class, len(others))
    for axis, method in zip(axes, others, strict=True):
        _margins(axis, known[method])
        axis.set(title=method, xlabel=f"log p(yes) - log p(no), {report.baseline}")
    axes[0].set_ylabel("the same, by the method")
    axes[-1].legend(fontsize="small")
    return figure


def _panels(figure_class: Any, n: int) -> tuple[Any, Any]:
    """A figure and its n axes, up to four in a row."""
    columns = min(n, 4)
    rows = -(-n // columns)
    figure = figure_class(figsize=(4 * columns, 3.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axis in axes[n:]:
        axis.set_visible(False)
    return figure, axes[:n]


def _margins(axis: Any, pairs: Sequence[tuple[Record, Record]]) -> None:
    changed = np.array([before.answer != after.answer for before, after in pairs])
    margins = np.array([[p.yes_margin for p in pair] for pair in pairs], np.float64)
    axis.axhline(0, color="0.8", lw=1)
    axis.axvline(0, color="0.8", lw=1)
    for chosen, colour, name in ((~changed, "0.6", "same answer"), (changed, "C3", "changed")):
        axis.plot(*margins[chosen].T, ".", color=colour, ms=4, label=name)


def _counts(figure_class: Any, report: Report, others: Sequence[str]) -> Any:
    rows = [row for row in report.parts[0].rows if row.method in others]
    figure = figure_class(figsize=(1.5 + len(rows), 3.5), layout="constrained")
    axis = figure.subplots()
    names = [row.method for row in rows]
    better = np.array([row.changes.better or 0 for row in rows])
    worse = np.array([row.changes.worse or 0 for row in rows])
    rest = np.array([row.changes.count for row in rows]) - better - worse
    axis.bar(names, better, label="better", color="C2")
    axis.bar(names, worse, bottom=better, label="worse", color="C3")
    axis.bar(names, rest, bottom=better + worse, label="neither", color="0.7")
    axis.set(ylabel="answers", title=f"other than {report.baseline}'s, of {_n(report)}")
    axis.legend(fontsize="small")
    return figure


def _is_apart(report: Report, method: str) -> bool:
    """Whether it is compared with the baseline by itself: neither that nor a point of a curve."""
    return method != report.baseline and point_of(method) is None


def _has_margins(pair: tuple[Record, Record]) -> bool:
    return all(record.yes_margin is not None for record in pair)


def _bars(estimate: Estimate) -> list[list[float]]:
    return [
        [max(0.0, estimate.value - estimate.low)],
        [max(0.0, estimate.high - estimate.value)],
    ]


def _title(part: Part) -> str:
    return f"{part.name} (n = {part.n_items})"


def _n(report: Report) -> int:
    return report.parts[0].n_items


def _label(name: str) -> str:
    return name.replace("_", " ")
