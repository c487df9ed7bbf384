"""What answers cost that are made at once, against the same one at a time: on random weights.

    python scripts/bench_batching.py                # Q4_0 and Q8_0
    python scripts/bench_batching.py --rounds 2 --quants q4_0

A table for people on stdout, and one JSON object as its last line for programs. The random model
has the shape of TinyLlama and 576 image tokens; masked from half depth up; which tokens need the
degraded branch is as recorded from real captions (scripts/benchmarks/schedule.json).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import get_args

from benchmark_model import cache_folder
from benchmarks.quantized import BenchQuant
from benchmarks.ratios import Middle, Times
from benchmarks.schedule import load_schedule
from benchmarks.subjects import random_subject
from benchmarks.together import N_PARALLEL, measure_captions, measure_questions
from rich.console import Console
from rich.table import Table

from cmg_gguf import GuidedVLM
from cmg_gguf.llama.log import set_verbose

STDERR = Console(stderr=True)
COMPARED = {
    # value, base, what is wanted of the ratio
    "a guided token: four at once / one at a time": (
        ("captions, guided, four at once", "captions, guided, one at a time"),
        "at most 0.67",
    ),
    "a guided token, four at once / a plain one, one at a time": (
        ("captions, guided, four at once", "captions, plain, one at a time"),
        "at most 1",
    ),
    "a plain token: four at once / one at a time": (
        ("captions, plain, four at once", "captions, plain, one at a time"),
        "",
    ),
    "six questions, guided: at once / one at a time": (
        ("six questions, guided, at once", "six questions, guided, one at a time"),
        "at most 0.77",
    ),
    "six questions at once: guided / plain": (
        ("six questions, guided, at once", "six questions, plain, at once"),
        "at most 1.15",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, returns 0."""
    parser = argparse.ArgumentParser(description="What answers cost that are made at once.")
    default: list[BenchQuant] = ["q4_0", "q8_0"]
    parser.add_argument("--quants", nargs="+", choices=get_args(BenchQuant), default=default)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    set_verbose(False)
    results = {quant: measure(quant, args.rounds) for quant in args.quants}
    table = Table("ratio of times, median of rounds", *results, "wanted", box=None)
    for name, (pair, wanted) in COMPARED.items():
        cells = [str(_ratio(times, *pair)) for times in results.values()]
        table.add_row(name, *cells, wanted)
    for name in next(iter(results.values())):
        cells = [f"{Middle.of(times[name]).median:.1f} ms" for times in results.values()]
        table.add_row(name, *cells, "")
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(table)
    print(json.dumps(results))
    return 0


def measure(quant: BenchQuant, n_rounds: int) -> Times:
    """Milliseconds a token, and of six questions, in each round."""
    subject, schedule = random_subject(cache_folder(), quant), load_schedule()

    def report() -> None:
        STDERR.print(f"{quant}: a round of {n_rounds}")

    with GuidedVLM(
        *subject.pair,
        n_ctx=8192,
        prefix_cells=7168,
        n_gpu_layers=0,
        flash_attn=True,
        n_parallel=N_PARALLEL,
    ) as vlm:
        questions = measure_questions(vlm, subject, n_rounds, report)
        vlm.forget()
        return {**measure_captions(vlm, subject, schedule, n_rounds, report), **questions}


def _ratio(times: Times, value: str, base: str) -> Middle:
    return Middle.of_ratios(times[value], times[base])


if __name__ == "__main__":
    sys.exit(main())
