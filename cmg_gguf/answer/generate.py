"""From steps to text: one answer, token by token, with its stop strings, timing and account.

Knows a vocabulary and a sampler; knows nothing of chats or of how the prompt came about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from cmg_gguf.answer.logits import combine, log_softmax
from cmg_gguf.answer.text import StopStrings, Utf8Stream
from cmg_gguf.arrays import FloatArray
from cmg_gguf.errors import SamplingError
from cmg_gguf.reply import FinishReason, Piece, Token
from cmg_gguf.request import Request
from cmg_gguf.sampling import LogitsProcessor


class Vocabulary(Protocol):
    """What text needs of a model."""

    def token_bytes(self, token: int) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


class Session(Protocol):
    """What an answer needs of its two branches: see `cmg_gguf.engine.session.Session`."""

    @property
    def l_o(self) -> FloatArray: ...
    @property
    def has_room(self) -> bool: ...


class Engine(Protocol):
    """What decodes for a session: see `cmg_gguf.engine.engine.Engine`."""

    def degraded(self, session: Any) -> FloatArray | None: ...
    def step(self, session: Any, token: int) -> None: ...


class Drawer(Protocol):
    """What drawing tokens needs: see `cmg_gguf.llama.sampler.Sampler`."""

    alpha: float

    def sample(
        self,
        logits: FloatArray,
        original: FloatArray,
        degraded: Callable[[], FloatArray | None],
    ) -> tuple[int, int]: ...
    def accept(self, token: int) -> None: ...


@dataclass
class Answer:
    """What `generate` has produced so far."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "length"
    seconds: float = 0.0


def generate(
    engine: Engine,
    session: Session,
    drawer: Drawer,
    vocabulary: Vocabulary,
    request: Request,
    answer: Answer,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Piece]:
    """Yields the answer to what the session was prefilled with; fills `answer` on the way.

    check: called before every use of the engine; raises to stop.
    """
    started = time.perf_counter()
    characters, stops = Utf8Stream(), StopStrings(request.stop)
    pending: list[Token] = []
    ids: list[int] = []

    def emit(text: str) -> Iterator[Piece]:
        if not answer.text:
            text = text.lstrip(" ")  # SentencePiece words carry the space in front of them
        if text:
            answer.text += text
            piece = Piece(text, tuple(pending))
            pending.clear()
            yield piece

    draw = Draw(engine, session, drawer, vocabulary, request, check)
    stopped = False
    while request.max_tokens is None or len(ids) < request.max_tokens:
        check()
        token = draw(ids)
        if vocabulary.is_end(token.id):
            answer.finish_reason = "stop"
            break
        drawer.accept(token.id)
        ids.append(token.id)
        answer.tokens.append(token)
        pending.append(token)
        text, stopped = stops.feed(characters.feed(vocabulary.token_bytes(token.id)))
        answer.seconds = time.perf_counter() - started
        yield from emit(text)
        if stopped:
            answer.finish_reason = "stop"
            break
        check()
        if len(ids) == request.max_tokens or not session.has_room:
            break
        engine.step(session, token.id)
    if not stopped:
        text, stopped = stops.feed(characters.flush())
        if stopped:
            answer.finish_reason = "stop"
        yield from emit(text + ("" if stopped else stops.flush()))
    answer.seconds = time.perf_counter() - started
    if pending:
        yield Piece("", tuple(pending))


@dataclass(frozen=True, eq=False)
class Draw:
    """Draws one token from the newest row of a session."""

    engine: Engine
    session: Session
    drawer: Drawer
    vocabulary: Vocabulary
    request: Request
    check: Callable[[], None]

    def __call__(self, ids: list[int]) -> Token:
        """The token behind these, as it is told; `check` is called after code of the caller's."""
        request, drawer = self.request, self.drawer
        if request.strength is not None:
            drawer.alpha = request.strength(len(ids))
        logits = original = self.session.l_o
        if request.logits_processors:
            logits = _processed(original, ids, request.logits_processors)
            self.check()  # a processor can have used or closed the engine
        if request.watch is not None:
            request.watch(np.array(ids, np.int32), lambda: self._score(logits))
            self.check()
        token, plain = drawer.sample(logits, original, self._degraded)
        text = self.vocabulary.token_bytes(token).decode("utf-8", "replace")
        if request.top_logprobs is None:
            return Token(token, text, plain)
        logprobs = self._logprobs()
        best = np.argsort(-logprobs, kind="stable")[: request.top_logprobs]
        top = tuple((int(t), float(logprobs[t])) for t in best if np.isfinite(logprobs[t]))
        return Token(token, text, plain, float(logprobs[token]), top)

    def _degraded(self) -> FloatArray | None:
        return self.engine.degraded(self.session)

    def _score(self, logits: FloatArray) -> FloatArray:
        """What guidance makes of `logits`: l_o, or l_o changed by processors."""
        score: FloatArray = logits.copy()
        if (degraded := self._degraded()) is not None:
            score += np.float32(self.drawer.alpha) * (self.session.l_o - degraded)
        return score

    def _logprobs(self) -> FloatArray:
        beta = self.request.guidance.beta
        alpha, degraded = self.drawer.alpha, self._degraded()
        return log_softmax(combine(self.session.l_o, degraded, alpha=alpha, beta=beta))


def _processed(
    logits: FloatArray, ids: list[int], processors: Sequence[LogitsProcessor]
) -> FloatArray:
    tokens = np.array(ids, np.int32)
    changed: FloatArray = logits.copy()
    for process in processors:
        changed = np.ascontiguousarray(process(tokens, changed), np.float32)
        if changed.shape != logits.shape:
            raise SamplingError(
                f"a logits processor returned shape {changed.shape}; it must keep {logits.shape}"
            )
    return changed
