"""A report to read: on a terminal, as Markdown, as CSV. Nothing is computed here but means."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from cmg_gguf.evaluation.changed import CLASSES
from cmg_gguf.evaluation.frontier import START, Frontier
from cmg_gguf.evaluation.grounding_report import HEADER, LEFT_HEADER, area_rows, left_rows
from cmg_gguf.evaluation.lengths import FIGURE
from cmg_gguf.evaluation.method import point_of
from cmg_gguf.evaluation.records import write_whole
from cmg_gguf.evaluation.report import ALL, Part, Report, Row, verdict
from cmg_gguf.evaluation.statistics import LEVEL, Estimate

_COLUMNS = (
    *("task", "part", "items", "clusters", "method", "figure", "value", "low", "high"),
    *("difference", "difference_low", "difference_high", "verdict"),
    *("seconds_per_item", "cost", "tokens", "changed", "better", "worse"),
)


def rendered(report: Report) -> RenderableType:
    """The report for a terminal: every part's figures and curves, and the differences over all
    items, but for the points of curves."""
    blocks: list[RenderableType] = [Text(line) for line in heading(report)]
    for part in report.parts:
        blocks += [Text(), _grid(_title(part), *figure_table(part))]
        if rows := class_rows(part):
            blocks += [Text(), _grid(CHANGED, CLASSES_HEADER, rows)]
        if part.frontier:
            blocks += [Text(), _grid(_matched(part.frontier), *frontier_table(part))]
        for title, header, cells in _groundings(part):
            blocks += [Text(), _grid(title, header, cells)]
    all_items = report.parts[0]
    if rows := [row for row in difference_rows(report, all_items) if point_of(row[0]) is None]:
        title = f"Differences to {report.baseline}, {LEVEL:.0%} intervals"
        blocks += [Text(), _grid(title, DIFFERENCES, rows)]
    blocks += [Text(), *(Text(line) for line in notes(report))]
    return Group(*blocks)


def markdown(report: Report) -> str:
    """The report as a Markdown page, differences of every part in it."""
    lines = [f"# {report.run.task.name}", "", *(f"- {line}" for line in heading(report))]
    for part in report.parts:
        lines += ["", f"## {_title(part)}", "", *_markdown_table(*figure_table(part))]
        for title, header, cells in _groundings(part):
            lines += ["", f"{title}:", "", *_markdown_table(header, cells)]
        if rows := list(difference_rows(report, part)):
            title = f"Differences to {report.baseline}, {LEVEL:.0%} intervals:"
            lines += ["", title, "", *_markdown_table(DIFFERENCES, rows)]
        if rows := class_rows(part):
            lines += ["", f"{CHANGED}:", "", *_markdown_table(CLASSES_HEADER, rows)]
        if part.frontier:
            table = _markdown_table(*frontier_table(part))
            lines += ["", f"{_matched(part.frontier)}:", "", *table]
    lines += ["", "## Settings", "", "```json", _settings(report), "```"]
    lines += ["", "## Notes", "", *(f"- {line}" for line in notes(report))]
    return "\n".join(lines) + "\n"


def comma_separated(report: Report) -> str:
    """Every figure of every method and part, a line each."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for part in report.parts:
        for row in part.rows:
            for name, result in row.figures.items():
                gap = result.difference
                gaps = (
                    (gap.value, gap.low, gap.high, verdict(gap, part.n_clusters))
                    if gap
                    else ("",) * 4
                )
                own = result.own
                changes = row.changes
                writer.writerow(
                    [
                        *(report.run.task.name, part.name, part.n_items, part.n_clusters),
                        *(row.method, name, own.value, own.low, own.high, *gaps),
                        *(row.seconds, row.cost, row.tokens),
                        *(changes.count, changes.better, changes.worse),
                    ]
                )
    return stream.getvalue()


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes report.md and figures.csv; the paths. Raises EvaluationError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        folder / "report.md": markdown(report),
        folder / "figures.csv": comma_separated(report),
    }
    for path, text in written.items():
        write_whole(path, text)
    return list(written)


def heading(report: Report) -> list[str]:
    """What was run, on how many items, and what is missing from it."""
    told = report.run.manifest
    options = told["task"]["options"] or {}
    rule = options.get("rule")
    n = len(report.run.items)
    shard = told["shard"]["part"]
    lines = [
        f"{report.run.task.name}: {n} items"
        + (f" (the first {told['items']['limit']})" if told["items"]["limit"] else "")
        + (f" of shard {shard}" if shard != "1/1" else "")
        + f", {report.unanswered} not answered by every method, {report.bad} broken and skipped",
        f"model {told['model']['model']['name']}, {told['model']['mmproj']['name']}; seed "
        f"{told['seed']}",
    ]
    if isinstance(rule, dict):
        lines.append(f"yes and no are read by the rule {rule['yes_no_rule']!r}")
    return lines


