"""What guidance costs: decoding, prefill and memory against plain decoding, on random weights.

    python scripts/bench_decode.py                     # Q4_0 and Q8_0, all cores
    python scripts/bench_decode.py --quant q4_0 --rounds 40 | tail -n 1 | jq .bounds

A table for people on stdout, and one JSON object as its last line for programs. Progress is on
stderr. The exit status is 0 whether the bounds are met or missed.

All ways to decode are measured in one process, in turns: a round runs each of them for a few steps,
and starts with another one each time. A ratio is that of two ways in the same round; shown is the
median over the rounds with the 95% interval of the median. Other work on the machine thus falls on
all of them alike. Between rounds every way is set back to the end of the prompt.

Peak memory is that of a fresh process which answers one request: plain or guided, with the weights
mapped from the file (their pages count as resident) or read into memory. What an accelerator holds
is not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, get_args

import llama_cpp
import numpy as np
from benchmark_model import END_TOKEN, Pair, Quant, Request, benchmark_pair, cache_folder
from rich.console import Console
from rich.progress import track
from rich.table import Table

import cmg_gguf
from cmg_gguf import Guidance, GuidedVLM, Sampling

PLAIN = Guidance(alpha=0.0, beta=0.0)
STEP = Guidance(refresh="step")
ONCE = Guidance(refresh="prompt")
TOKEN = 300
UNHOOKED, IDLE, TWO = "llama_cpp.Llama", "plain", "two contexts"
UNPATCHED, PROMPT, EVERY = "pair, no patch", "pair, refresh prompt", "pair, refresh step"
STDERR = Console(stderr=True)

Times = dict[str, list[float]]
"""Milliseconds of each round, by way."""


@dataclass(frozen=True)
class Ratio:
    """Median of n ratios, and its 95% interval: order statistics, the whole range below n = 6."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], bases: Sequence[float]) -> Ratio:
        ratios = sorted(v / b for v, b in zip(values, bases, strict=True))
        n = len(ratios)
        # Ratios i and n-1-i enclose the median but for a chance of 2 P(binomial(n, 1/2) <= i).
        below = accumulate(math.comb(n, i) / 2**n for i in range(n))
        i = max(0, sum(2 * chance <= 0.05 for chance in below) - 1)
        return cls(statistics.median(ratios), ratios[i], ratios[n - 1 - i], n)

    def __str__(self) -> str:
        interval = f" [{self.low:.3f}, {self.high:.3f}]" if self.n > 1 else ""
        return f"{self.median:.3f}{interval}"


@dataclass(frozen=True)
class Row:
    """One way: median milliseconds of n runs, and its ratio to plain decoding."""

    ms: float
    n: int
    ratio: Ratio

    @classmethod
    def of(cls, runs: Sequence[float], rounds: Sequence[float], plain: Sequence[float]) -> Row:
        return cls(statistics.median(runs), len(runs), Ratio.of(rounds, plain))


@dataclass(frozen=True)
class Bound:
    """A figure and what it may be at most."""

    name: str
    ratio: Ratio
    limit: float

    @property
    def met(self) -> bool:
        return self.ratio.median <= self.limit


@dataclass(frozen=True)
class Figures:
    """All that is measured of one quantisation."""

    quant: Quant
    decode: dict[str, Row]
    prefill: dict[str, Row]
    memory_mib: dict[str, dict[str, float]]
    bounds: tuple[Bound, ...]

    def as_dict(self) -> dict[str, Any]:
        bounds = [{**asdict(bound), "met": bound.met} for bound in self.bounds]
        return {**asdict(self), "bounds": bounds}


class Unhooked:
    """llama-cpp-python alone, on as long a text: the speed that plain decoding is held against."""

    def __init__(self, llama: llama_cpp.Llama, n_prompt: int) -> None:
        self._llama, self._n_prompt = llama, n_prompt

    def prefill(self) -> None:
        self._llama.reset()
        self._llama.eval([TOKEN] * self._n_prompt)

    def rewind(self) -> None:
        self._llama.n_tokens = self._n_prompt

    def step(self) -> None:
        self._llama.eval([TOKEN])
        llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)


class Guided:
    """The engine of a `GuidedVLM`, plain or guided, as one of the ways to decode."""

    def __init__(self, vlm: GuidedVLM, guidance: Guidance, request: Request) -> None:
        self._engine, self._guidance = vlm.engine, guidance
        text = request.text(vlm.projector.marker)
        self.prompt = vlm.projector.encode(vlm.projector.tokenize(text, [request.image()]))

    def prefill(self) -> None:
        self._engine.prefill(self.prompt, self._guidance)
        self._start = self._engine.n_past, self._engine.n_cells

    def rewind(self) -> None:
        engine = self._engine
        engine.n_past, engine.n_cells = self._start
        for branch in (engine.original, engine.degraded):
            branch.context.truncate(branch.seq, engine.n_past)

    def step(self) -> None:
        self._engine.step(TOKEN)


