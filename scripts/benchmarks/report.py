"""The rows of the benchmark, its table for people and its JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from benchmarks.decoding import UNHOOKED
from benchmarks.drawing import N_VOCAB
from benchmarks.ratios import Middle, Times
from benchmarks.schedule import Schedule


@dataclass(frozen=True)
class Row:
    """A line of the table: `way` in relation to `base`, both names of what was measured.

    wanted: what the ratio may be at most, on two CPU cores; None = as measured. replayed: whether
    it depends on the recorded schedule.
    """

    name: str
    against: str
    way: str
    base: str
    wanted: float | None = None
    replayed: bool = False


ROWS = (
    Row("decode, plain", UNHOOKED, "plain", UNHOOKED, 1.03),
    Row("decode, eager pair", "plain", "eager", "plain"),
    Row("decode, fork at half depth", "plain", "fork at half", "plain", 1.50),
    Row("decode, fork at two thirds", "plain", "fork at two thirds", "plain", 1.35),
    Row("decode, lazy + fork at half depth", "plain", "lazy", "plain", 1.40, replayed=True),
    Row("the same, auto (the default)", "plain", "auto", "plain", 1.40, replayed=True),
    Row(
        "lazy, refresh step", "refresh prompt", "lazy", "lazy, prompt's tokens", 1.05, replayed=True
    ),
    Row("auto", "fork at half depth", "auto", "fork at half", 1.03, replayed=True),
    Row("auto", "lazy", "auto", "lazy", 1.03, replayed=True),
    Row("lazy, approximate", "plain", "approximate", "plain", 1.12, replayed=True),
    Row("request, one word", "plain", "request, guided", "request, plain", 1.10),
    Row(
        "request, one word",
        "two contexts, two prefills",
        "request, guided",
        "request, two contexts",
        0.6,
    ),
    Row(
        "six questions, one picture",
        "Llava15ChatHandler, plain",
        "six questions, guided",
        "six questions, llama_cpp.Llama",
        0.5,
    ),
    Row(
        "peak memory, weights mapped",
        "plain",
        "memory, mapped, guided",
        "memory, mapped, plain",
        1.05,
    ),
    Row("peak memory, weights read", "plain", "memory, read, guided", "memory, read, plain", 1.05),
)

WANTED_DRAWING = 0.3
"""Milliseconds a token."""


@dataclass
class Figures:
    """All that was measured of one subject."""

    name: str
    random: bool
    n_prompt_tokens: int = 0
    n_image_tokens: int = 0
    times: Times = field(default_factory=dict)

    def ratio(self, row: Row) -> Middle | None:
        """None where the row was not measured."""
        if row.way not in self.times or row.base not in self.times:
            return None
        return Middle.of_ratios(self.times[row.way], self.times[row.base])


def new_table(results: Sequence[Figures], schedule: Schedule, drawing: Middle) -> Table:
    """A column for each subject: ratios on random weights, milliseconds on trained ones."""
    kind = "synthetic" if schedule.synthetic else "recorded"
    table = Table(
        title="What guidance costs: ratios, median [95%]; RANDOM weights of 1.1 billion parameters",
        caption=f"lazy: {kind} schedule, l_d asked for at {schedule.share:.0%} of the steps",
        title_justify="left",
        caption_justify="left",
        box=None,
    )
    table.add_column("", no_wrap=True)
    table.add_column("compared with", no_wrap=True)
    table.add_column("wanted", justify="right")
    for figures in results:
        header = figures.name.upper() if figures.random else f"{figures.name}, ms"
        table.add_column(header, justify="right", no_wrap=True)
    for row in ROWS:
        name = f"{row.name} (synthetic)" if row.replayed and schedule.synthetic else row.name
        wanted = "" if row.wanted is None else f"<= {row.wanted:.2f}"
        table.add_row(name, row.against, wanted, *(_cell(figures, row) for figures in results))
    differing = "not recorded"
    if schedule.n_compared:
        differing = f"{schedule.n_differing / schedule.n_compared:.0%} of {schedule.n_compared}"
    table.add_row("captions that approximating changes", "exact", "", differing)
    drawn = f"{drawing} ms {_mark(drawing.median <= WANTED_DRAWING)}"
    table.add_row(f"drawing a token of {N_VOCAB:,}", "", f"<= {WANTED_DRAWING:.2f} ms", drawn)
    return table


def as_json(results: Sequence[Figures], schedule: Schedule, drawing: Middle) -> dict[str, Any]:
    """Everything in the table, the times it was made from."""
    return {
        "rows": [
            {
                **asdict(row),
                "results": {
                    figures.name: _result(figures, row, ratio)
                    for figures in results
                    if (ratio := figures.ratio(row)) is not None
                },
            }
            for row in ROWS
        ],
        "schedule": {
            "synthetic": schedule.synthetic,
            "share": schedule.share,
            "n_compared": schedule.n_compared,
            "n_differing": schedule.n_differing,
        },
        "drawing_ms": {
            **asdict(drawing),
            "n_vocab": N_VOCAB,
            "wanted": WANTED_DRAWING,
            "met": drawing.median <= WANTED_DRAWING,
        },
        "subjects": [asdict(figures) for figures in results],
    }


def _result(figures: Figures, row: Row, ratio: Middle) -> dict[str, Any]:
    return {
        **asdict(ratio),
        "value": Middle.of(figures.times[row.way]).median,
        "base": Middle.of(figures.times[row.base]).median,
        "met": None if row.wanted is None else ratio.median <= row.wanted,
    }


def _cell(figures: Figures, row: Row) -> str:
    if (ratio := figures.ratio(row)) is None:
        return "-"
    if not figures.random:
        value, base = (Middle.of(figures.times[name]).median for name in (row.way, row.base))
        unit = " MiB" if row.way.startswith("memory") else ""
        return f"{value:.1f} / {base:.1f}{unit}"
    return str(ratio) if row.wanted is None else f"{ratio} {_mark(ratio.median <= row.wanted)}"


def _mark(met: bool) -> str:
    return "met" if met else "MISSED"
