"""What a token costs where other programs keep the cores busy, by how OpenMP's threads wait.

    python scripts/bench_busy.py                              # as shipped, beside llama_cpp.Llama
    python scripts/bench_busy.py --spins 100 1000 10000 --passive --threads 1 2

A table for people on stdout, and one JSON object as its last line for programs. Progress is on
stderr. On random weights of 1.1 billion parameters, written once, or on the built-in model
(`--model embedded`), of whose tokens waiting is the larger part.

Each way is a process of its own, for libgomp reads its environment when it is loaded; all stay, and
decode by turns. A round: every way on cores that nothing of this script keeps busy, then every way
beside one process for each core that counts without end. What others do on the machine is in both;
the load average at the start of each round is told. Ratios are medians of a round's ratios.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

from benchmark_model import benchmark_pair, cache_folder
from rich.console import Console
from rich.progress import track
from rich.table import Table

STDERR = Console(stderr=True)
EMBEDDED = "embedded"
LLAMA, PLAIN, GUIDED = "llama_cpp.Llama", "cmg-gguf, plain", "cmg-gguf, guided"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
LIBGOMP = {"GOMP_SPINCOUNT": "300000"}
"""What libgomp takes where nobody says anything: llama.cpp's waiting without anything of ours."""
BUSY = "while True: pass"
SETTLED = 0.5
"""Seconds until processes that were started keep their cores busy."""


@dataclass(frozen=True)
class Way:
    """Whose decoding, with what in its environment, and how many threads."""

    kind: str
    environ: dict[str, str]
    threads: int

    @property
    def name(self) -> str:
        told = ", ".join(f"{name}={value}" for name, value in self.environ.items())
        return f"{self.kind}, {self.threads} threads{', ' if told else ''}{told}"


@dataclass(frozen=True)
class Round:
    """Milliseconds a token of every way, and the load average ahead of it."""

    idle: dict[str, float]
    busy: dict[str, float]
    load: float


def ways(args: argparse.Namespace) -> list[Way]:
    """The first is what the others are compared with."""
    most = max(args.threads)
    found = [Way(PLAIN, LIBGOMP, most), Way(LLAMA, {}, most), Way(PLAIN, {}, most)]
    found += [Way(GUIDED, LIBGOMP, most), Way(GUIDED, {}, most)] if args.guided else []
    others = [{"GOMP_SPINCOUNT": str(n)} for n in args.spins]
    others += [{"OMP_WAIT_POLICY": "passive"}] * args.passive
    found += [Way(PLAIN, environ, most) for environ in others]
    return found + [Way(PLAIN, LIBGOMP, n) for n in args.threads if n != most]


