"""`cmg-gguf eval tune TASK`: settings found on a part of the items, written to a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cmg_gguf.cli.asker import note_built_in
from cmg_gguf.cli.evaluate.run_flags import SpreadFlags, needed
from cmg_gguf.cli.evaluate.running import tell_faults, watched
from cmg_gguf.cli.evaluate.task_flags import ScenesFlags, TaskFlags
from cmg_gguf.cli.exits import load_library, manners
from cmg_gguf.cli.guidance_flags import GuidanceFlags
from cmg_gguf.cli.model_flags import ModelFlags
from cmg_gguf.cli.options import (
    format_gate,
    format_layers,
    format_tokens,
    parse_gate,
    parse_layers,
    parse_tokens,
)
from cmg_gguf.cli.output import write_rendered
from cmg_gguf.cli.screen import Screen
from cmg_gguf.errors import GuidanceError
from cmg_gguf.guidance import Guidance, LayerPolicy

if TYPE_CHECKING:
    from cmg_gguf.evaluation.run import Progress, Run
    from cmg_gguf.evaluation.tuning import Tuned

EXAMPLE = """\
Examples:

  cmg-gguf eval tune {name} -m llava.gguf --mmproj mmproj.gguf {files} -o runs/tune

  cmg-gguf eval tune {name} ... --try-alpha 1 --try-alpha 2 --try-layers 1/3- --try-layers 0.5-

  cmg-gguf eval {name} ... --settings runs/tune/settings.json --skip-tuned -o runs/{name}
