"""One answer of a `GuidedVLM`, piece by piece, and how it ends."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Literal

from cmg_gguf.answer.generate import Answer, generate
from cmg_gguf.answer.notifier import Notifier
from cmg_gguf.answer.turns import Turns
from cmg_gguf.arrays import IntArray
from cmg_gguf.engine.engine import AnySession
from cmg_gguf.engine.session import Session
from cmg_gguf.errors import BackendError
from cmg_gguf.llama.prompts import tokenized
from cmg_gguf.llama.sampler import Sampler
from cmg_gguf.opening import Pair
from cmg_gguf.prompt.segments import Prompt
from cmg_gguf.reply import Piece, Reply, Seconds
from cmg_gguf.request import Request
from cmg_gguf.sampling import MAX_SEED

Phase = Literal["load", "encode", "prefill"]
Progress = Callable[[Phase, int, int], None]
"""progress(phase, done, total): "load" in percent, "encode" in image tokens, "prefill" in rows.
Called from a thread of its own, so it may wait for others that use the model."""


class Stream(Iterator[Piece]):
    """The pieces of an answer as they are generated; `reply` has the whole when they are done.

    close() ends it early; so does dropping it, or a new request. Its KV cells are free then, but
    for those that are kept for a prompt that begins alike.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        # The generator holds the run and not this object: dropping this object ends it at once.
        self._pieces = run.pieces()

    def __next__(self) -> Piece:
        with self._run.turns:
            piece = next(self._pieces, None)
        self._run.notifier.settle()
        if piece is None:
            raise StopIteration
        return piece

    def close(self) -> None:
        """Ends the answer here. Does nothing if it has ended."""
        with self._run.turns:
            self._pieces.close()

    @property
    def text(self) -> str:
        """What has been said so far."""
        return self._run.answer.text

    def attended(self) -> tuple[IntArray, ...]:
        """The image tokens masked for the newest row of the degraded branch: (n,) int32 for each
        masked layer, ascending; () without guidance, before the first piece and behind the last."""
        return self._run.attended()

    @property
    def reply(self) -> Reply:
        """The finished answer. Raises BackendError while it is not finished."""
        if self._run.reply is None:
            raise BackendError("the answer is not finished; iterate to its end first")
        return self._run.reply


class Run:
    """One answer in the making. reply: None until it is finished."""

    def __init__(
        self,
        pair: Pair,
        turns: Turns,
        request: Request,
        progress: Progress | None,
    ) -> None:
        """Raises what is wrong with the request: PromptError, ImageError, ContextLengthError,
        GuidanceError, SamplingError."""
        sampling, guidance = request.sampling, request.guidance
        self.turns, self.notifier = turns, Notifier(progress)
        self._pair, self._request = pair, request
        self._seed = secrets.randbelow(MAX_SEED) if sampling.seed is None else sampling.seed
        with turns:
            turns.check()
            self._prompt, self._contrasted = _prompts(pair, request)
            self._sampler = Sampler(
                pair.model, sampling, alpha=guidance.alpha, beta=guidance.beta, seed=self._seed
            )
        self._session: AnySession | None = None
        self.answer = Answer()
        self.reply: Reply | None = None

    def whole(self) -> Reply:
        """The answer at once, in one turn."""
        with self.turns, closing(self.pieces()) as pieces:
            for _ in pieces:
                pass
        self.notifier.settle()
        assert self.reply is not None
        return self.reply

    def pieces(self) -> Generator[Piece, None, None]:
        """The answer; whoever asks for a piece has the turn."""
        self.turns.check()
        number, engine = self.turns.begin(), self._pair.engine

        def check() -> None:
            self.turns.check(number)
            self.notifier.rethrow()

        try:
            started = time.perf_counter()
            session, prompt = self._opened(check)
            encoded = time.perf_counter()
            engine.prefill(session, prompt, self._telling("prefill", check))
            prefilled = time.perf_counter()
            self._session = session
            model = self._pair.model
            yield from generate(
                engine, session, self._sampler, model, self._request, self.answer, check
            )
            seconds = Seconds(encoded - started, prefilled - encoded, self.answer.seconds)
            self.reply = self._finished(session, seconds)
        finally:
            self._session = None
            self.notifier.stop()
            with self.turns.if_free() as free:
                if free and self.turns.is_newest(number):
                    engine.end()

    def attended(self) -> tuple[IntArray, ...]:
        """See `Stream.attended`."""
        return self._session.attended() if isinstance(self._session, Session) else ()

    def _opened(self, check: Callable[[], None]) -> tuple[AnySession, Prompt]:
        """The session, and its prompt with all images encoded that are not there already."""
        engine, projector = self._pair.engine, self._pair.projector
        telling = self._telling("encode", check)
        if self._contrasted is not None:
            engine.end()  # what an older answer leaves is of no use to this one
            prompt = projector.encode(self._prompt, telling)
            contrasted = projector.encode(self._contrasted, telling)
            return engine.open_contrast(prompt, contrasted), prompt
        session = engine.open(self._prompt, self._request.guidance)
        return session, projector.encode(self._prompt, telling, first_row=session.first_row)

    def _telling(self, phase: Phase, check: Callable[[], None]) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            check()  # somebody may have closed the model
            self.notifier(phase, done, total)

        return tell

    def _finished(self, session: AnySession, seconds: Seconds) -> Reply:
        return Reply(
            text=self.answer.text,
            tokens=tuple(self.answer.tokens),
            finish_reason=self.answer.finish_reason,
            n_prompt_tokens=self._prompt.n_tokens,
            n_image_tokens=self._prompt.n_image_tokens,
            n_reused_tokens=session.n_reused,
            guidance=self._request.guidance,
            layers=session.layers,
            seed=self._seed,
            seconds=seconds,
        )


def _prompts(pair: Pair, request: Request) -> tuple[Prompt, Prompt | None]:
    """Of the request, and of the degraded branch where it has one of its own; both fit."""
    tokens_of = partial(
        tokenized, raw=request.raw, template=pair.template, projector=pair.projector
    )
    prompt, contrast = tokens_of(request.prompt, request.images), request.contrast
    if contrast is None:
        pair.engine.check(prompt, request.guidance)
        return prompt, None
    degraded = tokens_of(contrast.prompt, contrast.images)
    pair.engine.check_contrast(prompt, degraded)
    return prompt, degraded