class Unpatched(Guided):
    """The two rows of a guided pair with nothing masked: what the pair costs without the patch."""

    def step(self) -> None:
        engine = self._engine
        context, both = engine.original.context, np.ones(2, np.int32)
        seqs = np.array([engine.original.seq, engine.degraded.seq], np.int32)
        outputs = np.ones(2, bool)
        context.decode(TOKEN * both, engine.n_past * both, seqs, outputs=outputs, plan=None)
        context.logits_address(0)
        context.logits_address(1)
        engine.n_past += 1


Way = Unhooked | Guided


def open_ways(pair: Pair, args: argparse.Namespace) -> dict[str, Way]:
    """Every way to decode, each with contexts of its own on the same weights."""
    request = Request(args.before_tokens, args.image_tokens, args.prompt_tokens)
    llama = llama_cpp.Llama(
        str(pair.llm),
        n_ctx=args.n_ctx,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        n_gpu_layers=args.n_gpu_layers,
        flash_attn=args.flash_attn,
        verbose=False,
    )

    def guided(guidance: Guidance, kind: type[Guided] = Guided, **settings: Any) -> Guided:
        use_gpu = args.n_gpu_layers != 0
        # A prompt that is kept would be a prompt that is not measured the second time.
        settings = {"prefix_cells": 0, "use_gpu": use_gpu, **settings}
        vlm = GuidedVLM.from_llama(llama, pair.mmproj, **settings)
        return kind(vlm, guidance, request)

    plain = guided(PLAIN)
    return {
        UNHOOKED: Unhooked(llama, plain.prompt.n_tokens),
        IDLE: plain,
        TWO: guided(ONCE, pairing="contexts"),
        UNPATCHED: guided(ONCE, Unpatched),
        PROMPT: guided(ONCE),
        EVERY: guided(STEP),
    }


def measure_prefill(ways: dict[str, Way], rounds: int, label: str) -> Times:
    """Milliseconds of each round's prefill; leaves every way at the end of the prompt."""
    for way in track(list(ways.values()), f"{label} warming up", console=STDERR):
        way.prefill()
    timed = [IDLE, PROMPT, EVERY]
    times: Times = {name: [] for name in timed}
    for i in track(range(rounds), f"{label} prefill", console=STDERR):
        for k in range(len(timed)):
            name = timed[(i + k) % len(timed)]
            times[name].append(_milliseconds(ways[name].prefill))
    return times


def measure_decode(
    ways: dict[str, Way], rounds: int, steps: int, label: str
) -> dict[str, list[list[float]]]:
    """Milliseconds of every step, by round. A step before those of a round is not counted."""
    times: dict[str, list[list[float]]] = {name: [] for name in ways}
    for i in track(range(rounds), f"{label} decoding", console=STDERR):
        for k in range(len(ways)):
            name, way = list(ways.items())[(i + k) % len(ways)]
            way.rewind()
            way.step()
            times[name].append([_milliseconds(way.step) for _ in range(steps)])
    return times