def notes(report: Report) -> list[str]:
    """What has to be known to read the figures."""
    lines = [
        f"intervals: {LEVEL:.0%}, percentiles of a bootstrap over clusters (images), paired: all "
        "methods see the same samples. Each is for itself: of many, a few exclude zero by chance.",
        _cost_note(report) + f"; changed: answers other than {report.baseline}'s.",
    ]
    if FIGURE in report.parts[0].rows[0].figures:
        lines.append(
            f"{_label(FIGURE)}: chair i of each caption's first mentions, as many as the shorter "
            f"of it and {report.baseline}'s has; the difference is to {report.baseline} cut alike."
        )
    if any(class_rows(part) for part in report.parts):
        lines.append(
            "changed tokens: object = of an object's name; article = a, an, the; ending = the "
            "answer ends, or goes on where plain decoding would have ended; by what is said."
        )
    if report.parts[0].majority is not None:
        lines.append("majority rate: the accuracy of who always says the commoner of yes and no.")
    settings = report.run.manifest["methods"]
    kinds = {told["method"] for told in settings.values()}
    if "Cut" in kinds:
        lines.append(
            "cut: plausibility cut alone, sampled at temperature 1: the control for what the cut "
            "does to sampling. Under greedy decoding it is greedy itself."
        )
    if found := report.parts[0].frontier:
        across, up = _label(found.across), _label(found.up)
        lines.append(
            f"at matched {across}: the smallest {up} that a curve reaches where its {across} is at "
            f"least {START}'s less what is given up; from {START} to its strongest setting, linear "
            "between neighbouring strengths, in each bootstrap sample from its own points. "
            f"{_effort(found)}; 1 is as published."
        )
    if report.biases is not None:
        one, other = report.biases
        lines.append(
            f"yes-bias: {one:+.3f} and {other:+.3f} logits on yes for two halves of the images, "
            "each fitted on the other half to the share of yes of cmg; no label enters."
        )
    if "greedy" not in report.run.methods:
        lines.append("greedy was not run, so nothing here is compared with plain decoding.")
    return lines


def _cost_note(report: Report) -> str:
    if report.parallel == 1:
        return (
            f"cost: seconds relative to {report.baseline}, of these items on this machine; of each "
            f"item's, {report.parts[0].encode:.3f} in which its image was encoded, once for all"
        )
    return (
        f"seconds and cost: none, for up to {report.parallel} answers were made at once, and the "
        "time of each counts waiting for others; a run with --parallel 1 tells them"
    )


def figure_table(part: Part) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each method's figures, seconds, cost and changes."""
    names = list(part.rows[0].figures)
    header = ["method", *map(_label, names), "s/item", "cost", "changed", "better", "worse"]
    return header, [_figure_row(row, names) for row in part.rows]


DIFFERENCES = ["method", "figure", "difference", "interval", "shown"]


def difference_rows(report: Report, part: Part) -> Iterator[list[str]]:
    """Each figure's difference to the baseline, with its interval and what that shows."""
    for row in part.rows:
        for name, result in row.figures.items():
            gap = result.difference
            if gap is not None:
                value = "–" if math.isnan(gap.value) else f"{gap.value:+.2f}"
                yield [
                    row.method,
                    _label(name),
                    value,
                    _interval(gap),
                    verdict(gap, part.n_clusters),
                ]


CHANGED = "Tokens chosen otherwise than plain decoding on the same logits"
CLASSES_HEADER = ["method", "changed", *CLASSES]


def class_rows(part: Part) -> list[list[str]]:
    """How many tokens of each class a method changed, of methods that changed any."""
    told = [(row.method, row.classes) for row in part.rows if row.classes]
    return [
        [method, str(sum(classes.values())), *(str(classes.get(name, 0)) for name in CLASSES)]
        for method, classes in told
    ]


def frontier_table(part: Part) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what each curve reaches at each loss, and the difference to the first."""
    found = part.frontier
    assert found is not None
    header = ["curve", f"{_label(found.across)} given up", _label(found.up), "interval"]
    header += [f"to {found.reference}", "interval", "shown"]
    rows = []
    for one in found.reached:
        gap = one.difference
        gaps = ["", "", ""]
        if gap is not None:
            gaps = [_number(gap.value, "+.2f"), _interval(gap), verdict(gap, part.n_clusters)]
        own = one.own
        span = f"[{_number(own.low)}, {_number(own.high)}]"
        rows.append([one.curve, f"{one.loss:g}", _number(own.value), span, *gaps])
    return header, rows


def _effort(found: Frontier) -> str:
    strengths = {
        tuple(point[1] for name in names if (point := point_of(name)))
        for names in found.curves.values()
    }
    if len(strengths) == 1:
        return "All curves have the same strengths"
    return "The curves do NOT have the same strengths, so some had more chances than others"


def _matched(found: Frontier) -> str:
    return f"{_label(found.up)} at matched {_label(found.across)}, {LEVEL:.0%} intervals"


def _groundings(part: Part) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    if part.groundings:
        title = "AUROC of objects that are there against invented ones, in percent"
        yield title, HEADER, area_rows(part.groundings)
        title = "CHAIR_i where the least supported mentions are dropped"
        yield title, LEFT_HEADER, left_rows(part.groundings)


def _figure_row(row: Row, names: Sequence[str]) -> list[str]:
    changes = row.changes
    counts = (changes.count, changes.better, changes.worse)
    return [
        row.method,
        *(_number(row.figures[name].own.value) for name in names),
        _number(row.seconds, ".3f"),
        _number(row.cost, ".2f") + ("" if math.isnan(row.cost) else "x"),
        *("–" if count is None else str(count) for count in counts),
    ]


def _title(part: Part) -> str:
    name = "All items" if part.name == ALL else part.name
    majority = "" if part.majority is None else f", majority rate {100 * part.majority:.2f}"
    return f"{name}: n = {part.n_items}, {part.n_clusters} clusters{majority}"


def _label(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float, form: str = ".2f") -> str:
    return "–" if math.isnan(value) else format(value, form)


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return "–"
    return f"[{estimate.low:+.2f}, {estimate.high:+.2f}]"


def _grid(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    grid = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for i, name in enumerate(header):
        justify: JustifyMethod = "left" if i == 0 or name == "shown" else "right"
        grid.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + " --- |" * len(header), *map(line, rows)]


def _settings(report: Report) -> str:
    told = report.run.manifest
    kept = {name: told[name] for name in ("task", "items", "model", "methods", "seed", "versions")}
    return json.dumps(kept, indent=2, ensure_ascii=False)
