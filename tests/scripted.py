"""Answers without a model: an engine that has logits and room, and a sampler that has a script.

run = told("yes", "<", "/s>", stop=["</s>"])
assert run.answer.text == "yes"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from cmg_gguf.answer.generate import Generation
from cmg_gguf.arrays import FloatArray
from cmg_gguf.guidance import Guidance
from cmg_gguf.reply import Piece
from cmg_gguf.request import Request

N_VOCAB = 40
END = N_VOCAB - 1


class FakeEngine:
    """A session with logits that tell the steps apart, and room for a number of steps."""

    def __init__(self, *, room: int = 1000, guided: bool = True) -> None:
        self.room, self.guided = room, guided
        self.steps: list[int] = []
        self._compute()

    @property
    def has_room(self) -> bool:
        return len(self.steps) < self.room

    def step(self, token: int) -> Iterator[None]:
        assert self.has_room, "stepped without room"
        yield
        self.steps.append(token)
        self._compute()

    is_blind = False

    def catch_up(self) -> Iterator[None]:
        yield

    @property
    def original_logits(self) -> FloatArray:
        return self.l_o

    @property
    def degraded_logits(self) -> FloatArray | None:
        return self.l_d

    def _compute(self) -> None:
        random_rows = np.random.default_rng(len(self.steps)).standard_normal((2, N_VOCAB)) * 3
        original, degraded = random_rows.astype(np.float32)
        self.l_o: FloatArray = original
        self.l_d: FloatArray | None = degraded if self.guided else None


class Script:
    """Draws what is written down, and END after that. Keeps what it was given."""

    def __init__(self, draws: Sequence[int | tuple[int, int]]) -> None:
        self._draws = [d if isinstance(d, tuple) else (d, d) for d in draws]
        self.given: list[tuple[FloatArray, FloatArray, FloatArray | None]] = []
        self.rows: list[FloatArray] = []
        self.accepted: list[int] = []
        self.alphas: list[float] = []
        self.alpha = 1.0

    def prepare(self, logits: FloatArray) -> bool:
        self._logits = logits
        return True

    def draw(self, original: FloatArray, degraded: FloatArray | None) -> tuple[int, int]:
        self.given.append((self._logits, original, degraded))
        self.alphas.append(self.alpha)
        self.rows.append(self._logits.copy())
        i = len(self.rows) - 1
        return self._draws[i] if i < len(self._draws) else (END, END)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@dataclass
class Words:
    """A vocabulary: token i is words[i]."""

    words: Sequence[bytes]

    def token_bytes(self, token: int) -> bytes:
        return self.words[token] if token < len(self.words) else b"?"

    def is_end(self, token: int) -> bool:
        return token == END


@dataclass
class Run:
    """One answer of the fakes."""

    words: Sequence[bytes]
    draws: Sequence[int | tuple[int, int]] | None = None
    request: Request = field(default_factory=lambda: asking())
    engine: FakeEngine = field(default_factory=FakeEngine)
    check: Callable[[], None] = lambda: None
    closing: str = ""
    is_begun: bool = False

    def __post_init__(self) -> None:
        self.script = Script(self.draws if self.draws is not None else range(len(self.words)))
        self.pieces: list[Piece] = []
        self._told: list[Piece] = []
        self.generation = Generation(
            self.script,
            Words(self.words),
            self.request,
            self._told.append,
            self.check,
            closing=self.closing,
            is_begun=self.is_begun,
        )
        self.answer = self.generation.answer
        self.generator = self._run()

    def _run(self) -> Iterator[Piece]:
        with closing(self.generation.run(cast(Any, self.engine))) as steps:
            for _ in steps:
                yield from self._taken()
        yield from self._taken()

    def _taken(self) -> list[Piece]:
        told = self._told.copy()
        self._told.clear()
        return told

    def finish(self) -> Run:
        self.pieces.extend(self.generator)
        return self

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.answer.tokens]


def asking(**settings: Any) -> Request:
    """A request with a guidance whose formula is easily followed."""
    return Request("", **{"guidance": Guidance(alpha=1.0, beta=0.1), **settings})


def told(*words: str | bytes, **settings: Any) -> Run:
    """The finished answer that says these tokens."""
    data = [word.encode() if isinstance(word, str) else word for word in words]
    names = ("draws", "engine", "check", "closing", "is_begun")
    given = {name: settings.pop(name) for name in names if name in settings}
    return Run(data, request=asking(**settings), **given).finish()
