"""The constant of the yes-bias control: fitted, and answers settled by it.

A constant b on the logits of yes at the first token makes greedy decoding begin with yes exactly
where lead + b > 0, lead being the best yes logit minus the best other one. So b is chosen from the
leads that greedy decoding recorded, and each answer is greedy's own or the one turned round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from cmg_gguf.evaluation.items import balanced_parts
from cmg_gguf.evaluation.records import Record
from cmg_gguf.evaluation.task import Item

Records = Mapping[tuple[str, str], Record]


def fitted_bias(leads: Sequence[float], yes_share: float) -> float:
    """The constant that makes a share `yes_share` of answers begin with yes; 0 for no leads.

    leads: (n,). As nearly as equal leads allow. Of the constants that do, 0 if it is one, else the
    middle; where all or none are to say yes, 1 logit beyond the last lead.
    """
    if not len(leads):
        return 0.0
    falling = np.sort(np.asarray(leads, np.float64))[::-1]
    n_yes = int(np.floor(yes_share * len(falling) + 0.5))
    # n_yes answers begin with yes where low < b <= high.
    low = -float(falling[n_yes - 1]) if n_yes > 0 else -math.inf
    high = -float(falling[n_yes]) if n_yes < len(falling) else math.inf
    if low < 0 <= high:
        return 0.0
    if math.isinf(low) or math.isinf(high):
        return high - 1.0 if math.isinf(low) else low + 1.0
    return (low + high) / 2


def fitted(items: Sequence[Item], records: Records, seed: int) -> tuple[float, float]:
    """The constants for the two halves of the images, each fitted on the other half."""
    half = balanced_parts(seed, items)

    def fit(part: int) -> float:
        pairs = [
            (records[item.id, "greedy"], records[item.id, "cmg"])
            for item in items
            if half[item.id] == part
        ]
        told = [
            (plain.yes_lead, guided.says_yes)
            for plain, guided in pairs
            if plain.yes_lead is not None and guided.says_yes is not None
        ]
        leads = [lead for lead, _ in told]
        return fitted_bias(leads, sum(yes for _, yes in told) / max(1, len(told)))

    return fit(1), fit(0)


def settled(
    items: Sequence[Item], records: Records, methods: Iterable[str], seed: int
) -> dict[tuple[str, str], Record]:
    """The records with every answer of these `YesBias` methods decided; others are as they were."""
    found = dict(records)
    half = balanced_parts(seed, items)
    for method in methods:
        bias = fitted(items, records, seed)
        for item in items:
            key = item.id, method
            found[key] = _settled(records[key], records[item.id, "greedy"], bias[half[item.id]])
    return found


def _settled(turned: Record, plain: Record, bias: float) -> Record:
    if turned.problem is not None or plain.problem is not None or plain.yes_lead is None:
        return turned
    says_yes = plain.yes_lead + bias > 0
    turns = says_yes != (plain.yes_lead > 0)
    chosen = turned if turns else plain
    return replace(
        chosen,
        method=turned.method,
        changed=int(turns),
        encode=turned.encode,
        seconds=turned.seconds,
        parallel=turned.parallel,
        yes_margin=None if plain.yes_margin is None else plain.yes_margin + bias,
        yes_lead=plain.yes_lead + bias,
        says_yes=says_yes,
    )
