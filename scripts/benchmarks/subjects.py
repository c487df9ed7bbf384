"""Whom the benchmark asks, and what: models with a picture and questions about it."""

from __future__ import annotations

import base64
import importlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_model import PATCH, Pair
from numpy.typing import NDArray
from PIL import Image

from benchmarks.quantized import BenchQuant, quantized_pair
from cmg_gguf.errors import ModelError
from cmg_gguf.tiny.scenes import draw, make_scene
from cmg_gguf.tiny.scenes.catalogue import OBJECTS
from cmg_gguf.tiny.scenes.texts import CAPTION_PROMPTS, existence_question

N_QUESTIONS = 6
EMBEDDED = "embedded"
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """A model, a picture, and questions about it. random: whether its weights are."""

    name: str
    pair: Pair
    system: str
    pixels: NDArray[np.uint8]
    questions: tuple[str, ...]
    random: bool

    def messages(self, question: int = 0, pixels: NDArray[np.uint8] | None = None) -> Messages:
        """A question as OpenAI's clients ask it, the picture in front of it, or another one."""
        shown = self.pixels if pixels is None else pixels
        picture = {"type": "image_url", "image_url": {"url": _data_url(shown)}}
        asked = [picture, {"type": "text", "text": self.questions[question]}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": asked}]


def random_subject(folder: Path, quant: BenchQuant) -> Subject:
    """The random model; written to `folder` if it is not there. About 640 prompt tokens."""
    size = PATCH * 24
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Subject(
        name=quant,
        pair=quantized_pair(folder, quant),
        system=_words(0, 32),
        pixels=pixels,
        questions=tuple(_words(1000 + 100 * i, 12) for i in range(N_QUESTIONS)),
        random=True,
    )


def embedded_subject() -> Subject | None:
    """The model that comes with the package, and a scene; None where it did not come along."""
    try:
        pair = Pair(*importlib.import_module("cmg_gguf.tiny.pair").embedded_pair())
    except (ImportError, ModelError):
        return None
    asked = [existence_question(name) for name in OBJECTS[: N_QUESTIONS - 1]]
    return Subject(
        name=EMBEDDED,
        pair=pair,
        system="",
        pixels=draw(make_scene("test", 0, "typical")),
        questions=(CAPTION_PROMPTS["plain"], *asked),
        random=False,
    )


def pictures(subject: Subject, n: int) -> list[NDArray[np.uint8]]:
    """n pictures of noise, of the size of the subject's."""
    random = np.random.default_rng(1)
    return [random.integers(0, 256, subject.pixels.shape, dtype=np.uint8) for _ in range(n)]


def _words(first: int, n: int) -> str:
    """n words that are one token each."""
    return " ".join(f"w{first + i}" for i in range(n))


def _data_url(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
