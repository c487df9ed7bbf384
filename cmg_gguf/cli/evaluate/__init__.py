"""`cmg-gguf eval`: benchmarks, one command each, and what is done with their results."""

from __future__ import annotations

import typer

from cmg_gguf.cli.bundle import bundled
from cmg_gguf.cli.evaluate import reporting, running, tuning, weights
from cmg_gguf.cli.evaluate.task_flags import TASKS

__all__ = ["app"]

_FILES = {
    "pope": "--questions coco_pope_random.json --images val2014",
    "chair": "--instances instances_val2014.json --images val2014 --draw 500",
    "mme": "--root MME_Benchmark",
    "amber": "--data AMBER/data --images AMBER/image",
    "hallusion": "--questions HallusionBench.json --images hallusion_bench",
    "dash-b": "--root DASH-B/images",
    "folder": "--images photos",
    "scenes": "--ask pope --pictures 200",
}

app = typer.Typer(name="eval", no_args_is_help=True, rich_markup_mode="rich")
_tune = typer.Typer(name="tune", no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def root() -> None:
    """Measure what guidance does on this model: benchmarks, controls, reports.

    Every run compares methods on the same items, plain decoding among them, and keeps its answers
    in a folder where it goes on after it was stopped.
    """


@_tune.callback()
def tune() -> None:
    """Search for guidance settings on a part of a benchmark's items, and write them to a file.

    The file remembers those items: no figures on them are given under its settings.
    """


for _name, _flags in TASKS.items():
    _run = running.command(_name, _flags)
    _examples = running.EXAMPLE.format(name=_name, files=_FILES[_name])
    app.command(_name, epilog=_examples, rich_help_panel="Benchmarks")(bundled(_run))
    _search = tuning.command(_name, _flags)
    _examples = tuning.EXAMPLE.format(name=_name, files=_FILES[_name])
    _tune.command(_name, epilog=_examples)(bundled(_search))
app.add_typer(_tune, rich_help_panel="Results and settings")
for _command, _examples in (
    (reporting.report, reporting.REPORT_EXAMPLES),
    (reporting.merge, reporting.MERGE_EXAMPLES),
    (weights.weights, weights.EXAMPLES),
):
    app.command(epilog=_examples, rich_help_panel="Results and settings")(bundled(_command))
