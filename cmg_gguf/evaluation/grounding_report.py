"""What a run with evidence shows: how well each score tells invented objects from real ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.grounding import (
    ScoredMention,
    areas,
    calibration,
    left,
    scores,
    with_evidence,
)
from cmg_gguf.evaluation.records import Record
from cmg_gguf.evaluation.run import Run
from cmg_gguf.evaluation.statistics import Result
from cmg_gguf.evaluation.task import Item, NamesObjects, Task

DROPPED = (0.0, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Grounding:
    """One method's mentions. invented: those of objects that are not there. areas: AUROC in percent
    by score, differences to the probability; {} where it is undefined. calibration: expected
    calibration error of the evidence in percent. left: CHAIR_i in percent where a share of the
    mentions is dropped, the least supported first, by the share."""

    n: int
    invented: int
    areas: Mapping[str, Result]
    calibration: float
    left: Mapping[float, float]


def groundings(
    task: Task, items: Sequence[Item], told: Mapping[str, Sequence[Record]], *, n: int, seed: int
) -> dict[str, Grounding]:
    """By method, of those whose answers have evidence. told: records of the items, in their order.
    n, seed: of the bootstrap. {} for a task that names no objects."""
    if not isinstance(task, NamesObjects):
        return {}
    return {
        method: _grounding(_mentions(task, items, records), n, seed)
        for method, records in told.items()
        if all(record.words is not None for record in records)
    }


def mentions_of(run: Run) -> list[ScoredMention]:
    """All mentions of a run that have evidence, whoever said them. Raises EvaluationError where
    there are none."""
    task, items = run.task, {item.id: item for item in run.items}
    records = [record for record in run.records if record.words is not None]
    if not isinstance(task, NamesObjects) or not records:
        raise EvaluationError(
            f"{run.folder} has no objects with evidence: run captions (chair, scenes --ask "
            "captions) with --evidence"
        )
    return _mentions(task, [items[record.item] for record in records], records)


def _mentions(
    task: NamesObjects, items: Sequence[Item], records: Sequence[Record]
) -> list[ScoredMention]:
    found: list[ScoredMention] = []
    for item, record in zip(items, records, strict=True):
        named = task.mentions(item, record.answer)
        found += with_evidence(record.words or [], named, item.cluster)
    return found


HEADER = ["method", "mentions", "invented", *scores([]), "evidence - probability", "ECE"]


def area_rows(found: Mapping[str, Grounding]) -> list[list[str]]:
    """Of each method: mentions, AUROC of each score with its interval, calibration."""
    rows = []
    for method, one in found.items():
        cells = [_area(one.areas.get(name)) for name in scores([])]
        gap = one.areas["evidence"].difference if one.areas else None
        told = "–" if gap is None else f"{gap.value:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]"
        ece = "–" if math.isnan(one.calibration) else f"{one.calibration:.1f}"
        rows.append([method, str(one.n), str(one.invented), *cells, told, ece])
    return rows


LEFT_HEADER = ["method", *(f"{share:.0%} dropped" for share in DROPPED)]


def left_rows(found: Mapping[str, Grounding]) -> list[list[str]]:
    """Of each method CHAIR_i, the least supported shares of its mentions dropped."""
    return [
        [method, *("–" if math.isnan(one.left[s]) else f"{one.left[s]:.1f}" for s in DROPPED)]
        for method, one in found.items()
    ]


def _grounding(mentions: Sequence[ScoredMention], n: int, seed: int) -> Grounding:
    return Grounding(
        n=len(mentions),
        invented=sum(not mention.present for mention in mentions),
        areas=areas(mentions, n_samples=n, seed=seed),
        calibration=calibration(mentions),
        left={share: left(mentions, share) for share in DROPPED},
    )


def _area(result: Result | None) -> str:
    if result is None:
        return "–"
    own = result.own
    return f"{own.value:.1f} [{own.low:.1f}, {own.high:.1f}]"
