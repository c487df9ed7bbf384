"""What guidance costs: tokens, requests and memory against plain decoding, on random weights.

    python scripts/bench.py                      # Q4_0, Q8_0, Q4_K_M
    python scripts/bench.py --quick              # a few rounds of Q4_0
    python scripts/bench.py | tail -n 1 | jq '.rows[] | {name, results}'
    python scripts/bench.py --record             # records which steps need the degraded branch

A table for people on stdout, and one JSON object as its last line for programs. Progress is on
stderr. The exit status is 0 whether what is wanted is met or missed.

The random model has the shape of TinyLlama and 576 image tokens: it takes the time that a trained
one of this shape takes. Its image encoder is as small as one can be, so ratios of requests are
those of the language model alone; an encoder of real size, which runs once either way, brings them
nearer to 1. Beside them stand milliseconds of the model that comes with the package, if it is
there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import llama_cpp
from benchmark_model import cache_folder
from benchmarks.drawing import measure_drawing
from benchmarks.measure import Options, expected_seconds, measure
from benchmarks.quantized import BenchQuant
from benchmarks.report import as_json, new_table
from benchmarks.schedule import FILE, N_RECORDED, load_schedule, record_schedule, save_schedule
from benchmarks.subjects import Subject, embedded_subject, random_subject
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import cmg_gguf
from cmg_gguf.llama.context import usable_threads
from cmg_gguf.llama.log import set_verbose

STDERR = Console(stderr=True)
ROUNDS, QUICK_ROUNDS = 12, 3
WIDTH = 180
"""Of the table where stdout is no terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, returns 0; 1 where there is nothing to record from."""
    args = _arguments(argv)
    set_verbose(False)
    if args.record:
        return _record()
    quants: list[BenchQuant] = args.quants
    options = Options(args.rounds, args.threads, args.ngl)
    subjects = [random_subject(args.models, quant) for quant in quants]
    if (embedded := embedded_subject()) is not None:
        subjects.append(embedded)
    else:
        STDERR.print("without the model of the package: its files are not part of this checkout")
    schedule = load_schedule()
    about = machine(options)
    STDERR.print(_preview(subjects, expected_seconds(subjects[0], schedule, options)))
    with _progress() as progress:
        drawing = measure_drawing()
        results = [measure(subject, schedule, options, progress) for subject in subjects]
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()), soft_wrap=True)
    console.print(new_table(results, schedule, drawing))
    print(json.dumps({"machine": about, **as_json(results, schedule, drawing)}))
    return 0


def machine(options: Options) -> dict[str, Any]:
    """What the figures are measured on and with."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "cmg_gguf": cmg_gguf.__version__,
        "llama_cpp_python": llama_cpp.__version__,
        **dataclasses.asdict(options),
    }


def _record() -> int:
    subject = embedded_subject()
    if subject is None:
        STDERR.print("there is no model to record from: its files are not part of this checkout")
        return 1
    guidance = importlib.import_module("cmg_gguf.tiny.pair").embedded_guidance()
    with _progress() as progress:
        task = progress.add_task("captions", total=N_RECORDED)
        schedule = record_schedule(subject, guidance, lambda: progress.advance(task))
    save_schedule(schedule, {"model": subject.pair.llm.name})
    STDERR.print(
        f"{FILE.name}: {schedule.share:.1%} of the steps ask; approximating changes "
        f"{schedule.n_differing} of {schedule.n_compared} captions"
    )
    return 0


def _preview(subjects: Sequence[Subject], first: float) -> str:
    """How long it will take: the first subject's seconds, and the others' by their size."""
    sizes = [subject.pair.llm.stat().st_size for subject in subjects]
    minutes = first * sum(sizes) / sizes[0] / 60
    names = ", ".join(subject.name for subject in subjects)
    time = "a minute" if minutes < 1.5 else f"{minutes:.0f} minutes"
    return f"about {time} for {names}; fewer --rounds take less"


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=STDERR)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    summary = "What guidance costs, on random weights."
    parser = argparse.ArgumentParser(description=summary)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of q4_0 alone")
    add("--rounds", type=_positive, help=f"answers replayed in every way; default {ROUNDS}")
    add("--quants", nargs="+", choices=get_args(BenchQuant), help="default: all three")
    add("--models", type=Path, default=cache_folder(), help="folder of the random models")
    add("--ngl", type=int, default=0, help="layers on the accelerator; -1 = all")
    add("--threads", type=_positive, default=usable_threads())
    add("--record", action="store_true", help="only record which steps ask for l_d")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    args.quants = args.quants or (["q4_0"] if args.quick else list(get_args(BenchQuant)))
    return args


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: 1 and up")
    return number


if __name__ == "__main__":
    sys.exit(main())
