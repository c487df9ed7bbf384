"""What guidance costs where many questions are asked about an image, as in POPE.

    python scripts/bench_questions.py                      # the built-in model, drawn scenes
    python scripts/bench_questions.py -m model.gguf --mmproj mmproj.gguf --max-tokens 1

Tables for people on stdout, and one JSON object as its last line for programs. Progress is on
stderr. The exit status is 0 whether the bounds are met or missed.

The same questions about the same picture files are answered in three ways: plainly by the
evaluation's `greedy`, under guidance by its `cmg`, and plainly by llama-cpp-python's own chat
handler, which is given the very prompts that the others get. They take turns in one process: a
round runs each once over all pictures. Shown is the median of the rounds' ratios with its 95%
interval. Models are loaded, and each way has run once, before anything is timed; what a way before
has left of prompts and pictures is forgotten.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.plain_llama import open_llama
from benchmarks.ratios import Middle
from llama_cpp.llama_chat_format import Llava15ChatHandler
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cmg_gguf import Guidance, GuidedVLM
from cmg_gguf.evaluation import Item, Method, ModelFiles, chosen
from cmg_gguf.evaluation.answering import Answerer, Job, Work
from cmg_gguf.evaluation.items import groups
from cmg_gguf.evaluation.tasks.scenes import ScenePope
from cmg_gguf.prompt.messages import render_messages
from cmg_gguf.tiny.pair import embedded_guidance, embedded_pair, settings_file

GREEDY, CMG, HANDLER = "greedy", "cmg", "chat handler"
N_QUESTIONS = 6
STDERR = Console(stderr=True)


@dataclass(frozen=True)
class Bound:
    """A figure and what it may be at most."""

    name: str
    ratio: Middle
    limit: float

    @property
    def met(self) -> bool:
        """Whether the median is."""
        return self.ratio.median <= self.limit


class PictureFiles(ScenePope):
    """`ScenePope` whose items name picture files."""

    def load(self, item: Item) -> Path:  # type: ignore[override]
        return Path(str(item.image))


class GivenPrompt(Llava15ChatHandler):  # type: ignore[misc]
    """The handler with a text part that is the whole prompt, the picture's address in it."""

    DEFAULT_SYSTEM_MESSAGE = None
    CHAT_FORMAT = "{{ messages[0].content[1].text }}"


class Bench:
    """Three ways to answer the questions of `groups`, by name."""

    def __init__(self, args: argparse.Namespace, pair: tuple[Path, Path], folder: Path) -> None:
        shape: dict[str, Any] = {"n_ctx": args.n_ctx, "n_threads": args.threads}
        shape |= {"n_gpu_layers": args.n_gpu_layers, "flash_attn": True}
        self._task = PictureFiles("test", "counter", 20 * args.images)
        self.groups = picture_groups(self._task, args, folder)
        self.vlm = GuidedVLM(*pair, **shape, n_parallel=1)
        self._llama = open_llama(
            pair[0],
            n_threads_batch=args.threads,
            chat_handler=GivenPrompt(str(pair[1]), verbose=False),
            verbose=False,
            **shape,
        )
        files = ModelFiles(str(pair[0]), str(pair[1]))
        plain, guided = chosen([GREEDY, CMG], guidance_for(args))
        self.ways: dict[str, Callable[[], list[str]]] = {
            GREEDY: self._evaluation(plain, files),
            CMG: self._evaluation(guided, files),
            HANDLER: self._handler(),
        }

    def _evaluation(self, method: Method, files: ModelFiles) -> Callable[[], list[str]]:
        answerer = Answerer(Job(self._task, files, (method,), 0), self.vlm)
        name = frozenset([method.name])
        works = [Work(tuple((item, name) for item in group)) for group in self.groups]
        return lambda: [r.answer or "" for r in answerer.answers(works)]

    def _handler(self) -> Callable[[], list[str]]:
        asked = [(self._messages(item), item.max_tokens) for group in self.groups for item in group]
        ask = partial(self._llama.create_chat_completion, temperature=0.0, repeat_penalty=1.0)

        def answer(messages: list[dict[str, Any]], n: int) -> str:
            return str(ask(messages, max_tokens=n)["choices"][0]["message"]["content"]).strip()

        return lambda: [answer(*question) for question in asked]

    def _messages(self, item: Item) -> list[dict[str, Any]]:
        url = Path(str(item.image)).as_uri()
        parts = [{"type": "image", "image": url}, {"type": "text", "text": item.prompt}]
        messages = [{"role": "user", "content": parts}]
        text = render_messages(messages, self.vlm.template, marker=url).text
        picture = {"type": "image_url", "image_url": url}
        return [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]


