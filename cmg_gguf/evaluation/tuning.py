"""Guidance settings found by search on a part of the items, kept apart from the rest.

    tuned = tune(task, model, grid(Guidance(), alpha=[1, 2], tokens=[TopRatio(0.25)]), "runs/tune")
    save_settings("llava.json", tuned.settings)

Every candidate answers the same items, in one run that can be stopped and gone on with. The best of
many flatters itself: its figure on the tuning items is no result. The settings carry the hashes of
those items, so that `evaluate` can refuse them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.executors import Executor, in_process
from cmg_gguf.evaluation.items import in_part, item_hash, read_items
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.methods import Cmg, Greedy
from cmg_gguf.evaluation.report import Report, Row, make_report
from cmg_gguf.evaluation.run import Progress, evaluate
from cmg_gguf.evaluation.task import Task
from cmg_gguf.guidance import Disagreement, Guidance, LayerPolicy, TokenPolicy
from cmg_gguf.settings import Settings

FIGURES = ("accuracy", "score", "amber_score", "a_acc")
"""What is maximised if nothing is named: the first of these that a task has."""
SLACK = 1.0
"""Points below greedy's that a figure which is to be kept may fall."""


@dataclass(frozen=True)
class Goal:
    """What makes a candidate the best.

    figure: its name; None = the first of `FIGURES` that the task has. lower: whether less is
    better. keep: a figure that must not fall more than `SLACK` below greedy's, such as recall.
    """

    figure: str | None = None
    lower: bool = False
    keep: str | None = None


@dataclass(frozen=True)
class Tuned:
    """What a search has found.

    settings: the best, ready to be saved. report: of all candidates on the tuning items; the
    method names are those of `candidates`. best: its row, greedy: plain decoding's.
    """

    settings: Settings
    report: Report
    candidates: dict[str, Guidance]
    figure: str
    best: Row
    greedy: Row


def grid(
    base: Guidance,
    *,
    alpha: Sequence[float] = (),
    beta: Sequence[float] = (),
    layers: Sequence[LayerPolicy] = (),
    tokens: Sequence[TokenPolicy] = (),
    gate: Sequence[Disagreement | None] = (),
) -> list[Guidance]:
    """Every combination of the choices; what has none is as in `base`."""
    choices = {"alpha": alpha, "beta": beta, "layers": layers, "tokens": tokens, "gate": gate}
    lists = {name: values or (getattr(base, name),) for name, values in choices.items()}
    return [
        replace(base, **dict(zip(lists, values, strict=True)))
        for values in itertools.product(*lists.values())
    ]


def drawn(candidates: Sequence[Guidance], n: int, seed: int) -> list[Guidance]:
    """`n` of the candidates at random, each at most once, in their order; all if there are fewer.

    Raises EvaluationError for n below 1.
    """
    if n < 1:
        raise EvaluationError(f"{n} trials are out of range: 1 and up")
    order = np.random.default_rng(seed).permutation(len(candidates))[:n]
    return [candidates[i] for i in sorted(order)]


def tune(
    task: Task,
    model: ModelFiles,
    candidates: Sequence[Guidance],
    folder: str | Path,
    *,
    goal: Goal = Goal(),
    share: float = 0.5,
    seed: int = 0,
    limit: int | None = None,
    search: str = "grid",
    executor: Executor = in_process,
    progress: Progress | None = None,
) -> Tuned:
    """The best candidate on a random part of about `share` of the task's images.

    share: above 0, to 1. seed: of that part and of the run. limit: the first N items of the part.
    search: how the candidates came about; noted in the settings. Others: as in `evaluate`.

    Raises EvaluationError: no candidate, no item in the part, a figure that the task does not have,
    or no candidate that keeps what is to be kept; and what `evaluate` raises.
    """
    if not candidates:
        raise EvaluationError("there are no candidates; give at least one")
    if not 0 < share <= 1:
        raise EvaluationError(f"share={share} is out of range: above 0, to 1")
    named = {f"cmg-{i}": candidate for i, candidate in enumerate(candidates, start=1)}
    every = read_items(task).items
    others = frozenset(
        item_hash(task.name, item) for item in every if not in_part(seed, item, share)
    )
    methods = [Greedy(), *(Cmg(candidate, name) for name, candidate in named.items())]
    run = evaluate(
        task,
        model,
        methods,
        folder,
        seed=seed,
        limit=limit,
        leave_out=others,
        executor=executor,
        progress=progress,
    )
    report = make_report(run, n_samples=500)
    figure, greedy, best = _best(report, goal)
    tuned: dict[str, Any] = {
        "task": task.name,
        "model": run.manifest["model"]["model"]["name"],
        "figure": figure,
        "lower_is_better": goal.lower,
        "value": _value(best, figure),
        "greedy": _value(greedy, figure),
        "search": {"kind": search, "candidates": len(named), "seed": seed, "share": share},
        "items": sorted(item_hash(task.name, item) for item in run.items),
    }
    settings = Settings(named[best.method], tuned)
    return Tuned(settings, report, named, figure, best, greedy)


def better(tuned: Tuned, lower: bool) -> bool:
    """Whether the best candidate beats plain decoding on the tuning items at all."""
    gain = _value(tuned.best, tuned.figure) - _value(tuned.greedy, tuned.figure)
    return -gain > 0 if lower else gain > 0


def _best(report: Report, goal: Goal) -> tuple[str, Row, Row]:
    """The figure's name, plain decoding's row, and the best candidate's: the first of equals."""
    greedy, *rows = report.parts[0].rows
    figure = goal.figure or next((name for name in FIGURES if name in greedy.figures), None)
    for name in (figure, goal.keep):
        if name is None and figure is not None:
            continue
        if name not in greedy.figures:
            raise EvaluationError(
                f"{report.run.task.name} has no figure {name or 'to tune by default'}; name one of "
                f"{', '.join(greedy.figures) or 'another task (it has none)'}"
            )
    assert figure is not None
    kept = [row for row in rows if _keeps(row, greedy, goal.keep)]
    known = [row for row in kept if not math.isnan(_value(row, figure))]
    if not known:
        raise EvaluationError(
            f"no candidate is left: {len(rows) - len(kept)} of {len(rows)} fall more than "
            f"{SLACK:g} below greedy in {goal.keep}, the others have no {figure}; try weaker ones"
        )
    sign = -1 if goal.lower else 1
    return figure, greedy, max(known, key=lambda row: sign * _value(row, figure))


def _keeps(row: Row, greedy: Row, name: str | None) -> bool:
    return name is None or _value(row, name) >= _value(greedy, name) - SLACK


def _value(row: Row, figure: str) -> float:
    return row.figures[figure].own.value
