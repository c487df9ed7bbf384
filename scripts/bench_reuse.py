"""What kept prompts save, and what they cost: questions about images, on random weights.

    python scripts/bench_reuse.py                      # two images, six questions each
    python scripts/bench_reuse.py --questions 3 --rounds 2 | tail -n 1 | jq .results

A table for people on stdout, and one JSON object as its last line for programs. Progress is on
stderr.

Every question is asked of two models on the same weights, of which one keeps prompts and one does
not, in turns: the time until the first token of an answer, and the prompt tokens that were not
computed. Then the same answer goes on with an empty cache beside it and with one full of kept
prompts: what they cost a token. The image encoder is as small as one can be, so what is saved is
the language model's work alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from benchmark_model import END_TOKEN, Quant, Request, benchmark_pair, cache_folder
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cmg_gguf import Guidance, GuidedVLM, Reply, Sampling
from cmg_gguf.guidance import PLAIN

WAYS = {
    "plain": PLAIN,
    "refresh prompt": Guidance(refresh="prompt"),
    "refresh step": Guidance(refresh="step"),
}
STDERR = Console(stderr=True)


@dataclass(frozen=True)
class Figures:
    """Medians of one way to decode. ms: until the first token; reused: of prompt_tokens.

    empty_ms, full_ms: a token of an answer, beside no kept prompts and beside as many as may be.
    """

    way: str
    fresh_ms: float
    first_ms: float
    next_ms: float
    prompt_tokens: int
    reused: int
    empty_ms: float
    full_ms: float

    @property
    def ratio(self) -> float:
        return self.fresh_ms / self.next_ms


class Bench:
    """Two models on the same file: one that keeps prompts and one that does not."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._request = Request(args.before_tokens, args.image_tokens, args.prompt_tokens)
        pair = benchmark_pair(args.cache, args.quant, n_image_tokens=args.image_tokens)
        self._keeping, self._fresh = (
            GuidedVLM(
                *pair,
                n_ctx=args.n_ctx,
                n_threads=args.threads,
                n_gpu_layers=args.n_gpu_layers,
                flash_attn=args.flash_attn,
                prefix_cells=cells,
            )
            for cells in (None, 0)
        )

    def measure(self, way: str) -> Figures:
        """All figures of one way."""
        args, replies = self._args, []
        for _ in range(args.rounds):
            self._keeping.forget()
            for image in range(args.images):
                for question in range(args.questions):
                    both = [self._ask(vlm, way, image, question) for vlm in self._both(question)]
                    kept, fresh = both if question % 2 else both[::-1]
                    replies.append((question, kept, fresh))
        later = [kept for question, kept, _ in replies if question]
        empty, full = self._steps(way)
        return Figures(
            way,
            fresh_ms=_median_ms([fresh for _, _, fresh in replies]),
            first_ms=_median_ms([kept for question, kept, _ in replies if not question]),
            next_ms=_median_ms(later),
            prompt_tokens=later[0].n_prompt_tokens,
            reused=round(statistics.median(reply.n_reused_tokens for reply in later)),
            empty_ms=empty,
            full_ms=full,
        )

    def _both(self, question: int) -> list[GuidedVLM]:
        both = [self._keeping, self._fresh]
        return both if question % 2 else both[::-1]

    def _steps(self, way: str) -> tuple[float, float]:
        """Milliseconds a token, beside an empty cache and beside a full one."""
        times: dict[bool, list[float]] = {False: [], True: []}
        for i in range(2 * self._args.rounds):
            full = bool(i % 2)
            self._keeping.forget()
            for image in range(2, 10 if full else 2):
                self._ask(self._keeping, "plain", image, 0)
            reply = self._ask(self._keeping, way, 0, 0, max_tokens=self._args.steps + 1)
            times[full].append(reply.seconds.decode / self._args.steps * 1e3)
        return statistics.median(times[False]), statistics.median(times[True])

    def _ask(
        self, vlm: GuidedVLM, way: str, image: int, question: int, max_tokens: int = 1
    ) -> Reply:
        words = " ".join(f"w{2000 + 100 * question + i}" for i in range(self._args.question_tokens))
        return vlm.generate(
            f"{self._request.text('<__media__>')} {words}",
            [self._image(image)],
            raw=True,
            guidance=WAYS[way],
            sampling=Sampling(logit_bias={END_TOKEN: -1e9}),
            max_tokens=max_tokens,
        )

    def _image(self, number: int) -> NDArray[np.uint8]:
        return np.roll(self._request.image(), number, axis=0)


def show(results: list[Figures], console: Console) -> None:
    """Prints the table for people."""
    table = Table("until the first token, ms", box=None)
    for column in ("nothing kept", "first question", "next", "x faster", "reused"):
        table.add_column(column, justify="right")
    for f in results:
        times = (f"{ms:.0f}" for ms in (f.fresh_ms, f.first_ms, f.next_ms))
        table.add_row(f.way, *times, f"{f.ratio:.1f}", f"{f.reused} of {f.prompt_tokens}")
    console.print(table)
    table = Table("a token of an answer, ms", box=None)
    for column in ("nothing kept", "cache full"):
        table.add_column(column, justify="right")
    for f in results:
        table.add_row(f.way, f"{f.empty_ms:.1f}", f"{f.full_ms:.1f}")
    console.print(table)


def _median_ms(replies: list[Reply]) -> float:
    """Until the first token is drawn, for which rows of the prompt may have waited."""
    times = (r.seconds.encode + r.seconds.prefill + r.seconds.decode for r in replies)
    return statistics.median(times) * 1e3


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What kept prompts save, on random weights.")
    add = parser.add_argument
    add("--quant", choices=get_args(Quant), default="q4_0")
    add("--cache", type=Path, default=cache_folder(), help="folder of the random models")
    add("--images", type=int, default=2)
    add("--questions", type=int, default=6, help="about each image")
    add("--before-tokens", type=int, default=40, help="text in front of the image")
    add("--image-tokens", type=int, default=576, help="a square number")
    add("--prompt-tokens", type=int, default=6, help="text that all questions begin with")
    add("--question-tokens", type=int, default=18, help="text of each question alone")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=16)
    add("--threads", type=int, default=os.cpu_count())
    add("--n-ctx", type=int, default=4096)
    add("--n-gpu-layers", type=int, default=0, help="-1 = all")
    add("--flash-attn", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, returns 0."""
    args = _arguments(argv)
    about: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "cache"}
    about |= {"load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    started, bench = time.perf_counter(), Bench(args)
    results = [bench.measure(way) for way in track(list(WAYS), "measuring", console=STDERR)]
    about["seconds"] = round(time.perf_counter() - started)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(", ".join(f"{k} {v}" for k, v in about.items()))
    show(results, console)
    figures = [{**asdict(f), "ratio": f.ratio} for f in results]
    print(json.dumps({"about": about, "results": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
