"""What decodes for sessions: contexts, kept prefixes, and the rules of the KV cache. Tokens only.

    session = engine.open(prompt, guidance)   # nothing is decoded yet
    engine.prefill(session, prompt)           # images encoded from session.first_row on
    while session.has_room:
        token = pick(session.l_o, engine.degraded(session))
        engine.step(session, token)
    engine.end(session)                       # its prompt stays for one that begins alike

As many sessions at a time as there are lanes. `prefill`, `step` and `degraded` decode for one;
`decode` takes batches of many. An engine knows no text, no chat format, no sampling, and nothing
about sequence ids but what it is given. Several threads may call it; one at a time is served.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TypeAlias, TypeVar

from cmg_gguf.arrays import FloatArray
from cmg_gguf.engine.batch import Batch, Decoded, Decodes, ImageBatch
from cmg_gguf.engine.checks import check_cells, check_prompt
from cmg_gguf.engine.context import Branches
from cmg_gguf.engine.contrast import ContrastSession, cells_of_both
from cmg_gguf.engine.decoding import Decoder, Failure, together
from cmg_gguf.engine.fork import FORK_ROWS, Forking, is_surveyed, survey
from cmg_gguf.engine.prefix_cache import PrefixCache
from cmg_gguf.engine.prefixes import items_of, n_common, n_image_rows
from cmg_gguf.engine.replay import first_blind
from cmg_gguf.engine.rows import rows_of
from cmg_gguf.engine.session import Session, cells_of
from cmg_gguf.engine.steps import AUTO, Filling, Pace, Strategy
from cmg_gguf.errors import BackendError, ContextLengthError
from cmg_gguf.guidance import PLAIN, Guidance
from cmg_gguf.prompt.segments import Prompt

Progress: TypeAlias = Callable[[int, int], None]
AnySession: TypeAlias = Session | ContrastSession
SomeSession = TypeVar("SomeSession", Session, ContrastSession)


class Engine:
    """Decodes for sessions, each in two branches.

    lanes: where sessions live, one in each; all in the same contexts. prefixes: what is kept from
    one prompt to the next; None = nothing. strategy: which ways of decoding a step may take. pace:
    how a session alone chooses between them. filling: how small decodes are filled up. lock: held
    by who calls; who makes sessions' rows himself and gives them to `decode` holds it meanwhile.
    """

    def __init__(
        self,
        lanes: Sequence[Branches],
        prefixes: PrefixCache | None = None,
        *,
        strategy: Strategy = AUTO,
        pace: Pace | None = None,
        filling: Filling | None = None,
    ) -> None:
        self.lanes = tuple(lanes)
        self._contexts = lanes[0].original.context, lanes[0].degraded.context
        self.prefixes = prefixes or PrefixCache(self._contexts)
        # What a fork leaves out, a state would miss.
        self.strategy = replace(strategy, fork=strategy.fork and not self._contexts[0].has_state)
        self.sessions: tuple[AnySession, ...] = ()
        self._is_alone = False
        self._context = self._contexts[0]
        self._pace = pace or Pace()
        self.decoder = Decoder(filling or Filling(), [lane.degraded for lane in self.lanes])
        self.lock = threading.RLock()
        for branches in self.lanes:
            _clear(branches)

    @property
    def n_cells(self) -> int:
        """KV cells that sessions and kept prefixes hold in the fullest context; shared ones count
        once."""
        return max(self._n_own() + self.prefixes.n_held(), self._n_unshared())

    def check(self, prompt: Prompt, guidance: Guidance, *, replays: bool = False) -> None:
        """Raises what `open` would raise about its arguments: PromptError, ContextLengthError,
        GuidanceError, UnsupportedError. Computes nothing."""
        check_prompt(prompt, self._context)
        needed = self.cells(prompt, guidance, 1, replays=replays)
        counts = f"{prompt.n_tokens} tokens, {prompt.n_image_tokens} of them image"
        check_cells(needed, self._context.n_ctx, "prompt needs", counts)

    def check_contrast(self, original: Prompt, degraded: Prompt) -> None:
        """Raises what `open_contrast` would raise about its arguments."""
        for prompt in (original, degraded):
            check_prompt(prompt, self._context)
        needed = self.contrast_cells(original, degraded, 1)
        counts = f"{original.n_tokens} and {degraded.n_tokens}"
        check_cells(needed, self._context.n_ctx, "two prompts need", counts)

    def cells(
        self, prompt: Prompt, guidance: Guidance, n_tokens: int, *, replays: bool = False
    ) -> int:
        """KV cells of a prompt and n_tokens of its answer, if nothing of it is kept. replays: it
        will be read blind too."""
        rows, paired = rows_of(prompt, guidance, self._context), self.lanes[0].paired
        blind = first_blind(prompt, self.lanes[0]) if replays else None
        a_step = 2 if paired and (rows.guided or replays) else 1
        return cells_of(rows, paired=paired, first_blind=blind) + a_step * n_tokens

    def contrast_cells(self, original: Prompt, degraded: Prompt, n_tokens: int) -> int:
        """The same of two prompts."""
        both = original.n_tokens + n_tokens, degraded.n_tokens + n_tokens
        return cells_of_both(*both, self.lanes[0])

    def fits(self, n_cells: int, prompt: Prompt | None = None, guidance: Guidance = PLAIN) -> bool:
        """Whether an answer of n_cells can begin: a lane is free, and every session gets the cells
        that were set aside for it; kept prompts give way. What of `prompt` the others hold as well
        counts once."""
        with self.lock:
            if len(self.sessions) == len(self.lanes):
                return False
            rows = None if prompt is None else rows_of(prompt, guidance, self._context)
            n_leased, n_shared = self.prefixes.n_leased(prompt, rows)
            counted = [max(s.n_cells, s.n_reserved) for s in self.sessions]
            own = sum(counted) - sum(session.n_named for session in self.sessions)
            needed = own + n_leased + n_cells - n_shared
            if not self.lanes[0].paired:
                needed = max(needed, sum(counted) + n_cells)
            return needed <= self._context.n_ctx

    def decodes_pictures_of(self, prompt: Prompt) -> bool:
        """Whether a session is just decoding a prompt that begins with the same pictures: behind it
        they need not be decoded again."""
        items = items_of(prompt)
        return self.prefixes.keeps and any(
            isinstance(session, Session)
            and session.n_past == 0
            and n_image_rows(items[: n_common(items, tuple(session.lease.items))]) > 0
            for session in self.sessions
        )

    def open(
        self,
        prompt: Prompt,
        guidance: Guidance,
        *,
        n_reserved: int = 0,
        alone: bool = False,
        replays: bool = False,
    ) -> Session:
        """An answer to this prompt.

        The images need not be encoded: `Session.first_row` says from where on they must be for
        `prefill`. n_reserved: KV cells to set aside, see `fits`. alone: it begins in empty caches
        and goes one fixed way, so that the same gives the same bits; no other may be open
        meanwhile. replays: `replaying` will be asked for. Raises what `check` raises; BackendError
        if no lane is free.
        """
        self.check(prompt, guidance, replays=replays)
        blind = first_blind(prompt, self.lanes[0]) if replays else None
        with self.lock:
            branches = self._free_lane()
            new = partial(self._new_session, prompt, guidance, branches, alone, blind)
            return self._opened(branches, n_reserved, alone, new)

    def open_contrast(
        self, original: Prompt, degraded: Prompt, *, n_reserved: int = 0, alone: bool = False
    ) -> ContrastSession:
        """An answer behind two prompts, their images encoded. Raises as `open` does."""
        self.check_contrast(original, degraded)
        with self.lock:
            branches = self._free_lane()
            new = partial(ContrastSession, branches, original, degraded)
            return self._opened(branches, n_reserved, alone, new)

    def prefill(
        self, session: AnySession, prompt: Prompt | None = None, progress: Progress | None = None
    ) -> None:
        """Decodes the prompt of a session that was just opened; its l_o is then there.

        prompt: the same with its images encoded, if they were not. progress(done, total) counts
        rows. Raises BackendError, and ContextLengthError if other sessions hold the cells; the
        session has ended then.
        """
        self._check_open(session)
        total = session.n_ahead
        try:
            for done in self._run(self.prefilling(session, prompt)):
                if progress is not None:
                    progress(done, total)
        except BaseException:
            self.drop(session)
            raise

    def prefilling(self, session: AnySession, prompt: Prompt | None = None) -> Decodes:
        """What `prefill` decodes. Where there are several lanes, another prompt that begins with
        the same pictures can go on from them at once."""
        if prompt is not None and isinstance(session, Session):
            session.rows.prompt = prompt
        yield from session.prefill()
        if len(self.lanes) > 1 and isinstance(session, Session) and session.decoded_pictures:
            self.keep(session)

    def replaying(
        self, session: AnySession, tokens: Sequence[int], take: Callable[[FloatArray], None]
    ) -> Decodes:
        """What reading an answer blind decodes, see `Session.replay`. What the session has decoded
        is kept before, as at its end."""
        assert isinstance(session, Session)
        assert session.first_blind is not None
        self.keep(session)
        self.prefixes.part(session.lease, session.first_blind)
        yield from session.replay(tokens, take)

    def step(self, session: AnySession, token: int) -> None:
        """Decodes one token, the same in both branches. Raises ContextLengthError when full."""
        self._check_open(session)
        if not session.has_room:
            raise ContextLengthError(f"all {self._context.n_ctx} KV cells are taken; raise n_ctx")
        self.finish(session.step(token))

    def degraded(self, session: AnySession) -> FloatArray | None:
        """l_d of the newest row: (n_vocab,) float32; None without guidance. Rows of the degraded
        branch that waited are decoded first."""
        self._check_open(session)
        self.finish(session.catch_up())
        return session.l_d

    def finish(self, decodes: Decodes) -> None:
        """Decodes each batch that a session wants, by itself, until none is wanted."""
        for _ in self._run(decodes):
            pass

    def keep(self, session: AnySession) -> None:
        """Keeps what a session has decoded for prompts that begin alike, while it goes on."""
        with self.lock:
            self._check_open(session)
            if isinstance(session, Session) and session.is_whole:
                self.prefixes.keep(session.lease)

    def end(self, session: AnySession) -> None:
        """Ends a session; a prompt that begins alike goes on from its cells. Does nothing for one
        that has ended."""
        with self.lock:
            if not self._is_open(session):
                return
            try:
                self.keep(session)
            finally:
                self.drop(session)

    def drop(self, session: AnySession) -> None:
        """Ends a session and keeps nothing of it. Does nothing for one that has ended."""
        with self.lock:
            if self._is_open(session):
                self._clear_lane(session.branches)

    def forget(self, salt: str | None = None) -> None:
        """Lets all kept prompts go, or those of one salt."""
        with self.lock:
            self.prefixes.forget(salt)

    def decode(self, batches: Sequence[Batch | ImageBatch]) -> list[Decoded | Failure]:
        """What came of each batch: those that go together (`decoding.together`) in one decode.

        Their sessions must have room, see `make_room`. An error reaches the batch it belongs to.
        """
        with self.lock:
            fills = self.strategy.waiting == "cheapest" and not self._is_alone
            n_free = self._context.n_ctx - self.n_cells if fills else 0
            came = self.decoder.decode(batches, n_free)
            if any(isinstance(one, Exception) for one in came):
                self.prefixes.forget()  # it is not known what of a failed decode the cells hold
            return came

    def together(self, batches: Sequence[Batch | ImageBatch]) -> list[list[int]]:
        """Groups of batches, by index, that may share a decode."""
        return together(batches)

    def make_room(self, n_more: int = 0) -> bool:
        """Lets kept prefixes go until all that sessions count as their own fits, and n_more cells;
        whether it does."""
        with self.lock:
            unshared = self._n_unshared() + n_more
            fits = self.prefixes.make_room(self._n_own() + n_more)
            return fits and unshared <= self._context.n_ctx

    def _new_session(
        self,
        prompt: Prompt,
        guidance: Guidance,
        branches: Branches,
        alone: bool,
        blind: int | None,
    ) -> Session:
        by_clock = self.strategy.waiting == "cheapest"
        strategy = replace(self.strategy, waiting="never") if alone and by_clock else self.strategy
        rows = rows_of(prompt, guidance, self._context)
        if rows.guided and self.strategy.fork and branches.paired:
            if not is_surveyed(self._context) and self.make_room(FORK_ROWS):
                survey(self._context)
            forking = Forking(self._context, rows.layers or ())
            if forking.pairs or strategy.may_wait(guidance):
                rows.fork_at(forking.layer)
        return Session(
            branches,
            rows,
            guidance,
            self.prefixes.lease(prompt, rows, branches),
            strategy=strategy,
            pace=self._pace,
            prefixes=self.prefixes if self.prefixes.keeps else None,
            first_blind=blind,
        )

    def _opened(
        self, branches: Branches, n_reserved: int, alone: bool, new: Callable[[], SomeSession]
    ) -> SomeSession:
        if self._is_alone or (alone and self.sessions):
            raise BackendError("an answer that is made alone has company; end the others first")
        _clear(branches)  # who decodes by hand can have left something
        try:
            if alone:
                self.prefixes.forget()  # no cell is taken: it gets those that it would get first
            session = new()
            self._is_alone = alone
            session.n_reserved = n_reserved
            self.sessions = (*self.sessions, session)
            self._pace.company = len(self.sessions) > 1
        except BaseException:
            self._clear_lane(branches)
            raise
        return session

    def _run(self, decodes: Decodes) -> Iterator[int]:
        """Decodes each batch that is wanted, until none is; rows so far."""
        done = 0
        with self.lock, closing(decodes):
            batch = next(decodes, None)
            while batch is not None:
                self._make_room(0)
                (came,) = self.decode([batch])
                if isinstance(came, Exception):
                    decodes.throw(came)
                    return
                done += batch.n_rows
                yield done
                try:
                    batch = decodes.send(came)
                except StopIteration:
                    return

    def _n_own(self) -> int:
        """KV cells of all sessions that no prefix names."""
        return sum(session.n_cells - session.n_named for session in self.sessions)

    def _n_unshared(self) -> int:
        """KV cells of degraded branches in a context of their own, where nothing is kept."""
        return 0 if self.lanes[0].paired else sum(session.n_cells for session in self.sessions)

    def _make_room(self, n_more: int) -> None:
        if not self.make_room(n_more):
            raise ContextLengthError(
                f"all {self._context.n_ctx} KV cells are taken, by {len(self.sessions)} answers at "
                "once; raise n_ctx or ask fewer at once (n_parallel)"
            )

    def _free_lane(self) -> Branches:
        self.prefixes.settle()
        taken = {id(session.branches) for session in self.sessions}
        free = next((lane for lane in self.lanes if id(lane) not in taken), None)
        if free is None:
            raise BackendError(
                f"all {len(self.lanes)} sessions are open; end one, or raise n_parallel"
            )
        return free

    def _clear_lane(self, branches: Branches) -> None:
        for session in self.sessions:
            if session.branches is branches and isinstance(session, Session):
                self.prefixes.end(session.lease)
        self.sessions = tuple(s for s in self.sessions if s.branches is not branches)
        self._is_alone = self._is_alone and bool(self.sessions)
        self._pace.company = len(self.sessions) > 1
        self.prefixes.settle()
        _clear(branches)

    def _is_open(self, session: AnySession) -> bool:
        return any(session is other for other in self.sessions)

    def _check_open(self, session: AnySession) -> None:
        if not self._is_open(session):
            raise BackendError("this answer has ended; open another")


def _clear(branches: Branches) -> None:
    for branch in (branches.original, branches.degraded):
        branch.context.truncate(branch.seq, 0)
        branch.context.patch.truncate_image_tokens(branch.seq, 0)
