"""One answer of a `GuidedVLM`, piece by piece, and how it ends."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Literal

from cmg_gguf.answer.generate import Answer, Limits, Piece, Reply, Seconds, generate
from cmg_gguf.engine.contrast import ContrastEngine
from cmg_gguf.errors import BackendError
from cmg_gguf.guidance import Guidance
from cmg_gguf.llama.sampler import Sampler
from cmg_gguf.prompt.segments import Prompt
from cmg_gguf.sampling import MAX_SEED, Sampling

if TYPE_CHECKING:
    from cmg_gguf.vlm import GuidedVLM

Phase = Literal["load", "encode", "prefill"]
Progress = Callable[[Phase, int, int], None]
"""progress(phase, done, total): "load" in percent, "encode" in image tokens, "prefill" in rows."""


class Stream(Iterator[Piece]):
    """The pieces of an answer as they are generated; `reply` has the whole when they are done.

    close() ends it early; so does dropping it, or a new request. Its KV cells are free then, but
    for those that are kept for a prompt that begins alike.
    """

    def __init__(self, run: Run) -> None:
        self._lock = run.lock
        self._run = run
        # The generator holds the run and not this object: dropping this object ends it at once.
        self._pieces = self._run.pieces()

    def __next__(self) -> Piece:
        with self._lock:
            return next(self._pieces)

    def close(self) -> None:
        """Ends the answer here. Does nothing if it has ended."""
        with self._lock:
            self._pieces.close()

    @property
    def text(self) -> str:
        """What has been said so far."""
        return self._run.answer.text

    @property
    def reply(self) -> Reply:
        """The finished answer. Raises BackendError while it is not finished."""
        if self._run.reply is None:
            raise BackendError("the answer is not finished; iterate to its end first")
        return self._run.reply


class Run:
    """One answer in the making. `reply`: None until it is finished."""

    def __init__(
        self,
        vlm: GuidedVLM,
        prompt: Prompt,
        degraded: Prompt | None,
        guidance: Guidance,
        sampling: Sampling,
        limits: Limits,
        progress: Progress | None,
    ) -> None:
        self._vlm = vlm
        self.lock = vlm._lock
        self._prompt = prompt
        self._degraded = degraded
        self._guidance = guidance
        self._limits = limits
        self._progress = progress or (lambda phase, done, total: None)
        self._seed = secrets.randbelow(MAX_SEED) if sampling.seed is None else sampling.seed
        self._sampler = Sampler(
            vlm.model, sampling, alpha=guidance.alpha, beta=guidance.beta, seed=self._seed
        )
        self.answer = Answer()
        self.reply: Reply | None = None

    def pieces(self) -> Generator[Piece, None, None]:
        vlm = self._vlm
        contrast = ContrastEngine(vlm.engine) if self._degraded is not None else None
        engine = contrast or vlm.engine
        vlm._check_open()
        vlm._request += 1
        mine = vlm._request

        def check() -> None:
            vlm._check_open()
            if vlm._request != mine:
                raise BackendError("this answer was ended by a newer request to the same GuidedVLM")

        def report(phase: Phase, done: int, total: int) -> None:
            self._progress(phase, done, total)
            check()  # the callback can have closed the model or asked it something else

        try:
            started = time.perf_counter()
            vlm.engine.release()  # what an older answer leaves counts for what this one finds
            first_row = 0
            if contrast is None:
                if self._guidance.contrasts:
                    vlm._choice.settle()
                first_row = vlm.engine.first_decoded_row(self._prompt, self._guidance)
            encoding = functools.partial(report, "encode")
            prompt = vlm.projector.encode(self._prompt, encoding, first_row=first_row)
            if self._degraded is not None:
                degraded = vlm.projector.encode(self._degraded, encoding)
            encoded = time.perf_counter()
            prefilling = functools.partial(report, "prefill")
            if contrast is not None:
                contrast.prefill(prompt, degraded, prefilling)
            else:
                vlm.engine.prefill(prompt, self._guidance, prefilling)
            prefilled = time.perf_counter()
            layers, n_reused = vlm.engine.layers, vlm.engine.n_reused
            yield from generate(
                engine,
                self._sampler,
                vlm.model,
                self._guidance,
                self._limits,
                self.answer,
                check,
            )
            seconds = Seconds(encoded - started, prefilled - encoded, self.answer.seconds)
            self.reply = self._finished(prompt, n_reused, layers, seconds)
        finally:
            with self.lock:
                if vlm._request == mine:
                    vlm.engine.release()

    def _finished(
        self, prompt: Prompt, n_reused: int, layers: tuple[int, ...], seconds: Seconds
    ) -> Reply:
        return Reply(
            text=self.answer.text,
            tokens=tuple(self.answer.tokens),
            finish_reason=self.answer.finish_reason,
            n_prompt_tokens=prompt.n_tokens,
            n_image_tokens=prompt.n_image_tokens,
            n_reused_tokens=n_reused,
            guidance=self._guidance,
            layers=layers,
            seed=self._seed,
            seconds=seconds,
        )
