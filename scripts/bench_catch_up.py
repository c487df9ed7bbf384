"""What rows that waited cost when they catch up, by how many they are: in steps of the original
branch alone. On random weights of 1.1 billion parameters, masked from half depth up.

    python scripts/bench_catch_up.py                # Q4_0 and Q8_0

A table for people on stdout, and one JSON object as its last line for programs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import get_args

from benchmark_model import cache_folder
from benchmarks.decoding import HALF, LAZY, encoded_prompt
from benchmarks.quantized import BenchQuant
from benchmarks.ratios import milliseconds
from benchmarks.subjects import random_subject
from rich.console import Console
from rich.table import Table

from cmg_gguf import GuidedVLM

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12)
ROUNDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, returns 0."""
    parser = argparse.ArgumentParser(description="What catching up costs.")
    default: list[BenchQuant] = ["q4_0", "q8_0"]
    parser.add_argument("--quants", nargs="+", choices=get_args(BenchQuant), default=default)
    results = {quant: measure(quant) for quant in parser.parse_args(argv).quants}
    table = Table("rows", *map(str, ROWS), box=None, title="steps of the original branch alone")
    for quant, costs in results.items():
        table.add_row(quant, *(f"{costs[n]:.2f}" for n in ROWS))
    Console(highlight=False).print(table)
    print(json.dumps(results))
    return 0


def measure(quant: BenchQuant) -> dict[int, float]:
    """Cost of catching up by the number of rows, medians. The first round does not count."""
    subject = random_subject(cache_folder(), quant)
    times: dict[int, list[float]] = {n: [] for n in ROWS}
    alone: list[float] = []
    with GuidedVLM(*subject.pair, n_ctx=2048, n_gpu_layers=0, flash_attn=True) as vlm:
        engine, token = vlm.engine, vlm.model.n_vocab // 2
        engine.strategy = LAZY
        prompt = encoded_prompt(vlm, subject)
        for i in range(ROUNDS + 1):
            session = engine.open(prompt, HALF)
            engine.prefill(session)
            engine.degraded(session)
            step, catch_up = partial(engine.step, session, token), partial(engine.degraded, session)
            for n in ROWS:
                steps = [milliseconds(step) for _ in range(n)]
                caught_up = milliseconds(catch_up)
                if i:
                    alone += steps[1:]  # the first one's graph is built anew
                    times[n].append(caught_up)
            engine.end(session)
    return {n: median(runs) / median(alone) for n, runs in times.items()}


if __name__ == "__main__":
    sys.exit(main())