class Decoding:
    """A process that decodes one way when it is asked to."""

    def __init__(self, way: Way, model: str) -> None:
        environ = {name: value for name, value in os.environ.items() if name not in WAITING}
        command = [sys.executable, __file__, "--decode", way.kind, "--model", model]
        self._process = subprocess.Popen(
            [*command, "--threads", str(way.threads)],
            env={**environ, **way.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Decoding:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def milliseconds(self, seconds: float) -> float:
        """A token, of as many as take so long."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{seconds}\n")
        stdin.flush()
        return float(stdout.readline())


def decode(kind: str, threads: int, model: str) -> None:
    """What such a process does: reads seconds, writes milliseconds a token."""
    # Whoever is imported first decides how threads wait.
    importlib.import_module("llama_cpp" if kind == LLAMA else "cmg_gguf")
    tokens = decoded(kind, threads, model)
    next(tokens)
    for line in sys.stdin:
        n, spent, started = 0, 0.0, time.perf_counter()
        while spent < float(line):
            next(tokens)
            n, spent = n + 1, time.perf_counter() - started
        print(1e3 * spent / n, flush=True)


def decoded(kind: str, threads: int, model: str) -> Iterator[object]:
    """Answers without end, each behind the prompt, which is decoded with the first token of all."""
    from benchmarks.decoding import HALF, Guided, Unhooked
    from benchmarks.plain_llama import open_llama
    from benchmarks.quantized import BenchQuant
    from benchmarks.subjects import embedded_subject, random_subject

    from cmg_gguf import GuidedVLM
    from cmg_gguf.guidance import PLAIN as UNGUIDED

    if model == EMBEDDED:
        subject = embedded_subject()
    else:
        subject = random_subject(cache_folder(), cast(BenchQuant, model))
    if subject is None:
        raise SystemExit("the built-in model did not come along with this package")
    shape: dict[str, Any] = {"n_ctx": 2048, "n_threads": threads, "flash_attn": True}
    if kind == LLAMA:
        llama = open_llama(subject.pair.llm, n_threads_batch=threads, verbose=False, **shape)
        return _without_end(Unhooked(llama, 640), False)
    vlm = GuidedVLM(*subject.pair, n_gpu_layers=0, strategy="exact", **shape)
    guidance = HALF if kind == GUIDED else UNGUIDED
    return _without_end(Guided(vlm, subject, guidance), kind == GUIDED)


def _without_end(way: Any, needs_l_d: bool) -> Iterator[object]:
    while True:
        yield from way.answer((needs_l_d,) * 500)


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Beside n processes that do nothing but keep a core busy."""
    command = [sys.executable, "-c", BUSY]
    processes = [subprocess.Popen(command) for _ in range(n)]
    try:
        time.sleep(SETTLED)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measured(decoding: dict[str, Decoding], number: int, args: argparse.Namespace) -> Round:
    """One round; another way begins each."""
    names = list(decoding)
    names = names[number % len(names) :] + names[: number % len(names)]

    def turn() -> dict[str, float]:
        return {name: decoding[name].milliseconds(args.seconds) for name in names}

    load = os.getloadavg()[0]
    idle = turn()
    with busy(args.busy):
        return Round(idle, turn(), load)


def figures(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """For each way: medians and ranges, in milliseconds and by the first way of the same round."""
    first, found = next(iter(rounds[0].idle)), []
    for name in rounds[0].idle:
        row: dict[str, Any] = {"way": name}
        for state in ("idle", "busy"):
            times = [getattr(one, state) for one in rounds]
            ratios = [each[name] / each[first] for each in times]
            values = [each[name] for each in times]
            row[f"{state}_ms"] = [median(values), min(values), max(values)]
            row[f"{state}_ratio"] = [median(ratios), min(ratios), max(ratios)]
        found.append(row)
    return found


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints the table for people."""
    table = Table("median [range]", box=None)
    for column in ("idle, ms", "x the first", "busy, ms", "x the first"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = []
        for state in ("idle", "busy"):
            cells.append("{:.0f} [{:.0f}, {:.0f}]".format(*row[f"{state}_ms"]))
            cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*row[f"{state}_ratio"]))
        table.add_row(row["way"], *cells)
    console.print(table)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a token costs on cores that are busy.")
    add = parser.add_argument
    add("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    add("--spins", type=int, nargs="*", default=[], help="more ways: GOMP_SPINCOUNT")
    add("--passive", action="store_true", help="one more: OMP_WAIT_POLICY=passive")
    add("--guided", action=argparse.BooleanOptionalAction, default=True)
    add("--busy", type=int, default=os.cpu_count() or 1, help="processes; one a core")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=1.0, help="of each way, idle and busy, in a round")
    add("--model", choices=("q4_0", "q8_0", EMBEDDED), default="q4_0")
    add("--decode", choices=(LLAMA, PLAIN, GUIDED), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, returns 0."""
    args = _arguments(argv)
    if args.decode:
        decode(args.decode, args.threads[0], args.model)
        return 0
    if args.model != EMBEDDED:
        benchmark_pair(cache_folder(), args.model)
    with ExitStack() as open_ones:
        decoding = {
            way.name: open_ones.enter_context(Decoding(way, args.model)) for way in ways(args)
        }
        for one in decoding.values():
            one.milliseconds(0.2)  # graphs are made, and pages read
        numbers = track(range(args.rounds), "measuring", console=STDERR)
        rounds = [measured(decoding, number, args) for number in numbers]
    about = {name: value for name, value in vars(args).items() if name != "decode"}
    about["load_average"] = [one.load for one in rounds]
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows = figures(rounds)
    show(rows, console)
    print(json.dumps({"about": about, "results": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
