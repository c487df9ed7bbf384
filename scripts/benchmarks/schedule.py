"""Which steps of an answer need the degraded branch, as recorded from real captions.

    python scripts/bench.py --record     # asks the model of the package, writes schedule.json

A step needs it where more than one token is plausible after the cut. Random weights are unsure at
nearly every step and a trained model at few, so the speed of lazy stepping on random weights means
something only if the steps that ask are those of a trained one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.subjects import Subject
from cmg_gguf import Guidance, GuidedVLM, Reply
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.tiny.scenes import SceneKind, draw, make_scene
from cmg_gguf.tiny.scenes.texts import CAPTION_PROMPTS

FILE = Path(__file__).with_name("schedule.json")
COMMAND = "python scripts/bench.py --record"
SYNTHETIC_SHARE = 0.13
N_RECORDED, N_STORED = 200, 48
MAX_TOKENS = 192
KINDS: tuple[SceneKind, ...] = ("typical", "counter")

Asked = tuple[bool, ...]
"""For each token of an answer, whether l_d was asked for. The first comes from the prompt."""


@dataclass(frozen=True)
class Schedule:
    """captions: their tokens. synthetic: drawn at random, not recorded.

    n_compared: captions that were told twice; n_differing: of these, how many are another text
    where the degraded branch never catches up (strategy "approximate").
    """

    captions: tuple[Asked, ...]
    synthetic: bool = False
    n_compared: int = 0
    n_differing: int = 0

    @property
    def share(self) -> float:
        """Share of the steps that ask. The first token of a caption is none."""
        steps = [asked for caption in self.captions for asked in caption[1:]]
        return sum(steps) / len(steps)


def load_schedule(file: Path = FILE) -> Schedule:
    """The recorded schedule; a synthetic one where there is none."""
    if not file.exists():
        return synthetic_schedule()
    found = json.loads(file.read_text("utf-8"))
    captions = tuple(tuple(c == "1" for c in text) for text in found["captions"])
    return Schedule(captions, n_compared=found["n_compared"], n_differing=found["n_differing"])


def save_schedule(schedule: Schedule, about: dict[str, Any], file: Path = FILE) -> None:
    """Writes a schedule: a caption is a line of 0 and 1, a character for each token."""
    texts = ["".join(str(int(asked)) for asked in caption) for caption in schedule.captions]
    found = {
        "command": COMMAND,
        **about,
        "share": round(schedule.share, 4),
        "n_compared": schedule.n_compared,
        "n_differing": schedule.n_differing,
        "captions": texts,
    }
    file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def synthetic_schedule(n_captions: int = 24, n_tokens: int = 40) -> Schedule:
    """Steps that ask independently of each other, as often as recorded ones did."""
    asked = np.random.default_rng(0).random((n_captions, n_tokens)) < SYNTHETIC_SHARE
    return Schedule(tuple(tuple(map(bool, caption)) for caption in asked), synthetic=True)


def record_schedule(
    subject: Subject, guidance: Guidance, report: Callable[[], None], n: int = N_RECORDED
) -> Schedule:
    """Captions of n test scenes, told exactly and approximately. report: called after each."""
    captions, n_differing = [], 0
    exact = GuidedVLM(*subject.pair, strategy="exact")
    approximate = GuidedVLM(*subject.pair, strategy="approximate")
    for i in range(n):
        pixels = draw(make_scene("test", i // len(KINDS), KINDS[i % len(KINDS)]))
        told = dataclasses.replace(subject, pixels=pixels)
        watched = Watch(guidance.beta)
        first = _tell(exact, told, guidance, watched)
        second = _tell(approximate, told, guidance, Watch(guidance.beta))
        n_differing += [t.id for t in first.tokens] != [t.id for t in second.tokens]
        captions.append(tuple(watched.asked))
        report()
    return Schedule(tuple(captions[:N_STORED]), n_compared=n, n_differing=n_differing)


def _tell(vlm: GuidedVLM, subject: Subject, guidance: Guidance, watched: Watch) -> Reply:
    return vlm.generate(
        CAPTION_PROMPTS["plain"],
        [subject.pixels],
        guidance=guidance,
        max_tokens=MAX_TOKENS,
        logits_processors=[watched],
    )


class Watch:
    """A logits processor that changes nothing and notes if more than one token is plausible."""

    def __init__(self, beta: float) -> None:
        self._below = np.float32(math.log(beta)) if beta > 0 else np.float32(-np.inf)
        self.asked: list[bool] = []

    def __call__(self, tokens: IntArray, logits: FloatArray) -> FloatArray:
        n_plausible = int((logits >= logits.max() + self._below).sum())
        self.asked.append(n_plausible > 1)
        return logits
