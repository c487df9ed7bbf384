"""From steps to text: one answer, token by token, with its stop strings, timing and account.

    generation = Generation(drawer, vocabulary, request, emit)
    yield from generation.run(session)     # yields the batches that it wants decoded

Knows a vocabulary and a sampler; knows nothing of chats or of how the prompt came about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np

from cmg_gguf.answer.logits import combine, gated, log_softmax
from cmg_gguf.answer.reasoning import Reasoning
from cmg_gguf.answer.text import StopStrings, Utf8Stream
from cmg_gguf.answer.weighing import Weighing
from cmg_gguf.answer.words import words_of
from cmg_gguf.arrays import FloatArray
from cmg_gguf.errors import SamplingError
from cmg_gguf.reply import FinishReason, Piece, Token, Word
from cmg_gguf.request import Request
from cmg_gguf.sampling import LogitsProcessor

Decodes: TypeAlias = Generator[Any, Any, None]
"""Yields what it wants decoded, and is sent what came of it: see `cmg_gguf.engine.batch`."""
Take: TypeAlias = Callable[[FloatArray], None]


class Vocabulary(Protocol):
    """What text needs of a model."""

    def token_bytes(self, token: int) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


class Session(Protocol):
    """What an answer needs of its two branches: see `cmg_gguf.engine.session.Session`."""

    l_o: FloatArray
    l_d: FloatArray | None

    @property
    def is_blind(self) -> bool: ...
    @property
    def has_room(self) -> bool: ...
    def step(self, token: int) -> Decodes: ...
    def catch_up(self) -> Decodes: ...


class Drawer(Protocol):
    """What drawing tokens needs: see `cmg_gguf.llama.sampler.Sampler`."""

    alpha: float

    def prepare(self, logits: FloatArray) -> bool: ...
    def draw(self, original: FloatArray, degraded: FloatArray | None) -> tuple[int, int]: ...
    def accept(self, token: int) -> None: ...


@dataclass
class Answer:
    """What a generation has produced so far."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    end: Token | None = None
    n_reasoning_tokens: int = 0
    finish_reason: FinishReason = "length"
    seconds: float = 0.0
    words: tuple[Word, ...] = ()
    scores: list[FloatArray] = field(default_factory=list)