def measure_memory(pair: Pair, argv: Sequence[str], label: str) -> dict[str, dict[str, float]]:
    """Peak MiB of a fresh process, by how the weights are loaded and what is asked of it."""
    peaks: dict[str, dict[str, float]] = {}
    cases = [(load, kind) for load in ("mapped", "read") for kind in ("plain", "guided")]
    for load, kind in track(cases, f"{label} memory", console=STDERR):
        command = [sys.executable, __file__, *argv, "--answer", kind, load, *map(str, pair)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks.setdefault(load, {})[kind] = float(done.stdout)
    return peaks


def answer(args: argparse.Namespace) -> int:
    """One request in this process, then its peak memory in MiB on stdout."""
    kind, load, llm, mmproj = args.answer
    request = Request(args.before_tokens, args.image_tokens, args.prompt_tokens)
    vlm = GuidedVLM(
        llm,
        mmproj,
        n_ctx=args.n_ctx,
        n_threads=args.threads,
        n_gpu_layers=args.n_gpu_layers,
        use_mmap=load == "mapped",
        flash_attn=args.flash_attn,
    )
    vlm.generate(
        request.text("<__media__>"),
        [request.image()],
        raw=True,
        guidance=STEP if kind == "guided" else PLAIN,
        sampling=Sampling(logit_bias={END_TOKEN: -1e9}),
        max_tokens=16,
    )
    print(_peak_mib())
    return 0


def measure(quant: Quant, argv: Sequence[str], args: argparse.Namespace) -> Figures:
    """All figures of one quantisation."""
    pair = benchmark_pair(args.cache, quant, n_image_tokens=args.image_tokens)
    memory = measure_memory(pair, argv, quant)
    with STDERR.status(f"{quant} loading"):
        ways = open_ways(pair, args)
    prefill = measure_prefill(ways, args.prefill_rounds, quant)
    steps = measure_decode(ways, args.rounds, args.steps, quant)
    decode = {name: [statistics.median(run) for run in runs] for name, runs in steps.items()}

    def bound(name: str, times: Times, way: str, base: str, limit: float) -> Bound:
        return Bound(name, Ratio.of(times[way], times[base]), limit)

    return Figures(
        quant=quant,
        decode={n: Row.of([*chain(*steps[n])], decode[n], decode[IDLE]) for n in ways},
        prefill={n: Row.of(runs, runs, prefill[IDLE]) for n, runs in prefill.items()},
        memory_mib=memory,
        bounds=(
            bound("plain / llama_cpp.Llama", decode, IDLE, UNHOOKED, 1.03),
            bound("patch (prompt) / pair without", decode, PROMPT, UNPATCHED, 1.03),
            bound("refresh step / prompt", decode, EVERY, PROMPT, 1.10),
            bound("pair (prompt) / two contexts", decode, PROMPT, TWO, 1.0),
            bound("pair (step) / two contexts", decode, EVERY, TWO, 1.0),
            bound("prefill, prompt / plain", prefill, PROMPT, IDLE, 1.10),
            bound("prefill, step / plain", prefill, EVERY, IDLE, 1.10),
            *(
                Bound(f"peak memory, weights {load}", Ratio.of([m["guided"]], [m["plain"]]), 1.05)
                for load, m in memory.items()
            ),
        ),
    )


def show(figures: Figures, console: Console) -> None:
    """Prints the table for people."""
    table = Table(f"{figures.quant}, decoding a token", box=None)
    for column in ("ms", "x plain [95%]", "n"):
        table.add_column(column, justify="right")
    for phase, rows in (("", figures.decode), ("prefill, ", figures.prefill)):
        for name, row in rows.items():
            table.add_row(f"{phase}{name}", f"{row.ms:.1f}", str(row.ratio), str(row.n))
    console.print(table)
    for load, peak in figures.memory_mib.items():
        both = ", ".join(f"{kind} {mib:.0f}" for kind, mib in peak.items())
        console.print(f"peak MiB, weights {load}: {both}")
    bounds = Table("expected", box=None)
    for column in ("at most", "is", ""):
        bounds.add_column(column, justify="right")
    for b in figures.bounds:
        bounds.add_row(b.name, f"{b.limit:.2f}", str(b.ratio), "met" if b.met else "MISSED")
    console.print(bounds)


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on and with."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "cmg_gguf": cmg_gguf.__version__,
        "llama_cpp_python": llama_cpp.__version__,
        **{k: v for k, v in vars(args).items() if k not in ("cache", "answer", "json_only")},
    }


def _milliseconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def _peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with that of the parent process
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What guidance costs, on random weights.")
    add = parser.add_argument
    add("--quant", choices=[*get_args(Quant), "both"], default="both")
    add("--cache", type=Path, default=cache_folder(), help="folder of the random models")
    add("--before-tokens", type=int, default=40, help="text in front of the image")
    add("--image-tokens", type=int, default=576, help="a square number")
    add("--prompt-tokens", type=int, default=24, help="text behind the image")
    add("--steps", type=int, default=4, help="steps of each way in a round")
    add("--rounds", type=int, default=32)
    add("--prefill-rounds", type=int, default=5)
    add("--threads", type=int, default=os.cpu_count())
    add("--n-ctx", type=int, default=2048)
    add("--n-gpu-layers", type=int, default=0, help="-1 = all")
    add("--flash-attn", action=argparse.BooleanOptionalAction, default=True)
    add("--json-only", action="store_true", help="no table")
    add("--answer", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, returns 0."""
    argv = sys.argv[1:] if argv is None else argv
    args = _arguments(argv)
    if args.answer:
        return answer(args)
    about, results = machine(args), []
    quants = get_args(Quant) if args.quant == "both" else [args.quant]
    width = None if sys.stdout.isatty() else 100
    console = Console(width=width, highlight=False, quiet=args.json_only)
    console.print(", ".join(f"{k} {v}" for k, v in about.items()))
    for quant in quants:
        figures = measure(quant, argv, args)
        show(figures, console)
        results.append(figures.as_dict())
    print(json.dumps({"machine": about, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
