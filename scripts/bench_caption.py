"""What captioning a folder costs beside its answers: speed against generate_many, and memory.

    python scripts/bench_caption.py                      # the built-in model, 500 drawn pictures
    python scripts/bench_caption.py -m model.gguf --mmproj mmproj.gguf --pictures 20 --chunk 5

Tables for people on stdout, and one JSON object as its last line for programs. Progress is on
stderr. The exit status is 0 whether what is wanted is met or missed.

The same picture files are captioned by `cmg_gguf.caption`, with its journal and a text file beside
each picture, and answered by `generate_many`, with the same prompt, guidance and limit of tokens,
on one model. They take turns in one process, a chunk of the pictures each, and each chunk begins
with the other. Shown is the median of the chunks' ratios of tokens a second with its 95% interval.
Both have run once before anything is timed; what a way before has left of prompts is forgotten.
Memory is what the process has resident behind each answer: the mean of each quarter of the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from benchmarks.ratios import Middle, rotated
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cmg_gguf import Guidance, GuidedVLM, Request, Sampling, caption
from cmg_gguf.captioning.settings import PROMPT
from cmg_gguf.evaluation import ModelFiles
from cmg_gguf.evaluation.answering import Answerer, Job, Work
from cmg_gguf.evaluation.records import Record
from cmg_gguf.tiny.pair import embedded_guidance, embedded_pair, settings_file
from cmg_gguf.tiny.scenes import draw, make_scene

CAPTION, MANY = "caption", "generate_many"
WANTED = 1.0
"""The least ratio of tokens a second."""
GREEDY = Sampling(temperature=0.0)
STDERR = Console(stderr=True)


class Bench:
    """Two ways to ask about a folder of pictures, by name: each gives its number of tokens.

    mib: memory of this process behind each answer, in MiB.
    """

    def __init__(self, args: argparse.Namespace, pair: tuple[Path, Path]) -> None:
        shape = {"n_ctx": args.n_ctx, "n_threads": args.threads, "n_gpu_layers": args.n_gpu_layers}
        self._files = ModelFiles(*pair, {**shape, "n_parallel": args.parallel})
        self._max_tokens = args.max_tokens
        self._guidance = guidance_for(args)
        self._process = psutil.Process()
        self.vlm: GuidedVLM = self._files.open()
        self.mib: list[float] = []
        self.ways: dict[str, Callable[[Path], int]] = {CAPTION: self._caption, MANY: self._many}

    def _caption(self, folder: Path) -> int:
        n_tokens = 0

        def answers(job: Job, works: Sequence[Work]) -> Iterator[Record]:
            """What `caption` does with a loaded model, with its tokens counted."""
            nonlocal n_tokens
            for record in Answerer(job, self.vlm).answers(works):
                n_tokens += record.tokens
                self._note_memory()
                yield record

        caption(
            folder,
            self._files,
            executor=answers,
            existing="overwrite",
            guidance=self._guidance,
            sampling=GREEDY,
            max_tokens=self._max_tokens,
        )
        return n_tokens

    def _many(self, folder: Path) -> int:
        n_tokens = 0
        requests = (self._request(picture) for picture in sorted(folder.glob("*.png")))
        for outcome in self.vlm.generate_many(requests):
            n_tokens += len(outcome.unwrap().tokens)
            self._note_memory()
        return n_tokens

    def _request(self, picture: Path) -> Request:
        how: dict[str, Any] = {"guidance": self._guidance, "sampling": GREEDY}
        return Request(PROMPT, [picture], max_tokens=self._max_tokens, **how)

    def _note_memory(self) -> None:
        self.mib.append(self._process.memory_info().rss / 2**20)


def draw_folders(parent: Path, n_pictures: int, n_chunk: int) -> list[Path]:
    """Drawn scenes, in folders of n_chunk each."""
    folders = []
    for number in range(n_pictures):
        if number % n_chunk == 0:
            folders.append(parent / f"{number:05}")
            folders[-1].mkdir()
        scene = draw(make_scene("test", number, "typical"))
        Image.fromarray(scene).save(folders[-1] / f"{number:05}.png")
    return folders


def guidance_for(args: argparse.Namespace) -> Guidance:
    """Those of the built-in model, where it is asked and has some; else the defaults."""
    return embedded_guidance() if not args.model and settings_file().is_file() else Guidance()


def measure(bench: Bench, folders: Sequence[Path], rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each chunk in each round, by way."""
    for run in bench.ways.values():
        run(folders[0])
    bench.mib.clear()
    rates: dict[str, list[float]] = {name: [] for name in bench.ways}
    turns = list(folders) * rounds
    for number, folder in enumerate(track(turns, "captioning", console=STDERR)):
        for name, run in rotated(bench.ways, number):
            bench.vlm.forget()
            started = time.perf_counter()
            n_tokens = run(folder)
            rates[name].append(n_tokens / (time.perf_counter() - started))
    return rates


def quarters(values: Sequence[float]) -> list[float]:
    """Mean of each quarter of the values, which are four and more."""
    ends = [len(values) * i // 4 for i in range(5)]
    return [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(ends)]


def show(
    rates: dict[str, list[float]], ratio: Middle, memory: Sequence[float], console: Console
) -> None:
    """Prints the tables for people."""
    speeds = Table("answers", "tokens/s", box=None)
    for name, values in rates.items():
        speeds.add_row(name, f"{statistics.median(values):.1f}")
    speeds.add_row(f"{CAPTION} / {MANY}", f"{ratio} (wanted: at least {WANTED:.2f})")
    resident = Table("memory, MiB", *(f"quarter {i}" for i in range(1, 5)), box=None)
    resident.add_row("resident", *(f"{mib:.1f}" for mib in memory))
    console.print(speeds)
    console.print(resident)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What captioning a folder costs.")
    add = parser.add_argument
    add("-m", "--model", type=Path, help="with --mmproj; otherwise the built-in model")
    add("--mmproj", type=Path)
    add("--pictures", type=int, default=500)
    add("--chunk", type=int, default=100, help="pictures of a turn")
    add("--rounds", type=int, default=2, help="over all pictures")
    add("--max-tokens", type=int, default=256, help="of an answer")
    add("--parallel", type=int, default=None, help="answers at once; the model's default")
    add("--threads", type=int, default=os.cpu_count())
    add("--n-ctx", type=int, default=4096)
    add("--n-gpu-layers", type=int, default=0, help="-1 = all")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.mmproj is None):
        parser.error("a model of your own is two files: give both -m and --mmproj")
    for name in ("pictures", "chunk", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is out of range: 1 and up")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, returns 0."""
    args = _arguments(argv)
    pair = (args.model, args.mmproj) if args.model else embedded_pair()
    with tempfile.TemporaryDirectory() as parent:
        bench = Bench(args, pair)
        rates = measure(bench, draw_folders(Path(parent), args.pictures, args.chunk), args.rounds)
    ratio = Middle.of_ratios(rates[CAPTION], rates[MANY])
    memory = quarters(bench.mib)
    args.model, args.mmproj = (path.name for path in pair)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    about = {**vars(args), "cores": os.cpu_count(), "load_average": load}
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(", ".join(f"{k} {v}" for k, v in about.items()))
    show(rates, ratio, memory, console)
    bound = {**asdict(ratio), "wanted": WANTED, "met": ratio.median >= WANTED}
    told = {"about": about, "tokens_per_second": rates, "ratio": bound, "resident_mib": memory}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
