"""`cmg-gguf eval TASK`: every item, by every method, kept in a folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from cmg_gguf.cli.asker import note_built_in
from cmg_gguf.cli.evaluate.run_flags import RunFlags, SpreadFlags
from cmg_gguf.cli.evaluate.task_flags import TaskFlags
from cmg_gguf.cli.exits import load_library, manners
from cmg_gguf.cli.guidance_flags import GuidanceFlags
from cmg_gguf.cli.interrupt import counted
from cmg_gguf.cli.model_flags import ModelFlags
from cmg_gguf.cli.output import write_rendered
from cmg_gguf.cli.screen import Screen, count

if TYPE_CHECKING:
    from cmg_gguf.evaluation.run import Progress, Run

EXAMPLE = """\
Examples:

  cmg-gguf eval {name} -m llava.gguf --mmproj mmproj.gguf {files} -o runs/{name}

  cmg-gguf eval {name} ... -o runs/{name}        the same again goes on where it was stopped

  cmg-gguf eval {name} ... --methods greedy,cmg,vcd --limit 100

  cmg-gguf eval {name} ... --alphas 0.5,1,2      every method at these strengths

  cmg-gguf eval report runs/{name}             tables, differences, plots
"""


def command(name: str, flags: type[TaskFlags]) -> Callable[..., None]:
    """The command that runs a benchmark, for `bundled`."""

    @manners()
    def run(
        *,
        task: TaskFlags,
        run: RunFlags,
        spread: SpreadFlags,
        guidance: GuidanceFlags,
        model: ModelFlags,
    ) -> None:
        load_library()
        evaluate_task(task, run, spread, guidance, model)

    run.__name__, run.__doc__ = name, flags.__doc__
    run.__annotations__["task"] = flags
    return run


def evaluate_task(
    task_flags: TaskFlags,
    run: RunFlags,
    spread: SpreadFlags,
    guidance: GuidanceFlags,
    model: ModelFlags,
) -> None:
    """Runs a benchmark, shows its report, and writes that into the run's folder."""
    from cmg_gguf.evaluation.items import WHOLE, Shard
    from cmg_gguf.evaluation.report import make_report
    from cmg_gguf.evaluation.report_text import rendered, write_report
    from cmg_gguf.evaluation.run import evaluate

    err = Screen(quiet=spread.quiet, progress=not model.verbose)
    task, folder, shard = task_flags.task(), run.folder, Shard.parse(run.shard)
    _check_swept(run, guidance)
    methods = run.chosen(guidance.guidance(model.own_settings))
    tuned_on = guidance.file(model.own_settings).tuned_on
    files = spread.files(model, err)
    is_guided = any(method.name == "cmg" for method in methods)
    guided = f"cmg {guidance.told(model.own_settings)}" if is_guided else ""
    note_built_in(err, model, guided)

    def work(progress: Progress) -> Run:
        return evaluate(
            task,
            files,
            methods,
            folder,
            seed=run.seed,
            limit=run.limit,
            shard=shard,
            leave_out=tuned_on if run.skip_tuned else frozenset(),
            tuned_on=tuned_on,
            evidence=guidance.weights(model.own_settings) if run.evidence else None,
            executor=spread.executor(),
            progress=progress,
        )

    finished = watched(err, work)
    tell_faults(err, finished)
    if shard != WHOLE:
        err.note(f"{folder} is shard {shard}; cmg-gguf eval merge puts all of them together")
    report = make_report(finished)
    write_rendered(rendered(report), wide=True)
    write_report(report, folder)


def _check_swept(run: RunFlags, guidance: GuidanceFlags) -> None:
    """Raises BadParameter for a strength or layers beside those that --alphas tries."""
    own = (("--alpha", "strengths", guidance.alpha), ("--layers", "layers", guidance.layers))
    for flag, what, given in own:
        if run.alphas is not None and given is not None:
            message = f"--alphas tries its own {what}; leave one of the two out"
            raise typer.BadParameter(message, param_hint=f"'{flag}'")


def watched(err: Screen, work: Callable[[Progress], Run]) -> Run:
    """The run that `work` does, with progress; Ctrl-C ends it between two answers."""
    started, told = time.perf_counter(), list[int]()
    with counted(err, "answers") as counting:

        def progress(done: int, total: int) -> None:
            told.append(done)
            counting(done, total)

        run = work(progress)
    seconds = time.perf_counter() - started
    n = told[-1] - told[0]
    err.aside(f"{count(n, 'new answer')} in {seconds:.1f} s, in {run.folder}")
    return run


def tell_faults(err: Screen, run: Run) -> None:
    """Notes what could not be asked or answered, with the first reason, and which answers ended
    before they began."""
    from cmg_gguf.evaluation.items import first_reason
    from cmg_gguf.evaluation.task import BadItem

    if n := len(run.bad) + len({record.item for record in run.problems}):
        problems = {record.item: record.problem or "" for record in run.problems}
        why = first_reason([*run.bad, *(BadItem(item, said) for item, said in problems.items())])
        err.note(
            f"{count(n, 'item')} could not be answered; {run.folder / 'skipped.jsonl'} says why "
            f"({why})"
        )
    answers = [record for record in run.records if record.problem is None]
    thinking = sum(r.finish == "length" and 0 < r.tokens <= r.reasoning for r in answers)
    if thinking:
        err.note(
            f"{thinking} of {count(len(answers), 'answer')} ended within the model's reasoning, so "
            "they are scored as empty: let it answer at once (--no-think), or give it room where "
            "the task has -n"
        )
