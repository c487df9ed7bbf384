"""Curves of strengths on the embedded model, compared across the two kinds of scenes.

    scripts/frontier_embedded --methods greedy,cmg,no-image --alphas 0.5,1,2

Matched at counter CHAIR_i: for a point of one curve, every other curve is taken at the first
strength at which its CHAIR_i on counter scenes is as low, linear between neighbouring strengths
(strength 0 is plain decoding); a curve that never gets there has no figure. Compared are recall
and CHAIR_i on typical scenes. Both steps are done in each bootstrap sample, of which counter and
typical pictures have their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cmg_gguf.evaluation.executors import Processes
from cmg_gguf.evaluation.frontier import curves, strength_at, swept, value_at
from cmg_gguf.evaluation.items import Shard
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.plots import write_plots
from cmg_gguf.evaluation.report import make_report
from cmg_gguf.evaluation.report_text import markdown, write_report
from cmg_gguf.evaluation.run import Run, evaluate
from cmg_gguf.evaluation.statistics import (
    Estimate,
    Floats,
    Samples,
    Values,
    estimate,
    resampled,
    table,
)
from cmg_gguf.evaluation.tasks.scenes import SceneCaptions
from cmg_gguf.tiny.pair import embedded_guidance, embedded_pair

FIGURES = ("recall", "chair_i")
MOST_UNMATCHED = 0.01
"""Share of samples in which a curve may miss the point that it is matched to."""


def sampled(run: Run, part: str, seed: int) -> tuple[Values, Samples]:
    """The figures of all methods on one part, and their values in samples of its pictures."""
    items = [item for item in run.items if item.part == part]
    answers = {record.key: record.answer for record in run.records}
    tables = {
        method: table(run.task, items, [answers[item.id, method] for item in items])
        for method in run.methods
    }
    return resampled(run.task.figures, tables, baseline=run.methods[0], seed=seed)


def paths(figures: Mapping[str, Mapping[str, Floats]], names: Sequence[str], key: str) -> Floats:
    return np.array([figures[name][key] for name in names], np.float64)


def matched(run: Run, point: str) -> dict[str, dict[str, tuple[Estimate, Estimate]]]:
    """By curve and figure: its value on typical scenes where its CHAIR_i on counter scenes is that
    of `point`, and the difference to the point's own."""
    counter, typical = sampled(run, "counter", 0), sampled(run, "typical", 1)
    found: dict[str, dict[str, tuple[Estimate, Estimate]]] = {}
    for curve, names in curves(run.methods).items():
        at = [
            strength_at(paths(one, names, "chair_i"), one[point]["chair_i"])  # type: ignore[arg-type]
            for one in counter
        ]
        found[curve] = {}
        for key in FIGURES:
            (value, sample), (own, owns) = (
                [
                    value_at(paths(one, names, key), strength)  # type: ignore[arg-type]
                    for one, strength in zip(typical, at, strict=True)
                ],
                [np.asarray(one[point][key]) for one in typical],
            )
            gap = estimate(float(value - own), sample - owns)
            # Where some samples never get there, those that do are no fair sample.
            if np.isnan(value) or np.isnan(sample).mean() > MOST_UNMATCHED:
                gap = Estimate(gap.value, np.nan, np.nan)
            found[curve][key] = estimate(float(value), sample), gap
    return found


def line(curve: str, figures: Mapping[str, tuple[Estimate, Estimate]]) -> str:
    told = []
    for key, (own, gap) in figures.items():
        span = f"[{gap.low:+.2f}, {gap.high:+.2f}]"
        span = "no interval: too few samples get there" if np.isnan(gap.low) else span
        told.append(f"{key} {own.value:5.2f} ({gap.value:+.2f} {span})")
    if np.isnan(figures[FIGURES[0]][0].value):
        told = ["never gets there"]
    return f"  {curve:14s} " + "   ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default="greedy,cmg,no-image,vcd,m3id,icd")
    parser.add_argument("--alphas", default="0.5,1,2,3")
    parser.add_argument("--only", help="points to be run alone, such as cmg-0@1,cmg-0-gate@2")
    parser.add_argument("--split", default="test", choices=("tune", "test"))
    parser.add_argument("-n", type=int, default=1000, help="scenes of each kind")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=8, help="answers at once")
    parser.add_argument("--shard", default="1/1", help="a part of the pictures, for eval merge")
    parser.add_argument("--at", help="points to match, default: all of the first curve")
    parser.add_argument("--out", type=Path, default=Path("build/frontier"))
    options = parser.parse_args()
    strengths = [float(alpha) for alpha in options.alphas.split(",")]
    methods = swept(options.methods.split(","), embedded_guidance(), strengths)
    if options.only:
        kept = {"greedy", *options.only.split(",")}
        methods = tuple(method for method in methods if method.name in kept)
    run = evaluate(
        SceneCaptions(options.split, "both", options.n),
        ModelFiles(*embedded_pair(), {"n_threads": 1, "n_parallel": options.parallel}),
        methods,
        options.out,
        shard=Shard.parse(options.shard),
        executor=Processes(options.jobs),
        progress=lambda done, total: print(f"{done}/{total}") if done % 1000 == 0 else None,
    )
    report = make_report(run)
    write_report(report, options.out)
    write_plots(report, options.out)
    print(markdown(report))
    first = next(iter(curves(run.methods).values()), ())
    for point in options.at.split(",") if options.at else first[1:]:
        print(f"typical scenes where counter CHAIR_i is that of {point} (difference to it):")
        for curve, figures in matched(run, point).items():
            print(line(curve, figures))


if __name__ == "__main__":
    main()
