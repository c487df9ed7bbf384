"""Flags of a run that all benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmg_gguf.cli.asker import fetched

if TYPE_CHECKING:
    from cmg_gguf.cli.model_flags import ModelFlags
    from cmg_gguf.cli.screen import Screen
    from cmg_gguf.evaluation.executors import Executor
    from cmg_gguf.evaluation.manifest import ModelFiles

METHODS = "greedy,sample,cut,cmg"

_flag = partial(typer.Option, rich_help_panel="Run")


@dataclass(frozen=True, kw_only=True)
class SpreadFlags:
    """Where the work is done."""

    jobs: Annotated[
        int,
        _flag(
            "--jobs",
            "-j",
            min=1,
            metavar="N",
            help="Processes on this machine, each with its own model; give each few --threads.",
        ),
    ] = 1
    parallel: Annotated[
        int | None,
        _flag(
            "--parallel",
            min=1,
            max=64,
            metavar="N",
            show_default="4 on a CPU, 8 on an accelerator",
            help="Answers that each model makes at once, sharing -c and decodes; the same but for "
            "rounding. 1 = one after the other: they repeat to the bit, and the report tells what "
            "each method costs. A run may go on with another N.",
        ),
    ] = None
    dask: Annotated[
        str | None,
        _flag(
            "--dask",
            metavar="ADDRESS",
            help="Spread over the workers of a Dask scheduler, such as tcp://host:8786; they need "
            "the same files at the same paths.",
        ),
    ] = None
    quiet: Annotated[
        bool, _flag("--quiet", "-q", help="No progress and no notes on standard error.")
    ] = False

    def files(self, model: ModelFlags, screen: Screen) -> ModelFiles:
        """The model, as each process opens it. Raises what `fetched` raises."""
        from cmg_gguf.evaluation.manifest import ModelFiles

        return ModelFiles(*fetched(screen, model), {**model.options(), "n_parallel": self.parallel})

    def executor(self) -> Executor:
        """Raises BadParameter for both at once; UnsupportedError without Dask."""
        from cmg_gguf.evaluation.cluster import Dask
        from cmg_gguf.evaluation.executors import Processes, in_process

        if self.dask is not None and self.jobs > 1:
            raise typer.BadParameter(
                "Dask's workers are the processes; leave one of the two out", param_hint="'--jobs'"
            )
        if self.dask is not None:
            return Dask(self.dask)
        return Processes(self.jobs) if self.jobs > 1 else in_process


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """What is compared, on which items, and where it is kept."""

    methods: Annotated[
        str,
        _flag(
            "--methods",
            metavar="NAMES",
            help="Ways to answer, with commas between. greedy, sample: plain. cut: sampling with "
            "the plausibility cut alone. yes-bias: a constant on yes, matched to cmg. cmg: "
            "Cross-Modal Guidance. vcd, no-image, m3id, icd: published relatives.",
        ),
    ] = METHODS
    out: Annotated[
        Path | None,
        _flag(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Where the run is kept. A run that was stopped goes on there.",
        ),
    ] = None
    seed: Annotated[
        int,
        _flag("--seed", "-s", min=0, metavar="N", help="Seed of all draws, with each item's id."),
    ] = 0
    limit: Annotated[
        int | None, _flag("--limit", min=1, metavar="N", help="The first N items alone.")
    ] = None
    shard: Annotated[
        str,
        _flag(
            "--shard",
            metavar="I/N",
            help="Part I of N of the images, for one machine of several; see cmg-gguf eval merge.",
        ),
    ] = "1/1"
    skip_tuned: Annotated[
        bool,
        _flag(
            "--skip-tuned",
            help="Leave out the items that --settings were tuned on, instead of refusing them.",
        ),
    ] = False

    evidence: Annotated[
        bool,
        _flag(
            "--evidence",
            help="Note of every word how much the picture supports it, by the weights of "
            "--settings; of captions, the report says how well that tells invented objects from "
            "real ones. Not of vcd, no-image, m3id, icd.",
        ),
    ] = False

    @property
    def folder(self) -> Path:
        """Where the run is kept. Raises BadParameter if that is not said."""
        return needed(self.out)


def needed(out: Path | None) -> Path:
    """The folder of --out. Raises BadParameter if it is not given."""
    if out is None:
        raise typer.BadParameter("none is given; name a folder", param_hint="'--out' / '-o'")
    return out
