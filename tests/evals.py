"""A benchmark of a few drawn pictures, for tests of runs; importable by other processes.

python tests/evals.py FOLDER MODEL MMPROJ METHODS PARALLEL     # runs it, as `evaluate` does
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiny_llava import TinyPair

from cmg_gguf.evaluation.items import WHOLE
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.method import Method
from cmg_gguf.evaluation.methods import chosen
from cmg_gguf.evaluation.records import TIMING, Record
from cmg_gguf.evaluation.run import Run, evaluate
from cmg_gguf.evaluation.task import BadItem, Item, Task
from cmg_gguf.guidance import Guidance, TopRatio

ROUNDED = ("yes_margin", "yes_lead")
"""Fields that differ by rounding where answers are made together."""
GUIDANCE = Guidance(alpha=3.0, tokens=TopRatio(1.0))
QUESTIONS = ("Is there a dog?", "Is there a red cup?", "Is the table green?")
OPTIONS = {
    "n_ctx": 256,
    "n_ubatch": 64,
    "n_threads": 1,
    "n_gpu_layers": 0,
    "flash_attn": False,
    "type_k": "f32",
    "type_v": "f32",
}


@dataclass(frozen=True)
class Squares:
    """Yes/no questions about pictures 0 to n - 1; one more picture is broken, one line no item.

    File order goes question by question, so that the questions about a picture are apart.
    """

    folder: Path
    n: int = 4
    yes_no: bool = True
    max_tokens: int = 4

    name: ClassVar[str] = "squares"

    def items(self) -> Iterator[Item | BadItem]:
        for q, question in enumerate(QUESTIONS):
            for k in range(self.n):
                yield self._item(k, q, question)
            if q == 0:
                yield BadItem("squares.json:7", "label is missing")
                yield self._item(-1, q, question)

    def _item(self, k: int, q: int, question: str) -> Item:
        name = "broken.png" if k < 0 else f"{k}.png"
        return Item(
            id=f"{name}/{q}",
            image=self.folder / name,
            prompt=question,
            truth={"label": "yes" if (k + q) % 2 else "no"} if self.yes_no else {},
            part="odd" if k % 2 else "even",
            cluster=name,
            max_tokens=self.max_tokens,
        )

    def load(self, item: Item) -> Path:
        return Path(str(item.image))

    def counts(self, item: Item, answer: str) -> dict[str, float]:
        return {"answers": 1.0, "long": float(len(answer) > 12), "letters": float(len(answer))}

    def figures(self, sums: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        answers = np.where(sums["answers"] == 0, np.nan, sums["answers"])
        return {"accuracy": 100 * sums["long"] / answers, "letters": sums["letters"] / answers}


@dataclass(frozen=True)
class Pressed:
    """Stands for a task; a process that is sent it gets Ctrl-C as soon as it reads it, ahead of any
    work, and then has the task."""

    task: Task

    def __reduce__(self) -> tuple[Any, ...]:
        return _pressed, (self.task,)


def _pressed(task: Task) -> Task:
    signal.raise_signal(signal.SIGINT)
    return task


def squares(folder: Path, **settings: Any) -> Squares:
    """The benchmark, its pictures drawn into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    task = Squares(folder, **settings)
    for k in range(task.n):
        pixels = np.random.default_rng(k).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels.repeat(14, axis=0).repeat(14, axis=1)).save(folder / f"{k}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG not really")
    return task


def files(pair: TinyPair, parallel: int = 1) -> ModelFiles:
    """The tiny pair, as runs take it; one answer at a time, so that they repeat to the bit."""
    return ModelFiles(pair.llm, pair.mmproj, {**OPTIONS, "n_parallel": parallel})


def methods(names: str) -> tuple[Method, ...]:
    """Methods by their names, with commas between."""
    return chosen(names.split(","), GUIDANCE)


def untimed(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The records without what differs between two equal runs."""
    return [{k: v for k, v in asdict(r).items() if k not in TIMING} for r in records]


def check_alike(records: Sequence[Record], others: Sequence[Record], within: float = 1e-4) -> None:
    """Fails unless the records are the same in the same order, but for rounding and timing."""
    for one, other in zip(untimed(records), untimed(others), strict=True):
        assert one == {**other, **{name: one[name] for name in ROUNDED}}
        for name in ROUNDED:
            assert one[name] == pytest.approx(other[name], abs=within), (name, one)


def ran(
    task: Squares, pair: TinyPair, names: str, folder: Path, *, parallel: int = 1, **settings: Any
) -> Run:
    """A finished run."""
    model = files(pair, parallel)
    return evaluate(task, model, methods(names), folder, **{"shard": WHOLE, **settings})


def main(arguments: Sequence[str]) -> None:
    """A run in a process of its own: folder, model, mmproj, methods, n_parallel. Prints what is
    done."""
    folder, model, mmproj, names, parallel = arguments
    pair = TinyPair(Path(model), Path(mmproj))
    task = Squares(Path(folder).parent / "pictures")
    told = lambda done, total: print(done, flush=True)  # noqa: E731
    ran(task, pair, names, Path(folder), parallel=int(parallel), progress=told)