"""
ALPHAS = (0.5, 1.0, 2.0)
LAYERS = ("1/3-", "0.5-")
TOKENS = ("top:0.25", "top:0.5")

_flag = partial(typer.Option, rich_help_panel="Search")


@dataclass(frozen=True, kw_only=True)
class SearchFlags:
    """What is tried, on which items, and what is best."""

    try_alpha: Annotated[
        list[float] | None,
        _flag(
            "--try-alpha",
            metavar="X",
            show_default="0.5, 1, 2, or --alpha",
            help="A strength to try. Repeat it, and those below, for several; all combinations are "
            "tried.",
        ),
    ] = None
    try_beta: Annotated[
        list[float] | None,
        _flag(
            "--try-beta",
            metavar="X",
            show_default="--beta",
            help="A plausibility cut to try.",
        ),
    ] = None
    try_layers: Annotated[
        list[str] | None,
        _flag(
            "--try-layers",
            metavar="LAYERS",
            show_default="1/3-, 0.5-, or --layers",
            help="Layers to try.",
        ),
    ] = None
    try_tokens: Annotated[
        list[str] | None,
        _flag(
            "--try-tokens",
            metavar="TOKENS",
            show_default="top:0.25, top:0.5, or --tokens",
            help="A choice of image tokens to try.",
        ),
    ] = None
    try_gate: Annotated[
        list[str] | None,
        _flag("--try-gate", metavar="GATE", show_default="--gate", help="A gate to try."),
    ] = None
    trials: Annotated[
        int | None,
        _flag(
            "--trials",
            min=1,
            metavar="N",
            help="Try N of the combinations, drawn at random by --seed, instead of all: a random "
            "search instead of a grid.",
        ),
    ] = None
    figure: Annotated[
        str | None,
        _flag(
            "--figure",
            metavar="NAME",
            show_default="accuracy or score, where there is one",
            help="The figure that is to be best: accuracy, f1, chair_i, ...",
        ),
    ] = None
    lower: Annotated[bool, _flag("--lower", help="Less of that figure is better.")] = False
    keep: Annotated[
        str | None,
        _flag(
            "--keep",
            metavar="NAME",
            help="A figure that must not fall more than a point below greedy's, such as recall: "
            "who says less hallucinates less.",
        ),
    ] = None
    share: Annotated[
        float,
        _flag(
            "--share",
            min=0.0,
            max=1.0,
            metavar="X",
            help="Share of the images that are tuned on; the others are for figures.",
        ),
    ] = 0.5
    seed: Annotated[
        int, _flag("--seed", "-s", min=0, metavar="N", help="Seed of that part and of all draws.")
    ] = 0
    limit: Annotated[
        int | None, _flag("--limit", min=1, metavar="N", help="The first N items of the part.")
    ] = None
    out: Annotated[
        Path | None,
        _flag(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Where the run is kept, and settings.json is written. A search that was stopped "
            "goes on there.",
        ),
    ] = None

    def candidates(self, flags: GuidanceFlags, own: Path | None = None) -> list[Guidance]:
        """What is tried, in order. own: as for `GuidanceFlags.guidance`.

        Raises BadParameter, GuidanceError.
        """
        from cmg_gguf.evaluation.tuning import drawn, grid

        layers = self.try_layers or ([] if flags.layers is not None else LAYERS)
        tokens = self.try_tokens or ([] if flags.tokens is not None else TOKENS)
        try:
            found = grid(
                flags.guidance(own),
                alpha=self.try_alpha or ([] if flags.alpha is not None else ALPHAS),
                beta=self.try_beta or (),
                layers=[parse_layers(text) for text in layers],
                tokens=[parse_tokens(text) for text in tokens],
                gate=[parse_gate(text) for text in self.try_gate or ()],
            )
        except GuidanceError as exc:
            raise typer.BadParameter(str(exc), param_hint="'--try-...'") from exc
        return found if self.trials is None else drawn(found, self.trials, self.seed)


def command(name: str, flags: type[TaskFlags]) -> Callable[..., None]:
    """The command that tunes on a benchmark, for `bundled`."""

    @manners()
    def tune(
        *,
        task: TaskFlags,
        search: SearchFlags,
        spread: SpreadFlags,
        guidance: GuidanceFlags,
        model: ModelFlags,
    ) -> None:
        load_library()
        tune_task(task, search, spread, guidance, model)

    tune.__name__ = name
    tune.__doc__ = f"Search for settings on a part of the items.\n\n{flags.__doc__}"
    tune.__annotations__["task"] = flags
    return tune


def tune_task(
    task_flags: TaskFlags,
    search: SearchFlags,
    spread: SpreadFlags,
    guidance: GuidanceFlags,
    model: ModelFlags,
) -> None:
    """Runs a search, shows what it tried, and writes the best settings."""
    from cmg_gguf.evaluation.tuning import Goal, better, tune
    from cmg_gguf.settings import save_settings

    err = Screen(quiet=spread.quiet, progress=not model.verbose)
    # Scenes have a split of their own to choose settings on.
    task = task_flags.task("tune") if isinstance(task_flags, ScenesFlags) else task_flags.task()
    folder = needed(search.out)
    goal = Goal(search.figure, search.lower, search.keep)
    files = spread.files(model, err)
    note_built_in(err, model, "")
    found: list[Tuned] = []

    def work(progress: Progress) -> Run:
        tuned = tune(
            task,
            files,
            search.candidates(guidance, model.own_settings),
            folder,
            goal=goal,
            share=search.share,
            seed=search.seed,
            limit=search.limit,
            search="grid" if search.trials is None else "random",
            executor=spread.executor(),
            progress=progress,
        )
        found.append(tuned)
        return tuned.report.run

    tell_faults(err, watched(err, work))
    (tuned,) = found
    save_settings(folder / "settings.json", tuned.settings)
    write_rendered(_table(tuned), wide=True)
    if not better(tuned, goal.lower):
        err.note("nothing that was tried beats plain greedy decoding on these items")
    n = tuned.report.parts[0].n_items
    err.aside(
        f"best of {len(tuned.candidates)} on {n} items, in {folder / 'settings.json'}; figures on "
        "these items flatter it: take them on others"
    )


def _table(tuned: Tuned) -> Table:
    """Every candidate with its settings and figures, the best one marked."""
    names = [name for name in tuned.greedy.figures if name != tuned.figure]
    table = Table(pad_edge=False)
    for name in ("", "alpha", "beta", "layers", "tokens", "gate", tuned.figure, *names):
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in tuned.report.parts[0].rows:
        guidance = tuned.candidates.get(row.method)
        settings = ("greedy", "", "", "", "") if guidance is None else _settings(guidance)
        figures = [f"{row.figures[name].own.value:.2f}" for name in (tuned.figure, *names)]
        best = row.method == tuned.best.method
        table.add_row("*" if best else "", *settings, *figures, style="bold" if best else None)
    return table


def _settings(guidance: Guidance) -> tuple[str, str, str, str, str]:
    assert isinstance(guidance.layers, LayerPolicy)
    return (
        f"{guidance.alpha:g}",
        f"{guidance.beta:g}",
        format_layers(guidance.layers),
        format_tokens(guidance.tokens),
        format_gate(guidance.gate),
    )