class Generation:
    """An answer in the making. answer: what there is of it."""

    def __init__(
        self,
        drawer: Drawer,
        vocabulary: Vocabulary,
        request: Request,
        emit: Callable[[Piece], None],
        check: Callable[[], None] = lambda: None,
        *,
        closing: str = "",
        is_begun: bool = False,
    ) -> None:
        """emit: called with each piece of text. check: called behind code of the caller's, which
        can have closed the model; raises to stop. closing: the mark that closes the reasoning
        within which the prompt ends; "" = it ends outside. is_begun: the prompt ends with the
        answer's beginning: spaces behind that are the answer's."""
        self.answer = Answer()
        self._drawer, self._vocabulary, self._request = drawer, vocabulary, request
        self._emit, self._check = emit, check
        self._characters, self._stops = Utf8Stream(), StopStrings(request.stop)
        self._reasoning = Reasoning(closing, request.sampling, is_begun=is_begun)
        self._is_begun = is_begun
        self._pending: list[Token] = []
        self._ids: list[int] = []
        self._started: float | None = None
        self._is_done = False
        self._n_passed = 0  # characters in front of the first stop string
        model = request.evidence_model
        self._weighing = None if model is None else Weighing(model)

    @property
    def n_said(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def run(self, session: Session) -> Decodes:
        """The answer to what the session was prefilled with, or the rest of it: a session that was
        dropped on the way is no loss, another takes the tokens that were said."""
        self._started = self._started or time.perf_counter()
        for said in tuple(self._ids):
            yield from session.step(said)
        if self._is_done:
            return
        limit, stopped = self._request.max_tokens, False
        while limit is None or self.n_said < limit:
            token = yield from self._drawn(session)
            if self._vocabulary.is_end(token.id):
                self.answer.end = token
                self.answer.finish_reason = "stop"
                break
            if self._weighing is not None:
                token = self._weighed(token, session, self._weighing)
            stopped = self._said(token)
            if stopped or self.n_said == limit or not session.has_room:
                break
            yield from session.step(token.id)
        self._finish(stopped=stopped)

    def weigh(self, replaying: Callable[[list[int], Take], Decodes]) -> Decodes:
        """Evidence of an answer that is done, where it was asked for; then its words.

        replaying(tokens, take): reads the answer blind, see `Engine.replaying`.
        """
        answer, weighing = self.answer, self._weighing
        if weighing is not None and len(weighing.found) < self.n_said:
            weighing.restart()
            yield from replaying(self._ids, weighing.weigh)
            answer.tokens = [
                replace(token, evidence=found)
                for token, found in zip(answer.tokens, weighing.found, strict=True)
            ]
            self._note_time()
        said = [self._vocabulary.token_bytes(token) for token in self._ids]
        found = () if weighing is None else weighing.found
        answer.words = words_of(said, answer.text, stop=self._n_passed, evidence=found)

    def close(self) -> None:
        """Frees what was kept for the evidence."""
        if self._weighing is not None:
            self._weighing.close()

    def _said(self, token: Token) -> bool:
        """Takes a token into the answer; whether that met a stop string."""
        self._drawer.accept(token.id)
        self._ids.append(token.id)
        self.answer.tokens.append(token)
        self._pending.append(token)
        data = self._vocabulary.token_bytes(token.id)
        was_within = self._reasoning.is_within
        text, stopped = self._stops.feed(self._characters.feed(data))
        self._n_passed += len(text)
        parts = self._reasoning.feed(text)
        if was_within or self._reasoning.is_within or any(thought for _, thought in parts):
            self.answer.n_reasoning_tokens = self.n_said
        self._note_time()
        self._show(parts)
        if stopped:
            self.answer.finish_reason = "stop"
        return stopped

    def _finish(self, *, stopped: bool) -> None:
        if not stopped:
            text, stopped = self._stops.feed(self._characters.flush())
            if stopped:
                self.answer.finish_reason = "stop"
            text += "" if stopped else self._stops.flush()
            self._n_passed += len(text)
            self._show(self._reasoning.feed(text))
        self._show(self._reasoning.flush())
        self._is_done = True
        self._note_time()
        if self._pending:
            self._emit(Piece("", tuple(self._pending), self._reasoning.is_within))

    def _show(self, parts: Sequence[tuple[str, bool]]) -> None:
        for text, is_reasoning in parts:
            if is_reasoning:
                self.answer.reasoning += text
            else:
                if not (self.answer.text or self._is_begun):
                    text = text.lstrip(" ")  # SentencePiece words carry the space in front of them
                self.answer.text += text
            if text:
                self._emit(Piece(text, tuple(self._pending), is_reasoning))
                self._pending.clear()

    def _note_time(self) -> None:
        assert self._started is not None
        self.answer.seconds = time.perf_counter() - self._started

    def _drawn(self, session: Session) -> Generator[Any, Any, Token]:
        """Draws the token behind those that were said."""
        request, drawer, n = self._request, self._drawer, self.n_said
        alpha = request.guidance.alpha
        if request.strength is not None:
            alpha = request.strength(n)
            self._check()
        logits = original = session.l_o
        if request.logits_processors:
            logits = _processed(original, self._ids, request.logits_processors)
            self._check()
        is_scored = n < request.n_scores
        matters = drawer.prepare(logits)
        is_weighed = self._weighing is not None and session.is_blind
        if matters or is_scored or is_weighed or request.top_logprobs is not None:
            yield from session.catch_up()
            alpha = gated(alpha, request.guidance.gate, original, session.l_d)
        drawer.alpha = alpha
        token, plain = drawer.draw(original, session.l_d if matters else None)
        if is_scored:
            self.answer.scores.append(self._score(session, logits))
        text = self._vocabulary.token_bytes(token).decode("utf-8", "replace")
        if request.top_logprobs is None:
            return Token(token, text, plain)
        logprobs = self._logprobs(session)
        best = np.argsort(-logprobs, kind="stable")[: request.top_logprobs]
        top = tuple((int(t), float(logprobs[t])) for t in best if np.isfinite(logprobs[t]))
        return Token(token, text, plain, float(logprobs[token]), top)

    def _weighed(self, token: Token, session: Session, weighing: Weighing) -> Token:
        """With its evidence, where guidance hides just what that is measured by."""
        weighing.note(token.id, session.l_o)
        if not session.is_blind or session.l_d is None:
            return token
        weighing.weigh(session.l_d)
        return replace(token, evidence=weighing.found[-1])

    def _score(self, session: Session, logits: FloatArray) -> FloatArray:
        """What guidance makes of `logits`: l_o, or l_o changed by processors."""
        score: FloatArray = logits.copy()
        if session.l_d is not None:
            score += np.float32(self._drawer.alpha) * (session.l_o - session.l_d)
        return score

    def _logprobs(self, session: Session) -> FloatArray:
        beta = self._request.guidance.beta
        alpha = self._drawer.alpha
        return log_softmax(combine(session.l_o, session.l_d, alpha=alpha, beta=beta))


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
