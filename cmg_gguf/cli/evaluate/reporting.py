"""`cmg-gguf eval report` and `merge`: what finished runs show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmg_gguf.cli.evaluate.run_flags import needed
from cmg_gguf.cli.evaluate.running import tell_faults
from cmg_gguf.cli.exits import load_library, manners
from cmg_gguf.cli.output import write_rendered
from cmg_gguf.cli.screen import Screen
from cmg_gguf.errors import UnsupportedError

REPORT_EXAMPLES = """\
Examples:

  cmg-gguf eval report runs/pope               tables here; report.md, figures.csv, plots there

  cmg-gguf eval report runs/pope --baseline yes-bias

  cmg-gguf eval report runs/* --no-plots
"""
MERGE_EXAMPLES = """\
Examples:

  cmg-gguf eval pope ... --shard 1/2 -o runs/one     on one machine

  cmg-gguf eval pope ... --shard 2/2 -o runs/two     on another

  cmg-gguf eval merge runs/one runs/two -o runs/pope
"""

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes on standard error.")]


@manners()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    *,
    plots: Annotated[
        bool, typer.Option("--plots/--no-plots", help="Draw plots, if matplotlib is there.")
    ] = True,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="NAME",
            show_default="greedy",
            help="The method that others are compared with: yes-bias, say, to see what is left of "
            "a gain once a shift towards yes is taken off.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, metavar="N", help="Samples of the bootstrap.")
    ] = 2000,
    quiet: Quiet = False,
) -> None:
    """Show what finished runs show: figures, differences to greedy with intervals, costs.

    Writes report.md, figures.csv and plots into each run's folder. An interval that contains zero
    is called what it is: no difference shown.
    """
    load_library()
    from cmg_gguf.evaluation.plots import write_plots
    from cmg_gguf.evaluation.report import make_report
    from cmg_gguf.evaluation.report_text import rendered, write_report
    from cmg_gguf.evaluation.run import read_run

    err = Screen(quiet=quiet)
    for folder in runs:
        run = read_run(folder)
        tell_faults(err, run)
        made = make_report(run, baseline=baseline, n_samples=samples)
        write_rendered(rendered(made), wide=True)
        written = write_report(made, folder)
        if plots:
            try:
                written += write_plots(made, folder)
            except UnsupportedError as exc:  # tables are a report too
                plots = False
                err.note(str(exc))
        err.aside(f"in {folder}: {', '.join(path.name for path in written)}")


@manners()
def merge(
    shards: Annotated[
        list[Path], typer.Argument(metavar="SHARD...", help="Folders of all shards of one run.")
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Where the whole run is put."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Put the shards of a run together; the result is that of a run that was never cut.

    The files of the benchmark must be where the first shard had them.
    """
    load_library()
    from cmg_gguf.evaluation.run import merge as merge_runs

    err = Screen(quiet=quiet)
    run = merge_runs(shards, needed(out))
    tell_faults(err, run)
    err.aside(f"{len(run.records)} answers in {run.folder}; cmg-gguf eval report shows them")
