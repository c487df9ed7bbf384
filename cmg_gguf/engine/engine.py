"""What decodes for sessions: contexts, kept prefixes, and the rules of the KV cache. Tokens only.

    session = engine.open(prompt, guidance)   # nothing is decoded yet
    engine.prefill(session, prompt)           # images encoded from session.first_row on
    while session.has_room:
        token = pick(session.l_o, engine.degraded(session))
        engine.step(session, token)
    engine.end(session)                       # its prompt stays for one that begins alike

One session at a time: opening another ends the one before. An engine knows no text, no chat format,
no sampling, and nothing about sequence ids but what it is given.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import closing
from typing import TypeAlias

import numpy as np

from cmg_gguf import _core
from cmg_gguf.arrays import FloatArray
from cmg_gguf.engine.batch import Batch, Decoded, Decodes, ImageBatch
from cmg_gguf.engine.context import Branches, Context
from cmg_gguf.engine.contrast import ContrastSession, cells_of_both
from cmg_gguf.engine.fork import Forking, is_surveyed, survey
from cmg_gguf.engine.prefix_cache import PrefixCache
from cmg_gguf.engine.rows import PromptRows
from cmg_gguf.engine.session import Session, cells_of
from cmg_gguf.engine.steps import AUTO, Pace, Strategy
from cmg_gguf.errors import BackendError, ContextLengthError, PromptError, UnsupportedError
from cmg_gguf.guidance import Guidance
from cmg_gguf.prompt.segments import ImageSegment, Prompt

Progress: TypeAlias = Callable[[int, int], None]
AnySession: TypeAlias = Session | ContrastSession


class Engine:
    """Decodes for one session at a time, in two branches.

    branches: where they live. selections: the store that the contexts' graph patches share.
    prefixes: what is kept from one prompt to the next; None = nothing. strategy: which ways of
    decoding a step may take. pace: how it chooses between them.
    """

    def __init__(
        self,
        branches: Branches,
        selections: _core.Selections,
        prefixes: PrefixCache | None = None,
        *,
        strategy: Strategy = AUTO,
        pace: Pace | None = None,
    ) -> None:
        self.branches = branches
        self.selections = selections
        self.prefixes = prefixes or PrefixCache(branches)
        self.strategy = strategy
        self.session: AnySession | None = None
        self._context = branches.original.context
        self._pace = pace or Pace()
        self.reset()

    def check(self, prompt: Prompt, guidance: Guidance) -> None:
        """Raises what `open` would raise about its arguments: PromptError, ContextLengthError,
        GuidanceError, UnsupportedError. Computes nothing."""
        _check_prompt(prompt, self._context)
        rows, paired = self._rows_of(prompt, guidance), self.branches.paired
        needed = cells_of(rows, paired=paired) + (2 if rows.guided and paired else 1)
        n_tokens, n_images = prompt.n_tokens, prompt.n_image_tokens
        self._check_cells(needed, "prompt needs", f"{n_tokens} tokens, {n_images} of them image")

    def check_contrast(self, original: Prompt, degraded: Prompt) -> None:
        """Raises what `open_contrast` would raise about its arguments."""
        for prompt in (original, degraded):
            _check_prompt(prompt, self._context)
        n = original.n_tokens, degraded.n_tokens
        needed = cells_of_both(*n, self.branches) + (2 if self.branches.paired else 1)
        self._check_cells(needed, "two prompts need", f"{n[0]} and {n[1]}")

    def open(self, prompt: Prompt, guidance: Guidance) -> Session:
        """An answer to this prompt; the session before is ended.

        The images need not be encoded: `Session.first_row` says from where on they must be for
        `prefill`. Raises what `check` raises; BackendError.
        """
        self.check(prompt, guidance)
        self.end()
        try:
            self.session = self._new_session(prompt, guidance)
            needed = cells_of(self.session.rows, paired=self.branches.paired)
            self.prefixes.make_room(needed + self.session.cells_a_step, self.session.lease)
        except BaseException:
            self.reset()
            raise
        return self.session

    def open_contrast(self, original: Prompt, degraded: Prompt) -> ContrastSession:
        """An answer behind two prompts, their images encoded; the session before is ended."""
        self.check_contrast(original, degraded)
        self.end()
        self.session = ContrastSession(self.branches, original, degraded)
        self.prefixes.make_room(original.n_tokens + degraded.n_tokens + 2)
        return self.session

    def prefill(
        self, session: AnySession, prompt: Prompt | None = None, progress: Progress | None = None
    ) -> None:
        """Decodes the prompt of a session that was just opened; its l_o is then there.

        prompt: the same with its images encoded, if they were not. progress(done, total) counts
        rows. Raises BackendError; the engine is empty then.
        """
        self._check_current(session)
        if prompt is not None and isinstance(session, Session):
            session.rows.prompt = prompt
        try:
            self._run(session.prefill(), _counted(progress, session.n_ahead))
        except BaseException:
            self.reset()
            raise

    def step(self, session: AnySession, token: int) -> None:
        """Decodes one token, the same in both branches. Raises ContextLengthError when full."""
        self._check_current(session)
        if not session.has_room:
            raise ContextLengthError(f"all {self._context.n_ctx} KV cells are taken; raise n_ctx")
        lease = session.lease if isinstance(session, Session) else None
        self.prefixes.make_room(session.n_cells + session.cells_a_step, lease)
        self._run(session.step(token))

    def degraded(self, session: AnySession) -> FloatArray | None:
        """l_d of the newest row: (n_vocab,) float32, the session's own; None without guidance.

        Rows of the degraded branch that waited are decoded first.
        """
        self._check_current(session)
        self._run(session.catch_up())
        return session.l_d

    def end(self, session: AnySession | None = None) -> None:
        """Ends the session, or the one that is open; a prompt that begins alike goes on from its
        cells. Does nothing for one that has ended."""
        if session is not None and session is not self.session:
            return
        try:
            if isinstance(self.session, Session) and self.session.is_whole:
                self.prefixes.keep(self.session.lease)
        finally:
            self.reset()

    def reset(self) -> None:
        """Drops the session, and what it decoded; kept prefixes stay."""
        self.session = None
        self.prefixes.settle()
        for branch in (self.branches.original, self.branches.degraded):
            branch.context.truncate(branch.seq, 0)
            branch.context.patch.truncate_image_tokens(branch.seq, 0)

    def _rows_of(self, prompt: Prompt, guidance: Guidance) -> PromptRows:
        guided = guidance.contrasts and prompt.n_image_tokens > 0
        return PromptRows(prompt, guidance, self._context.n_layer, guided=guided)

    def _new_session(self, prompt: Prompt, guidance: Guidance) -> Session:
        rows = self._rows_of(prompt, guidance)
        if rows.guided and self.strategy.fork and self.branches.paired:
            if not is_surveyed(self._context):
                self.prefixes.make_room(2)
                survey(self.branches)
            forking = Forking(self._context, rows.layers or ())
            if forking.pairs or self.strategy.may_wait(guidance):
                rows.fork_at(forking.layer)
        return Session(
            self.branches,
            self.selections,
            rows,
            guidance,
            self.prefixes.lease(prompt, rows),
            strategy=self.strategy,
            pace=self._pace,
            note_images=self.prefixes.keeps,
        )

    def _run(self, decodes: Decodes, report: Callable[[int], None] = lambda n_rows: None) -> None:
        """Decodes each batch that is wanted, until none is."""
        with closing(decodes):
            batch = next(decodes, None)
            while batch is not None:
                decoded = self._decoded(batch)
                report(batch.n_rows)
                try:
                    batch = decodes.send(decoded)
                except StopIteration:
                    return

    def _decoded(self, batch: Batch | ImageBatch) -> Decoded:
        try:
            return _decoded(batch)
        except BackendError:
            self.prefixes.forget()  # it is not known what of a failed decode the cells hold
            raise

    def _check_current(self, session: AnySession) -> None:
        if session is not self.session:
            raise BackendError("this answer has ended; open another")

    def _check_cells(self, needed: int, who: str, why: str) -> None:
        if needed > self._context.n_ctx:
            raise ContextLengthError(
                f"the {who} {needed} KV cells ({why} tokens) and the context has "
                f"{self._context.n_ctx}; raise n_ctx or shorten the prompt"
            )


def _check_prompt(prompt: Prompt, context: Context) -> None:
    if prompt.n_tokens == 0:
        raise PromptError("the prompt is empty; give at least one token")
    if isinstance(prompt.segments[-1], ImageSegment):
        raise PromptError("the prompt ends with an image; put text behind it")
    for segment in prompt.segments:
        if isinstance(segment, ImageSegment) and segment.needs_ubatch > context.n_ubatch:
            raise UnsupportedError(
                f"this model decodes the {segment.n_tokens} tokens of an image at once and "
                f"n_ubatch is {context.n_ubatch}; raise n_ubatch"
            )


def _decoded(batch: Batch | ImageBatch) -> Decoded:
    started = time.perf_counter()
    if isinstance(batch, ImageBatch):
        branch = batch.branch
        branch.context.decode_image(batch.image, batch.position, branch.seq, batch.plan)
        return Decoded((), time.perf_counter() - started)
    context = batch.context
    context.decode(
        batch.tokens, batch.positions, batch.seqs, outputs=batch.outputs, plan=batch.plan
    )
    logits = tuple(_logits(context, row) for row in np.flatnonzero(batch.outputs).tolist())
    return Decoded(logits, time.perf_counter() - started)


def _logits(context: Context, row: int) -> FloatArray:
    address = context.logits_address(row)
    return np.ctypeslib.as_array((ctypes.c_float * context.n_vocab).from_address(address))


def _counted(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Turns rows at a time into rows so far, of a total."""
    done = 0

    def report(n_rows: int) -> None:
        nonlocal done
        done += n_rows
        if progress is not None:
            progress(done, total)

    return report
