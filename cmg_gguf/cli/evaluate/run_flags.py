"""Flags of a run that all benchmarks share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmg_gguf.cli.asker import fetched, note_unread

if TYPE_CHECKING:
    from cmg_gguf.cli.model_flags import ModelFlags
    from cmg_gguf.cli.screen import Screen
    from cmg_gguf.evaluation.executors import Executor
    from cmg_gguf.evaluation.manifest import ModelFiles
    from cmg_gguf.evaluation.method import Method
    from cmg_gguf.guidance import Guidance

METHODS = "greedy,sample,cut,cmg"
SWEPT = "greedy,cmg,no-image,vcd,m3id,icd,first-logit,residual"

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
        """The model, as each process opens it. Raises what `fetched` and `note_unread` raise."""
        files = fetched(screen, model)
        note_unread(screen, model, files[0])
        return self._opened_by(model, files)

    def files_here(self, model: ModelFlags) -> ModelFiles | None:
        """The same, as far as it need not be downloaded; None where it must."""
        files = model.held_pair()
        return None if files is None else self._opened_by(model, files)

    def _opened_by(self, model: ModelFlags, files: tuple[Path, Path]) -> ModelFiles:
        from cmg_gguf.evaluation.manifest import ModelFiles

        return ModelFiles(*files, {**model.options(), "n_parallel": self.parallel})

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
        str | None,
        _flag(
            "--methods",
            metavar="NAMES",
            show_default=f"{METHODS}; with --alphas {SWEPT}",
            help="Ways to answer, with commas between. greedy, sample: plain. cut: sampling with "
            "the plausibility cut alone. yes-bias: a constant on yes, matched to cmg. cmg: "
            "Cross-Modal Guidance. vcd, no-image, m3id, icd: published relatives. first-logit, "
            "residual: logits of earlier steps added, at no cost.",
        ),
    ] = None
    alphas: Annotated[
        str | None,
        _flag(
            "--alphas",
            metavar="X,X,...",
            help="Run every method that has a strength at each of these, 1 = as published: a curve "
            "a method, all at equal effort. cmg is four: layers from a third and from the first, "
            "without and with a gate. The report compares them at matched recall.",
        ),
    ] = None
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

    def chosen(self, guidance: Guidance) -> tuple[Method, ...]:
        """The methods, at their strengths. Raises BadParameter, EvaluationError, GuidanceError."""
        from cmg_gguf.evaluation.frontier import swept
        from cmg_gguf.evaluation.methods import chosen

        given = self.methods
        if given is None:
            given = METHODS if self.alphas is None else SWEPT
        names = [name.strip() for name in given.split(",") if name.strip()]
        if self.alphas is None:
            return chosen(names, guidance)
        try:
            strengths = [float(text) for text in self.alphas.split(",")]
        except ValueError as exc:
            raise typer.BadParameter(
                f"{self.alphas!r} is no list of numbers; write 0.5,1,2", param_hint="'--alphas'"
            ) from exc
        return swept(names, guidance, strengths)

    @property
    def folder(self) -> Path:
        """Where the run is kept. Raises BadParameter if that is not said."""
        return needed(self.out)


def needed(out: Path | None) -> Path:
    """The folder of --out. Raises BadParameter if it is not given."""
    if out is None:
        raise typer.BadParameter("none is given; name a folder", param_hint="'--out' / '-o'")
    return out
