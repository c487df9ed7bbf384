"""One answer of a `GuidedVLM`, piece by piece, and how it ends."""

from __future__ import annotations

import secrets
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from cmg_gguf.answer.generate import Generation
from cmg_gguf.answer.outbox import End, Outbox
from cmg_gguf.answer.scheduler import Scheduler
from cmg_gguf.answer.work import Admission, Encoding, Steps
from cmg_gguf.engine.contrast import ContrastSession
from cmg_gguf.engine.engine import AnySession
from cmg_gguf.engine.session import Session
from cmg_gguf.errors import BackendError, PromptError
from cmg_gguf.heat.maps import Heat
from cmg_gguf.llama.geometry import pictures_of
from cmg_gguf.llama.projector import PromptEncoding
from cmg_gguf.llama.prompts import tokenized
from cmg_gguf.llama.sampler import Sampler
from cmg_gguf.opening import Pair
from cmg_gguf.prompt.segments import Prompt
from cmg_gguf.reply import Piece, Reply, Seconds
from cmg_gguf.request import Request
from cmg_gguf.sampling import MAX_SEED

Phase = Literal["download", "load", "encode", "prefill"]
Progress = Callable[[Phase, int, int], None]
"""progress(phase, done, total): "download" in bytes, "load" in percent, "encode" in image
tokens, "prefill" in rows. Called by the thread that waits for the answer, while it waits; what it
raises ends the answer."""

ANSWER_SHARE = 0.5
"""Share of `max_tokens` for which there must be room where an answer begins beside others."""
MOST_COUNTED = 256
"""What counts as `max_tokens` there, where a request sets none or more: few answers get so far."""
HEAT_BYTES = 2**30
"""Memory that the heat of one answer may take."""


