"""`cmg-gguf eval weights`: weights of evidence for a model, from runs that have noted it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cmg_gguf.cli.exits import load_library, manners
from cmg_gguf.cli.screen import Screen
from cmg_gguf.guidance import Guidance
from cmg_gguf.settings import Settings, load_settings, save_settings

EXAMPLES = """\
Examples:

  cmg-gguf eval chair ... --methods greedy,cmg --evidence -o runs/chair

  cmg-gguf eval weights runs/chair --settings llava.json

  cmg-gguf run ... --settings llava.json --evidence
"""


@manners()
def weights(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Finished runs of captions, made with --evidence."),
    ],
    *,
    settings: Annotated[
        Path,
        typer.Option(
            "--settings",
            metavar="FILE",
            help="The settings file that gets the weights; what else is in it stays, and a new one "
            "gets the default guidance.",
        ),
    ],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes.")] = False,
) -> None:
    """Fit the weights of --evidence to a model, on what it said of objects there and not there.

    All mentions of all methods of the runs count. The file remembers their items: no figures on
    them are given under its settings.
    """
    load_library()
    from cmg_gguf.evaluation.grounding import calibration, fitted, rescored
    from cmg_gguf.evaluation.grounding_report import mentions_of
    from cmg_gguf.evaluation.items import item_hash
    from cmg_gguf.evaluation.run import read_run

    read = [read_run(folder) for folder in runs]
    mentions = [mention for run in read for mention in mentions_of(run)]
    names = ", ".join(dict.fromkeys(run.task.name for run in read))
    invented = sum(not mention.present for mention in mentions)
    what = f"{len(mentions)} mentions of objects ({invented} invented) of {names}"
    model = fitted(mentions, what)
    before = load_settings(settings) if settings.exists() else Settings(Guidance())
    items = {item_hash(run.task.name, item) for run in read for item in run.items}
    tuned = {**before.tuned, "items": sorted(before.tuned_on | items)}
    save_settings(settings, replace(before, evidence=model, tuned=tuned))
    gap = calibration(rescored(mentions, model))
    Screen(quiet=quiet).aside(f"fitted on {what}, calibration error {gap:.1f} %, in {settings}")
