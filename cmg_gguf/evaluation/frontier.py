"""A curve of strengths for each method, and what the curves reach where they cost as much.

    methods = swept(["greedy", "cmg", "vcd"], Guidance(), [0.5, 1, 2])
    # greedy, cmg-1/3@0.5, ..., vcd@2

A point of a curve is a method of its own in a run. Strength 1 is what was published, and every
curve begins at strength 0, which is plain decoding. All have the same number of points, so that
none was tuned with more effort than another.

At matched recall: with u(s), a(s) a curve's CHAIR_i and recall, linear in the strength between two
neighbours, and R = recall of plain decoding - loss,

    reached(R) = min { u(s) : a(s) >= R }

that is, how few hallucinations the method can be set to without losing more recall. It is taken in
each bootstrap sample from that sample's own points and R, so differences of curves are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.method import Method, point_of
from cmg_gguf.evaluation.methods import Cmg, chosen
from cmg_gguf.evaluation.statistics import Estimate, Floats, Samples, Values, estimate
from cmg_gguf.guidance import MAX_ALPHA, Disagreement, Guidance, LayerRange

START = "greedy"
"""The method that every curve begins at."""
LOSSES = (0.0, 2.0, 5.0)
"""Points of recall below plain decoding's."""
PLANES = (("recall", "chair_i"), ("cover", "chair"))
"""Figures (a, u) that curves are drawn of: the first pair that a task has."""


@dataclass(frozen=True)
class Reached:
    """What one curve reaches at a loss. difference: to the reference, None for itself."""

    curve: str
    loss: float
    own: Estimate
    difference: Estimate | None


@dataclass(frozen=True)
class Frontier:
    """The curves of a part. curves: by name, its methods from weak to strong, `START` first.

    across, up: the figures that are matched and compared. reference: the first curve.
    """

    across: str
    up: str
    reference: str
    curves: Mapping[str, tuple[str, ...]]
    reached: tuple[Reached, ...]


def swept(
    names: Sequence[str], guidance: Guidance, strengths: Sequence[float]
) -> tuple[Method, ...]:
    """The methods of these names, each that has a strength at all of `strengths`.

    cmg becomes four curves: layers from a third of the depth and from the first, each without a
    gate and with one (that of `guidance`, or the default one). Raises EvaluationError for strengths
    that are none and without greedy, and what `chosen` raises.
    """
    check_strengths(strengths)
    if START not in names:
        raise EvaluationError(f"curves begin at plain decoding; add {START} to the methods")
    found: list[Method] = []
    for method in chosen(names, guidance):
        for one in _variants(method.guidance) if isinstance(method, Cmg) else (method,):
            points = [point for s in sorted(strengths) if (point := one.at(s)) is not None]
            found += points or [one]
    return tuple(found)


def check_strengths(strengths: Sequence[float]) -> None:
    """Raises EvaluationError for none, for one twice, and for one out of range."""
    if not strengths or len(set(strengths)) < len(strengths):
        raise EvaluationError(f"strengths {list(strengths)}: give at least one, each once")
    for strength in strengths:
        if not 0 < strength <= MAX_ALPHA:
            raise EvaluationError(
                f"strength {strength:g} is out of range: above 0, to {MAX_ALPHA:g} (0 is greedy)"
            )


def _variants(guidance: Guidance) -> tuple[Cmg, ...]:
    gate = guidance.gate or Disagreement()
    return tuple(
        Cmg(replace(guidance, layers=LayerRange(start, 1), gate=chosen_gate), name + suffix)
        for name, start in (("cmg-1/3", 1 / 3), ("cmg-0", 0.0))
        for suffix, chosen_gate in (("", None), ("-gate", gate))
    )


def curves(methods: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The curves among these names, each from weak to strong behind `START`; {} if there is none.

    A name that is no point of a curve stands for itself, and is left out.
    """
    found: dict[str, list[tuple[float, str]]] = {}
    for name in methods:
        if point := point_of(name):
            curve, strength = point
            found.setdefault(curve, []).append((strength, name))
    if START not in methods:
        return {}
    return {
        curve: (START, *(name for _, name in sorted(points))) for curve, points in found.items()
    }


def frontier(values: Values, samples: Samples) -> Frontier | None:
    """What the curves reach, from the figures of all methods and their values in samples.

    None where there are no curves, or no figures that can be matched.
    """
    found = curves(list(values))
    plane = next((p for p in PLANES if found and set(p) <= set(values[START])), None)
    if plane is None:
        return None
    across, up = plane
    reference = next(iter(found))
    reached = []
    for loss in LOSSES:
        at = {
            curve: (
                _reached(values, names, plane, loss),
                _reached(samples, names, plane, loss),
            )
            for curve, names in found.items()
        }
        base_value, base = at[reference]
        for curve, (value, sampled) in at.items():
            gap = None
            if curve != reference:
                gap = estimate(float(value - base_value), sampled - base)
            reached.append(Reached(curve, loss, estimate(float(value), sampled), gap))
    return Frontier(across, up, reference, found, tuple(reached))


def _reached(
    figures: Mapping[str, Mapping[str, Floats | float]],
    names: Sequence[str],
    plane: tuple[str, str],
    loss: float,
) -> Floats:
    across, up = (np.array([figures[name][key] for name in names]) for key in plane)
    return reached_at(across, up, across[0] - loss)


def reached_at(across: Floats, up: Floats, least: Floats | float) -> Floats:
    """The smallest `up` on a piecewise linear path where `across` is at least `least`.

    across, up: (k, ...), the points of the path in order. least: (...). nan where none is so, or
    a point is undefined.
    """
    enough = across >= least
    at_points = np.where(enough, up, np.inf)
    a, b = across[:-1], across[1:]
    crosses = enough[:-1] != enough[1:]
    share = np.divide(least - a, b - a, where=crosses, out=np.zeros_like(a, np.float64))
    between = np.where(crosses, up[:-1] + share * (up[1:] - up[:-1]), np.inf)
    found: Floats = np.minimum(at_points.min(axis=0), between.min(axis=0, initial=np.inf))
    known = np.isfinite(found) & ~np.isnan(across).any(axis=0) & ~np.isnan(up).any(axis=0)
    return np.where(known, found, np.nan)


def strength_at(up: Floats, target: Floats | float) -> Floats:
    """Where a piecewise linear path first falls to `target`: an index into it, with a fraction.

    up: (k, ...), the points of the path in order. target: (...). nan where it never does.
    """
    below = up <= target
    first = below.argmax(axis=0)
    before = np.maximum(first - 1, 0)
    a, b = (np.take_along_axis(up, i[None], 0)[0] for i in (before, first))
    moves = (first > 0) & (a != b)
    share = np.divide(target - a, b - a, where=moves, out=np.zeros_like(a, np.float64))
    return np.where(below.any(axis=0), before + np.where(first > 0, share, 0.0), np.nan)


def value_at(path: Floats, index: Floats) -> Floats:
    """The value of a piecewise linear path at an index with a fraction; nan where that is nan.

    path: (k, ...). index: (...), 0 to k - 1.
    """
    known = np.nan_to_num(index)
    lower = np.minimum(known.astype(np.intp), max(len(path) - 2, 0))
    upper = np.minimum(lower + 1, len(path) - 1)
    a, b = (np.take_along_axis(path, i[None], 0)[0] for i in (lower, upper))
    return np.where(np.isnan(index), np.nan, a + (known - lower) * (b - a))
