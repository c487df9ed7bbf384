"""What a run shows: figures with intervals, differences to plain decoding, costs, changes.

    report = make_report(read_run("runs/pope"))
    report.parts[0].rows[1].figures["accuracy"].difference

An item counts where every method answered it, so that all methods are compared on the same items.
Only arithmetic here; `cmg_gguf.evaluation.report_text` and `.plots` show it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.changed import TokenClass, changed_by_class
from cmg_gguf.evaluation.frontier import Frontier, frontier
from cmg_gguf.evaluation.grounding_report import Grounding, groundings
from cmg_gguf.evaluation.lengths import FIGURE, matched_lengths
from cmg_gguf.evaluation.records import Record
from cmg_gguf.evaluation.run import Run
from cmg_gguf.evaluation.statistics import (
    Estimate,
    Result,
    bootstrap_auc,
    compared,
    resampled,
    table,
)
from cmg_gguf.evaluation.task import Item, NamesObjects, Task
from cmg_gguf.evaluation.yes_bias import fitted

BASELINE = "greedy"
ALL = "all"
N_SAMPLES = 2000


@dataclass(frozen=True)
class Changes:
    """Answers that differ from the baseline's: how many, and of these better, worse, neither.

    Better: a wrong answer became right, or a caption names fewer absent objects. better, worse:
    None where the task does not tell answers apart in that way.
    """

    count: int
    better: int | None
    worse: int | None


@dataclass(frozen=True)
class Row:
    """One method on the items of a part.

    figures: by name; the baseline's have no difference. seconds: a mean item took, with the
    encoding of its image, which is the same for all methods. cost: seconds relative to the
    baseline's. Both are NaN where answers were made several at once: the time of
    each counts waiting for others. tokens: of a mean answer.
    classes: tokens that the method chose otherwise than plain decoding on the same logits, by what
    they say; None where the task finds no objects.
    """

    method: str
    figures: Mapping[str, Result]
    seconds: float
    cost: float
    tokens: float
    changes: Changes
    classes: Mapping[TokenClass, int] | None = None


@dataclass(frozen=True)
class Part:
    """A part of the items, or all of them. encode: seconds of a mean item's `Row.seconds` in which
    its image was encoded, once for all methods; NaN as those. frontier: None where no method was
    run at several strengths. groundings: by method, where there is evidence."""

    name: str
    n_items: int
    n_clusters: int
    rows: tuple[Row, ...]
    encode: float = math.nan
    frontier: Frontier | None = None
    majority: float | None = None
    groundings: Mapping[str, Grounding] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A run in figures.

    parts: all items first, then each part if there are several. baseline: what differences are to.
    unanswered: items that some method could not answer; they count nowhere. bad: what was no item.
    biases: the constants of yes-bias for the two halves of the images, None where it was not run.
    parallel: most answers that were made at once; seconds and costs are those of 1.
    """

    run: Run
    baseline: str
    parts: tuple[Part, ...]
    unanswered: int
    bad: int
    biases: tuple[float, float] | None
    parallel: int = 1


def make_report(
    run: Run, *, baseline: str | None = None, n_samples: int = N_SAMPLES, seed: int = 0
) -> Report:
    """The figures of a finished run.

    baseline: the method that others are compared with; None = greedy, or the first if that was not
    run. n_samples, seed: of the bootstrap. Raises EvaluationError if no item was answered by all
    methods, or the baseline is none of them.
    """
    methods = run.methods
    if baseline is None:
        baseline = BASELINE if BASELINE in methods else methods[0]
    if baseline not in methods:
        raise EvaluationError(
            f"method {baseline!r} was not run in {run.folder}; name one of {', '.join(methods)}"
        )
    records = {record.key: record for record in run.records}
    answered = [
        item
        for item in run.items
        if all(records[item.id, method].problem is None for method in methods)
    ]
    if not answered:
        raise EvaluationError(
            f"none of the {len(run.items)} items of {run.folder} was answered by every method; see "
            "skipped.jsonl there"
        )
    names = list(dict.fromkeys(item.part for item in answered))
    parts = {ALL: answered}
    if len(names) > 1:
        parts |= {name: [item for item in answered if item.part == name] for name in names}
    settings = run.manifest["methods"]
    biased = any(told["method"] == "YesBias" for told in settings.values())
    sampling = _Bootstrap(baseline, n_samples, seed)
    parallel = max(record.parallel for record in run.records)
    return Report(
        run=run,
        baseline=baseline,
        parts=tuple(
            _part(name, run.task, items, _by_method(records, methods, items), sampling, parallel)
            for name, items in parts.items()
        ),
        unanswered=len(run.items) - len(answered),
        bad=len(run.bad),
        biases=fitted(run.items, records, run.manifest["seed"]) if biased else None,
        parallel=parallel,
    )


MIN_CLUSTERS = 10
"""Below this, resampling images says little: by chance alone, few images often agree in sign."""