def picture_groups(task: ScenePope, args: argparse.Namespace, folder: Path) -> list[list[Item]]:
    """The first pictures with six questions, as files in `folder`, and those questions."""
    found: list[list[Item]] = []
    for group in groups(item for item in task.items() if item.part == "adversarial"):
        if len(group) == N_QUESTIONS and len(found) < args.images:
            file = folder / f"picture-{len(found)}.png"
            Image.fromarray(ScenePope.load(task, group[0])).save(file)
            n = args.max_tokens
            found.append([replace(x, image=file, max_tokens=n or x.max_tokens) for x in group])
    return found


def guidance_for(args: argparse.Namespace) -> Guidance:
    """Those of the built-in model, where it is asked and has some; else the defaults."""
    return embedded_guidance() if not args.model and settings_file().is_file() else Guidance()


def measure(bench: Bench, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """Seconds of each round by way, and the answers of each way."""
    answers = {name: answer() for name, answer in bench.ways.items()}
    times: dict[str, list[float]] = {name: [] for name in bench.ways}
    for i in track(range(rounds), "answering", console=STDERR):
        for k in range(len(bench.ways)):
            name = list(bench.ways)[(i + k) % len(bench.ways)]
            bench.vlm.forget()  # the handler keeps nothing
            started = time.perf_counter()
            bench.ways[name]()
            times[name].append(time.perf_counter() - started)
    return times, answers


def show(seconds: dict[str, float], n: int, bounds: Sequence[Bound], console: Console) -> None:
    """Prints the tables for people. seconds: of n questions, by way."""
    times = Table("answers", "ms a question", "s a round", box=None)
    for name, median in seconds.items():
        times.add_row(name, f"{median / n * 1e3:.1f}", f"{median:.2f}")
    limits = Table("expected", "at most", "is", "", box=None)
    for b in bounds:
        limits.add_row(b.name, f"{b.limit:.2f}", str(b.ratio), "met" if b.met else "MISSED")
    console.print(times)
    console.print(limits)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What guidance costs on yes/no questions.")
    add = parser.add_argument
    add("-m", "--model", type=Path, help="with --mmproj; otherwise the built-in model")
    add("--mmproj", type=Path)
    add("--images", type=int, default=8, help=f"with {N_QUESTIONS} questions each")
    add("--max-tokens", type=int, help="of an answer; as the questions say if not given")
    add("--rounds", type=int, default=12)
    add("--threads", type=int, default=os.cpu_count())
    add("--n-ctx", type=int, default=2048)
    add("--n-gpu-layers", type=int, default=0, help="-1 = all")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.mmproj is None):
        parser.error("a model of your own is two files: give both -m and --mmproj")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, returns 0."""
    args = _arguments(argv)
    pair = (args.model, args.mmproj) if args.model else embedded_pair()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, pair, Path(folder))
        times, answers = measure(bench, args.rounds)
    n = len(answers[GREEDY])
    seconds = {name: statistics.median(runs) for name, runs in times.items()}
    bounds = (
        Bound("cmg / greedy", Middle.of_ratios(times[CMG], times[GREEDY]), 1.15),
        Bound("cmg / chat handler", Middle.of_ratios(times[CMG], times[HANDLER]), 1.0),
    )
    same = sum(a == b for a, b in zip(answers[GREEDY], answers[HANDLER], strict=True))
    args.model, args.mmproj = (path.name for path in pair)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    about = {
        **vars(args),
        "cores": os.cpu_count(),
        "load_average": load,
        "questions": n,
        "same_plain_answers": same,
    }
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(", ".join(f"{k} {v}" for k, v in about.items()))
    show(seconds, n, bounds, console)
    limits = [{**asdict(bound), "met": bound.met} for bound in bounds]
    print(json.dumps({"about": about, "seconds": seconds, "bounds": limits}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
