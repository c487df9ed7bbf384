"""CHAIR_i of captions of equal length: who says less hallucinates less, and this takes it off.

Of each picture, a method's caption and the baseline's are cut to as many mentions of objects as the
shorter of the two has: the first min(m, b) of its m and of the baseline's b. CHAIR_i is then that
of the mentions that are left, pooled over the pictures, and the difference that of the two cut
captions. So each method is held against a baseline cut for it alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cmg_gguf.evaluation.statistics import (
    CountTable,
    Floats,
    Result,
    bootstrap,
    column,
    percent,
    table_of,
)
from cmg_gguf.evaluation.task import Item, Mention, NamesObjects, Sums

FIGURE = "chair_i_cut"


def matched_lengths(
    task: NamesObjects,
    items: Sequence[Item],
    answers: Mapping[str, Sequence[str]],
    *,
    baseline: str,
    n: int = 2000,
    seed: int = 0,
) -> dict[str, Result]:
    """CHAIR_i at equal length by method, in percent; of the baseline, its whole captions'.

    answers: by method, one of each item. n, seed: of the bootstrap. Raises what `bootstrap` raises.
    """
    named = {
        method: [task.mentions(item, answer) for item, answer in zip(items, said, strict=True)]
        for method, said in answers.items()
    }
    base = named[baseline]
    found: dict[str, Result] = {}
    for method, own in named.items():
        lengths = [min(len(a), len(b)) for a, b in zip(own, base, strict=True)]
        tables = {baseline: _cut(items, base, lengths), method: _cut(items, own, lengths)}
        results = bootstrap(_figures, tables, baseline=baseline, n=n, seed=seed)
        found[method] = results[method][FIGURE]
    return found


def _cut(
    items: Sequence[Item], named: Sequence[Sequence[Mention]], lengths: Sequence[int]
) -> CountTable:
    counts = [
        {
            "mentions": float(length),
            "hallucinated": float(sum(not mention.present for mention in mentions[:length])),
        }
        for mentions, length in zip(named, lengths, strict=True)
    ]
    return table_of([item.cluster for item in items], counts)


def _figures(sums: Sums) -> dict[str, Floats]:
    return {FIGURE: percent(column(sums, "hallucinated"), column(sums, "mentions"))}