def verdict(difference: Estimate, n_clusters: int) -> str:
    """What a difference shows: "higher", "lower", "no difference shown", "undefined" or "too few".

    n_clusters: images that were resampled; below `MIN_CLUSTERS` no verdict is given.
    """
    if n_clusters < MIN_CLUSTERS:
        return "too few"
    if not np.isfinite([difference.value, difference.low, difference.high]).all():
        return "undefined"
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "no difference shown"


@dataclass(frozen=True)
class _Bootstrap:
    baseline: str
    n: int
    seed: int


Told = Mapping[str, Sequence[Record]]
"""Records of the items of a part, in their order, by method."""


def _by_method(
    records: Mapping[tuple[str, str], Record], methods: Sequence[str], items: Sequence[Item]
) -> Told:
    return {method: [records[item.id, method] for item in items] for method in methods}


def _part(
    name: str, task: Task, items: Sequence[Item], told: Told, bs: _Bootstrap, parallel: int
) -> Part:
    tables = {
        method: table(task, items, [record.answer for record in found])
        for method, found in told.items()
    }
    sampled = resampled(task.figures, tables, baseline=bs.baseline, n=bs.n, seed=bs.seed)
    figures = compared(*sampled, bs.baseline)
    more = _areas(items, told, bs)
    captions = task if isinstance(task, NamesObjects) else None
    if captions is not None:
        more |= _cut(captions, items, told, bs)
    # A run that was stopped has encoded some images again, for the methods that were left.
    encode = sum(record.encode for found in told.values() for record in found) / len(told)
    if parallel > 1:
        encode = math.nan
    seconds = {
        method: encode + sum(record.seconds for record in found) for method, found in told.items()
    }
    base_seconds = seconds[bs.baseline]
    rows = []
    for method, found in told.items():
        rows.append(
            Row(
                method=method,
                figures={**figures[method], **more.get(method, {})},
                seconds=seconds[method] / len(items),
                cost=seconds[method] / base_seconds if base_seconds else math.nan,
                tokens=sum(record.tokens for record in found) / len(items),
                changes=_changes(task, items, told[bs.baseline], found),
                classes=None if captions is None else changed_by_class(captions, items, found),
            )
        )
    return Part(
        name,
        len(items),
        len(tables[bs.baseline].clusters),
        tuple(rows),
        encode / len(items),
        frontier(*sampled),
        _majority(items),
        groundings(task, items, told, n=bs.n, seed=bs.seed),
    )


def _majority(items: Sequence[Item]) -> float | None:
    labels = Counter(item.truth["label"] for item in items if "label" in item.truth)
    return max(labels.values()) / labels.total() if labels else None


def _cut(
    task: NamesObjects, items: Sequence[Item], told: Told, bs: _Bootstrap
) -> dict[str, dict[str, Result]]:
    """CHAIR_i at equal length, by method."""
    answers = {method: [record.answer for record in found] for method, found in told.items()}
    found = matched_lengths(task, items, answers, baseline=bs.baseline, n=bs.n, seed=bs.seed)
    return {method: {FIGURE: result} for method, result in found.items()}


def _areas(items: Sequence[Item], told: Told, bs: _Bootstrap) -> dict[str, dict[str, Result]]:
    """The AUC of the margins, by method, over the yes/no items where all methods have one."""
    kept = [
        i
        for i, item in enumerate(items)
        if "label" in item.truth and all(r[i].yes_margin is not None for r in told.values())
    ]
    labels = np.array([items[i].truth["label"] == "yes" for i in kept], bool)
    if not labels.any() or labels.all():
        return {}
    margins = {
        method: np.array([records[i].yes_margin for i in kept], np.float64)
        for method, records in told.items()
    }
    clusters = [items[i].cluster for i in kept]
    found = bootstrap_auc(margins, labels, clusters, baseline=bs.baseline, n=bs.n, seed=bs.seed)
    return {method: {"auc": result} for method, result in found.items()}


def _changes(
    task: Task, items: Sequence[Item], before: Sequence[Record], after: Sequence[Record]
) -> Changes:
    changed = [i for i in range(len(items)) if before[i].answer != after[i].answer]
    gains = []
    for i in changed:
        old, new = (task.counts(items[i], found[i].answer) for found in (before, after))
        gains.append(_gain(old, new))
    if any(gain is None for gain in gains):
        return Changes(len(changed), None, None)
    known = [gain for gain in gains if gain is not None]
    return Changes(len(changed), sum(g > 0 for g in known), sum(g < 0 for g in known))


def _gain(old: Mapping[str, float], new: Mapping[str, float]) -> float | None:
    """Above 0 where the new answer is better; None where counts do not say."""
    for name, sign in (("right", 1), ("hallucinated", -1)):
        if name in old or name in new:
            return sign * (new.get(name, 0.0) - old.get(name, 0.0))
    return None
