"""What guidance costs a hybrid: one context with copied states, against plain and two contexts.

    python scripts/bench_states.py                                   # a random hybrid, written once
    python scripts/bench_states.py --rounds 3 | tail -n 1 | jq .results

A table for people on stdout, and one JSON object as its last line for programs. Progress is on
stderr. With --threads 1 --cpu others on the machine do not count.

In every round each way is asked two questions about a picture that it has not seen, by turns: the
time until the first token, and of a token after that. Ratios are medians of a round's ratios. The
image encoder is as small as one can be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from benchmark_hybrid import hybrid_pair
from benchmark_model import END_TOKEN, Request, cache_folder
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cmg_gguf import Guidance, GuidedVLM, Reply, Sampling
from cmg_gguf.guidance import PLAIN

STDERR = Console(stderr=True)


class Way(NamedTuple):
    """How questions are answered."""

    name: str
    guidance: Guidance
    settings: dict[str, Any]


WAYS = (
    Way("plain", PLAIN, {}),
    Way("guided, both at every step", Guidance(), {"strategy": "exact"}),
    Way("guided, auto (the default)", Guidance(), {}),
    Way("guided, two contexts", Guidance(), {"pairing": "contexts"}),
)


class Times(NamedTuple):
    """Seconds of one round. reused: prompt tokens of the second question, of n_prompt."""

    first: float
    second: float
    token: float
    reused: int
    n_prompt: int


class Bench:
    """One model on the same file for each way."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._request = Request(40, args.side**2, 6)
        pair = args.pair or hybrid_pair(args.cache, side=args.side)
        self._clock = time.process_time if args.cpu else time.perf_counter
        self._models = [
            GuidedVLM(*pair, n_ctx=args.n_ctx, n_threads=args.threads, n_gpu_layers=0, **w.settings)
            for w in WAYS
        ]

    def round(self, number: int) -> list[Times]:
        """What each way takes; another one begins every round."""
        order = [(number + i) % len(WAYS) for i in range(len(WAYS))]
        times = {i: self._times(i, number) for i in order}
        return [times[i] for i in range(len(WAYS))]

    def _times(self, way: int, image: int) -> Times:
        (first, token, _), (second, other, reply) = (self._ask(way, image, q) for q in range(2))
        between = (token + other) / 2
        return Times(first, second, between, reply.n_reused_tokens, reply.n_prompt_tokens)

    def _ask(self, way: int, image: int, question: int) -> tuple[float, float, Reply]:
        """Seconds until the first token, and of one behind it."""
        words = " ".join(f"w{2000 + 100 * question + i}" for i in range(18))
        started = self._clock()
        stream = self._models[way].stream(
            f"{self._request.text('<__media__>')} {words}",
            [np.roll(self._request.image(), image + 1, axis=0)],
            raw=True,
            guidance=WAYS[way].guidance,
            sampling=Sampling(logit_bias={END_TOKEN: -1e9}),
            max_tokens=self._args.steps + 1,
        )
        times = [(self._clock(), len(piece.tokens)) for piece in stream if piece.tokens]
        (first, n_first), (last, _), reply = times[0], times[-1], stream.reply
        return first - started, (last - first) / (len(reply.tokens) - n_first), reply


def figures(rounds: list[list[Times]]) -> list[dict[str, Any]]:
    """For each way: medians in milliseconds, and of the ratios to plain."""
    found = []
    for i, way in enumerate(WAYS):
        row: dict[str, Any] = {"way": way.name, "reused": rounds[0][i].reused}
        row["prompt_tokens"] = rounds[0][i].n_prompt
        for name in ("first", "second", "token"):
            row[f"{name}_ms"] = 1e3 * median(getattr(times[i], name) for times in rounds)
            ratios = [getattr(t[i], name) / getattr(t[0], name) for t in rounds]
            row[f"{name}_ratio"] = median(ratios)
            row[f"{name}_range"] = [min(ratios), max(ratios)]
        found.append(row)
    return found


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints the table for people."""
    table = Table("x plain: median [range]; ms", box=None)
    for column in ("first question", "second question", "a token", "reused"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = []
        for name in ("first", "second", "token"):
            low, high = row[f"{name}_range"]
            ratio = f"{row[f'{name}_ratio']:.2f} [{low:.2f}, {high:.2f}]"
            cells.append(f"{ratio}; {row[f'{name}_ms']:.0f}")
        table.add_row(row["way"], *cells, f"{row['reused']} of {row['prompt_tokens']}")
    console.print(table)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What guidance costs a hybrid, random weights.")
    add = parser.add_argument
    add("--cache", type=Path, default=cache_folder(), help="folder of the random models")
    add("--pair", type=Path, nargs=2, help="another hybrid: its model and its mmproj")
    add("--cpu", action="store_true", help="CPU time, for a machine that others use")
    add("--side", type=int, default=24, help="of a picture: squared, its image tokens")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=16, help="tokens of an answer behind its first")
    add("--threads", type=int, default=os.cpu_count())
    add("--n-ctx", type=int, default=2048)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, returns 0."""
    args = _arguments(argv)
    about: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("cache", "pair")}
    about |= {"load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    bench = Bench(args)
    bench.round(0)  # graphs are made, and pages read
    rounds = [bench.round(1 + i) for i in track(range(args.rounds), "measuring", console=STDERR)]
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    console.print(", ".join(f"{k} {v}" for k, v in about.items()))
    rows = figures(rounds)
    show(rows, console)
    print(json.dumps({"about": about, "results": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
