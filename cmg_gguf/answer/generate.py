"""From steps to text: one answer, token by token, with its stop strings, timing and account.

Knows a vocabulary and a sampler; knows nothing of chats or of how the prompt came about.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from cmg_gguf.answer.logits import combine, log_softmax
from cmg_gguf.answer.text import StopStrings, Utf8Stream
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.errors import SamplingError
from cmg_gguf.guidance import Guidance
from cmg_gguf.sampling import LogitsProcessor

FinishReason = Literal["stop", "length"]


class Vocabulary(Protocol):
    """What text needs of a model."""

    def token_bytes(self, token: int) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


Watch = Callable[[IntArray, Callable[[], FloatArray]], None]
"""(tokens so far (n,) int32, score). score() computes (n_vocab,) float32: the logits under guidance
before the plausibility cut and all samplers; only for as long as the call lasts."""


class Engine(Protocol):
    """What an answer needs of its two branches: see `cmg_gguf.engine.engine.PairedEngine`."""

    @property
    def has_room(self) -> bool: ...
    @property
    def original_address(self) -> int: ...
    @property
    def degraded_address(self) -> int: ...
    @property
    def original_logits(self) -> FloatArray: ...
    @property
    def degraded_logits(self) -> FloatArray | None: ...
    def step(self, token: int) -> None: ...


class Drawer(Protocol):
    """What drawing tokens needs: see `cmg_gguf.llama.sampler.Sampler`."""

    alpha: float

    def sample(
        self, logits: int, original: int, degraded: Callable[[], int]
    ) -> tuple[int, int]: ...
    def accept(self, token: int) -> None: ...


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    id: its number. text: its own text; a part of a character shows as U+FFFD. plain: the token that
    plain decoding would have drawn here, from the same logits with the same settings and seed.
    logprob: log-probability in the guided distribution before other samplers, where asked for.
    top: the likeliest tokens of that distribution with their log-probabilities, best first.
    """

    id: int
    text: str
    plain: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()

    @property
    def changed(self) -> bool:
        """Whether guidance changed this token."""
        return self.id != self.plain


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds of an answer's phases: image encoding, prompt, tokens.

    Rows of the prompt that wait for a token to need them (`cmg_gguf.engine.lazy`) count as its.
    """

    encode: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Reply:
    """An answer and its account.

    text: without the stop string, and without spaces in front. tokens: all that were generated,
    without the end token.
    finish_reason: "stop" (end token or stop string), "length" (max_tokens, or the context is full).
    layers: those that are masked in the degraded branch; () without guidance. n_reused_tokens:
    prompt tokens whose KV cells were there from an earlier prompt that began alike.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    n_prompt_tokens: int
    n_image_tokens: int
    guidance: Guidance
    layers: tuple[int, ...]
    seed: int
    seconds: Seconds
    n_reused_tokens: int = 0

    @property
    def n_changed(self) -> int:
        """How many tokens guidance changed."""
        return sum(token.changed for token in self.tokens)


@dataclass(frozen=True)
class Piece:
    """Some text of an answer as it streams, and the tokens drawn since the last piece."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When an answer ends, and what is recorded on the way.

    max_tokens: at most this many; None = until the context is full. stop: strings that end the
    answer. top_logprobs: None = no log-probabilities, else how many alternatives per token.
    processors: change the logits that are drawn from, before everything else in the chain.
    strength: alpha of the draw behind n tokens, by n; None = `Guidance.alpha` for all. watch: is
    called before every draw, see `Watch`.

    Raises SamplingError for a stop string or a number of alternatives that cannot be.
    """

    max_tokens: int | None = None
    stop: Sequence[str] = ()
    top_logprobs: int | None = None
    processors: Sequence[LogitsProcessor] = ()
    strength: Callable[[int], float] | None = None
    watch: Watch | None = None

    def __post_init__(self) -> None:
        StopStrings(self.stop)
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise SamplingError(f"top_logprobs={self.top_logprobs} is out of range: 0 and up")


@dataclass
class Answer:
    """What `generate` has produced so far."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "length"
    seconds: float = 0.0


def generate(
    engine: Engine,
    drawer: Drawer,
    vocabulary: Vocabulary,
    guidance: Guidance,
    limits: Limits,
    answer: Answer,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Piece]:
    """Yields the answer to what the engine was prefilled with; fills `answer` on the way.

    check: called before every use of the engine; raises to stop.
    """
    started = time.perf_counter()
    characters, stops = Utf8Stream(), StopStrings(limits.stop)
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

    stopped = False
    while limits.max_tokens is None or len(ids) < limits.max_tokens:
        check()
        token = _draw(engine, drawer, vocabulary, guidance, limits, ids, check)
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
        if len(ids) == limits.max_tokens or not engine.has_room:
            break
        engine.step(token.id)
    if not stopped:
        text, stopped = stops.feed(characters.flush())
        if stopped:
            answer.finish_reason = "stop"
        yield from emit(text + ("" if stopped else stops.flush()))
    answer.seconds = time.perf_counter() - started
    if pending:
        yield Piece("", tuple(pending))


def _draw(
    engine: Engine,
    drawer: Drawer,
    vocabulary: Vocabulary,
    guidance: Guidance,
    limits: Limits,
    ids: list[int],
    check: Callable[[], None],
) -> Token:
    if limits.strength is not None:
        drawer.alpha = limits.strength(len(ids))
    original = drawn_from = engine.original_address
    if limits.processors:
        processed = _processed(engine.original_logits, ids, limits.processors)
        check()  # a processor is the caller's code and can have used or closed the engine
        drawn_from = processed.ctypes.data
    if limits.watch is not None:
        base = processed if limits.processors else engine.original_logits
        score = functools.partial(_score, engine, base, drawer.alpha)
        limits.watch(np.array(ids, np.int32), score)
        check()
    token, plain = drawer.sample(drawn_from, original, lambda: engine.degraded_address)
    text = vocabulary.token_bytes(token).decode("utf-8", "replace")
    if limits.top_logprobs is None:
        return Token(token, text, plain)
    logprobs = log_softmax(
        combine(
            engine.original_logits,
            engine.degraded_logits,
            alpha=drawer.alpha,
            beta=guidance.beta,
        )
    )
    best = np.argsort(-logprobs, kind="stable")[: limits.top_logprobs]
    top = tuple((int(t), float(logprobs[t])) for t in best if np.isfinite(logprobs[t]))
    return Token(token, text, plain, float(logprobs[token]), top)


def _score(engine: Engine, logits: FloatArray, alpha: float) -> FloatArray:
    """What guidance makes of `logits`: l_o, or l_o changed by processors."""
    score: FloatArray = logits.copy()
    if (degraded := engine.degraded_logits) is not None:
        score += np.float32(alpha) * (engine.original_logits - degraded)
    return score


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