class Stream(Iterator[Piece]):
    """The pieces of an answer as they are generated; `reply` has the whole when they are done.

    The answer goes on whether it is read or not; pieces wait. close() ends it early, and so does
    dropping it: its KV cells are free before the next token, but for those that are kept for a
    prompt that begins alike.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._text = ""
        run.read_by(self)

    def __next__(self) -> Piece:
        piece = None
        if not self._run.cancelled:
            try:
                piece = self._run.next_piece()
            except BaseException:
                self.close()
                raise
        if piece is None:
            raise StopIteration
        if not piece.reasoning:
            self._text += piece.text
        return piece

    def whole(self) -> Reply:
        """The answer at once: its pieces are passed over."""
        return self._run.whole()

    def close(self) -> None:
        """Ends the answer here: its KV cells are free. Does nothing if it has ended."""
        self._run.cancel()
        self._run.settle()

    def ready(self) -> list[Piece] | None:
        """The pieces that are there, without waiting; None once there will be no more. For event
        loops, see `heard` of `GuidedVLM.stream`. Raises what ended the answer."""
        pieces = self._run.ready()
        self._text += "".join(p.text for p in pieces or () if not p.reasoning)
        return pieces

    def cancel(self) -> None:
        """Ends the answer before its next token, without waiting for that."""
        self._run.cancel()

    @property
    def text(self) -> str:
        """What has been read so far of the answer, without its reasoning."""
        return self._text

    @property
    def reply(self) -> Reply:
        """The finished answer. Raises BackendError while it is not finished."""
        if self._run.reply is None:
            raise BackendError("the answer is not finished; iterate to its end first")
        return self._run.reply

    @property
    def heat_shape(self) -> tuple[int, int, int]:
        """Of `Heat.weights`, at the most; zeros where no heat was asked for."""
        return self._run.heat_shape


@dataclass(frozen=True)
class _Told:
    """How far a phase is."""

    phase: Phase
    done: int
    total: int


class Run:
    """One answer in the making: see `cmg_gguf.answer.work.Work`. reply: None until it is
    finished."""

    def __init__(
        self,
        pair: Pair,
        scheduler: Scheduler,
        request: Request,
        progress: Progress | None = None,
        at_end: Callable[[], None] = lambda: None,
        heard: Callable[[bool], None] = lambda over: None,
    ) -> None:
        """at_end: called once nothing of it will come any more. heard: called where there is
        something to read; see `GuidedVLM.stream`.

        Raises what is wrong with the request: PromptError, ImageError, ContextLengthError,
        GuidanceError, SamplingError; ModelError if the model is closed.
        """
        self._is_cancelled = False
        self._reader: weakref.ref[object] | None = None
        self.alone = request.repeatable
        self.reply: Reply | None = None
        self.heat_shape = (0, 0, 0)
        self._pair, self._scheduler, self._request = pair, scheduler, request
        self._progress, self._at_end = progress, at_end
        seed = request.sampling.seed
        self._seed = secrets.randbelow(MAX_SEED) if seed is None else seed
        self._outbox: Outbox[Piece | _Told] = Outbox(scheduler.drive, heard)
        sampler = scheduler.while_open(self._prepared)
        self._generation = Generation(
            sampler,
            pair.model,
            request,
            self._outbox.put,
            scheduler.check,
            closing=self._prompt.closing,
            is_begun=self._prompt.is_begun,
        )
        self._seconds = Seconds()

    def whole(self) -> Reply:
        """The answer at once."""
        try:
            while self.next_piece() is not None:
                pass
        except BaseException:
            self.cancel()
            self.settle()
            raise
        if self.reply is None:
            raise BackendError("the answer was ended before it was finished")
        return self.reply

    def next_piece(self) -> Piece | None:
        """The next piece; waits for it. None behind the last. Raises what ended the answer."""
        while True:
            event = self._outbox.get()
            if isinstance(event, End):
                event.check()
                return None
            if isinstance(event, Piece):
                return event
            if self._progress is not None:
                self._progress(event.phase, event.done, event.total)

    def ready(self) -> list[Piece] | None:
        """The pieces that are there, without waiting; None behind the last. Raises what ended the
        answer. Where there are none, more will be heard of it."""
        pieces: list[Piece] = []
        while not pieces and (events := self._outbox.take()):
            for event in events:
                if isinstance(event, End):
                    event.check()
                    return None
                if isinstance(event, Piece):
                    pieces.append(event)
        return pieces

    def settle(self) -> None:
        """Waits until nothing of it will come any more, and passes over what does; not where it
        would wait for itself."""
        while not (self._scheduler.is_mine or isinstance(self._outbox.get(), End)):
            pass

    def read_by(self, reader: object) -> None:
        """Ends it, as `cancel` does, where `reader` is dropped: without a finalizer, in which a
        Ctrl-C would be lost."""
        self._reader = weakref.ref(reader)

    def cancel(self) -> None:
        """Nobody wants it any more: it ends before its next token. Never waits."""
        self._is_cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        return self._is_cancelled or (self._reader is not None and self._reader() is None)

    def admission(self) -> Admission:
        """Whether it may begin beside the answers under way."""
        engine, n_cells = self._pair.engine, self._n_cells()
        if self._contrasted is not None:
            return "go" if engine.fits(n_cells) else "full"
        if engine.decodes_pictures_of(self._prompt):
            return "soon"
        return "go" if engine.fits(n_cells, self._prompt, self._request.guidance) else "full"

    def steps(self) -> Steps:
        """The whole answer, or what is left of it where it was dropped to make room."""
        engine = self._pair.engine
        session: AnySession | None = None
        try:
            started = time.perf_counter()
            if self._contrasted is None:
                session = opened = self._opened()
                prompt = yield from self._encoded(self._prompt, opened.first_row)
            else:
                prompt = yield from self._encoded(self._prompt)
                contrasted = yield from self._encoded(self._contrasted)
                session = self._opened_contrast(prompt, contrasted)
            encoded = time.perf_counter()
            yield from self._prefilled(session, prompt)
            self._seconds = Seconds(encoded - started, time.perf_counter() - encoded)
            yield from self._generation.run(session)
            yield from self._generation.weigh(partial(engine.replaying, session))
            self.reply = self._finished(session)
        except Exception:
            if session is not None:
                engine.drop(session)
            raise
        finally:
            if session is not None:
                engine.end(session)

    def ended(self, error: BaseException | None) -> None:
        """Nothing of it will come any more: whatever fails, its readers are told."""
        with ExitStack() as last:
            last.callback(self._at_end)
            last.callback(self._outbox.end, error)
            self._generation.close()

    def _prepared(self) -> Sampler:
        """Reads what is asked; what draws its tokens."""
        pair, request, guidance = self._pair, self._request, self._request.guidance
        self._prompt, self._contrasted = _prompts(pair, request)
        if request.heat:
            self.heat_shape = _heat_shape(pair, request, self._prompt)
            self._pictures = pictures_of(pair.projector, self._prompt)
        strength = {"alpha": guidance.alpha, "beta": guidance.beta}
        return Sampler(pair.model, request.sampling, seed=self._seed, **strength)

    def _n_cells(self) -> int:
        """KV cells of the prompt, and of as much of the answer as there is or should fit."""
        engine, n_said = self._pair.engine, self._generation.n_said
        limit = min(self._request.max_tokens or MOST_COUNTED, MOST_COUNTED)
        n_tokens = n_said + max(1, round(ANSWER_SHARE * (limit - n_said)))
        if self._contrasted is None:
            return engine.cells(
                self._prompt, self._request.guidance, n_tokens, replays=self._replays
            )
        return engine.contrast_cells(self._prompt, self._contrasted, n_tokens)

    def _opened(self) -> Session:
        engine, guidance, n_cells = self._pair.engine, self._request.guidance, self._n_cells()
        session = engine.open(
            self._prompt, guidance, n_reserved=n_cells, alone=self.alone, replays=self._replays
        )
        if self._request.heat:
            session.record()
        return session

    @property
    def _replays(self) -> bool:
        return self._request.evidence_model is not None

    def _opened_contrast(self, original: Prompt, degraded: Prompt) -> ContrastSession:
        engine, n_cells = self._pair.engine, self._n_cells()
        return engine.open_contrast(original, degraded, n_reserved=n_cells, alone=self.alone)

    def _encoded(self, prompt: Prompt, first_row: int = 0) -> Generator[Any, Any, Prompt]:
        """The prompt with its images encoded, one at a time, from `first_row` on."""
        encoding = PromptEncoding(self._pair.projector, prompt, first_row)
        while not encoding.is_done:
            yield Encoding(encoding.encode_next)
            self._outbox.put(_Told("encode", encoding.done, encoding.total))
        return encoding.prompt

    def _prefilled(self, session: AnySession, prompt: Prompt) -> Steps:
        """Decodes the prompt, and tells how far that is."""
        done, total = 0, session.n_ahead
        decodes = self._pair.engine.prefilling(session, prompt)
        with closing(decodes):
            batch = next(decodes, None)
            while batch is not None:
                came = yield batch
                done += batch.n_rows
                self._outbox.put(_Told("prefill", done, total))
                try:
                    batch = decodes.send(came)
                except StopIteration:
                    return

    def _mended(self) -> tuple[str, ...]:
        mended_in = self._pair.projector.mended_in
        prompts = [prompt for prompt in (self._prompt, self._contrasted) if prompt is not None]
        return tuple(sorted(set[str]().union(*map(mended_in, prompts))))

    def _finished(self, session: AnySession) -> Reply:
        answer = self._generation.answer
        return Reply(
            text=answer.text,
            reasoning=answer.reasoning,
            n_reasoning_tokens=answer.n_reasoning_tokens,
            tokens=tuple(answer.tokens),
            finish_reason=answer.finish_reason,
            end=answer.end,
            n_prompt_tokens=self._prompt.n_tokens,
            n_image_tokens=self._prompt.n_image_tokens,
            n_reused_tokens=session.n_reused,
            guidance=self._request.guidance,
            layers=session.layers,
            seed=self._seed,
            seconds=replace(self._seconds, decode=answer.seconds),
            mended=self._mended(),
            words=answer.words,
            evidence=self._request.evidence_model,
            scores=tuple(answer.scores),
            heat=self._heat(session),
        )

    def _heat(self, session: AnySession) -> Heat | None:
        recording = session.recording
        if recording is None:
            return None
        weights = recording.weights()[: self._generation.n_said]
        layers = tuple(recording.layers.tolist())
        return Heat(weights, layers, session.layers, self._pictures)


def _prompts(pair: Pair, request: Request) -> tuple[Prompt, Prompt | None]:
    """Of the request, and of the degraded branch where it has one of its own; both fit."""
    tokens_of = partial(
        tokenized,
        raw=request.raw,
        salt=request.salt,
        variables=request.chat_template_kwargs,
        template=pair.template,
        projector=pair.projector,
        max_pixels=pair.max_pixels,
    )
    prompt, contrast = tokens_of(request.prompt, request.images), request.contrast
    if contrast is None:
        pair.engine.check(prompt, request.guidance, replays=request.evidence_model is not None)
        return prompt, None
    degraded = tokens_of(contrast.prompt, contrast.images)
    pair.engine.check_contrast(prompt, degraded)
    return prompt, degraded


def _heat_shape(pair: Pair, request: Request, prompt: Prompt) -> tuple[int, int, int]:
    """Of `Heat.weights` at the most. Raises PromptError where there is nothing to look at, or too
    much to keep."""
    context, n_images = pair.contexts[0], prompt.n_image_tokens
    if n_images == 0:
        raise PromptError("heat=True shows where an answer looks, and there is no image; give one")
    n_layers = len(context.attention_layers)
    n_tokens = context.n_ctx - prompt.n_tokens + 1
    n_tokens = min(request.max_tokens or n_tokens, n_tokens)
    most = HEAT_BYTES // (4 * n_layers * n_images)
    if n_tokens > most:
        raise PromptError(
            f"heat=True of {n_tokens} tokens, {n_layers} layers and {n_images} image tokens takes "
            f"more than {HEAT_BYTES // 2**20} MiB; set max_tokens to {most} or less"
        )
    return n_tokens, n_layers, n_images
