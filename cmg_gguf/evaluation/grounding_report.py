"""What a run with evidence shows: how well each score tells invented objects from real ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cmg_gguf.evaluation.grounding import (
    Mention,
    NamesObjects,
    areas,
    calibration,
    left,
    mentions_in,
    scores,
)
from cmg_gguf.evaluation.records import Record
from cmg_gguf.evaluation.statistics import Result
from cmg_gguf.evaluation.task import Item, Task

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
    found = {}
    for method, records in told.items():
        if any(record.words is None for record in records):
            continue
        mentions: list[Mention] = []
        for item, record in zip(items, records, strict=True):
            named = task.located(record.answer)
            mentions += mentions_in(record.words or [], named, item.truth["objects"], item.cluster)
        found[method] = _grounding(mentions, n, seed)
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


def _grounding(mentions: Sequence[Mention], n: int, seed: int) -> Grounding:
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
