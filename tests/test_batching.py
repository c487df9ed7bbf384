"""Many answers in one engine, their batches merged: every row of each is the judge's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

import numpy as np
import pytest
from fakes import FakeContext, Fuse
from fakes import prompt as fake_prompt
from guided import held
from judge import Verdict, prompt_rows
from prompts import ONE_IMAGE, PICTURE, PICTURES, TWO_IMAGES, TWO_IN_A_ROW
from reference import Reference, Step, combine
from stepped import SharePace
from support import EXACT, TOLERANCE, Lanes, Tiny

from cmg_gguf.engine import merge
from cmg_gguf.engine.batch import Batch, Decodes, ImageBatch
from cmg_gguf.engine.context import Branch, Branches, Context
from cmg_gguf.engine.engine import AnySession, Engine
from cmg_gguf.engine.prefix_cache import PrefixCache
from cmg_gguf.engine.session import Session
from cmg_gguf.engine.steps import APPROXIMATE, AUTO, EAGER, Filling, Strategy
from cmg_gguf.engine.steps import EXACT as FORKED
from cmg_gguf.errors import BackendError, ContextLengthError
from cmg_gguf.guidance import (
    PLAIN,
    AttentionMass,
    CumulativeMass,
    Guidance,
    LayerPolicy,
    LayerRange,
    LayerSet,
    LowestCosine,
    MeanStd,
    Refresh,
    Scope,
    TopRatio,
)
from cmg_gguf.prompt.segments import ImageSegment, Prompt

NO_IMAGE = "USER: How many people are there in the street? ASSISTANT:"
OTHER_TEXT = "USER: Please answer the question about the left photo. ASSISTANT:"
ROOMY = replace(EXACT, n_ctx=1024)
N_STEPS = 8
Answer: TypeAlias = Callable[["Script"], Decodes]


# --- what is asked -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A prompt, how it is guided, and what the judge makes of it. other: the degraded branch's own
    prompt."""

    prompt: Prompt
    guidance: Guidance
    verdict: Verdict
    other: Prompt | None = None


GUIDED = [
    (ONE_IMAGE, (PICTURE,), Guidance()),
    (ONE_IMAGE, (PICTURE,), Guidance(scope="all", refresh="step")),
    (ONE_IMAGE, (PICTURE,), Guidance(scope="question", refresh="prompt")),
    (ONE_IMAGE, (PICTURE,), Guidance(scope="decode", refresh="step", layers=LayerSet((2,)))),
    (ONE_IMAGE, (0,), Guidance(tokens=CumulativeMass(0.5), layers=LayerSet((5, 2, 3)))),
    (ONE_IMAGE, (0,), Guidance(tokens=MeanStd(0.5), refresh="prompt")),
    (ONE_IMAGE, (0,), Guidance(tokens=TopRatio(1.0), layers=LayerSet((4,)), beta=0.0)),
    (ONE_IMAGE, (PICTURE,), Guidance(layers=LayerRange(0.25, 0.5), scope="decode")),
    (ONE_IMAGE, (PICTURE,), Guidance(layers=AttentionMass(0.3), scope="decode")),
    (ONE_IMAGE, (PICTURE,), Guidance(layers=LowestCosine(0.6), scope="decode", refresh="step")),
    (ONE_IMAGE, (PICTURE,), Guidance(layers=LayerSet((0,)), scope="decode")),
    (TWO_IMAGES, PICTURES, Guidance(scope="text", refresh="step")),
    (TWO_IMAGES, PICTURES, Guidance(scope="all", refresh="prompt", alpha=2.0)),
    (TWO_IN_A_ROW, PICTURES, Guidance(scope="question", layers=LayerSet((3, 5)))),
]
UNGUIDED = [(NO_IMAGE, ()), (OTHER_TEXT, ()), (ONE_IMAGE, (0,)), (TWO_IMAGES, PICTURES)]
CONTRASTS = [((ONE_IMAGE, 0), (ONE_IMAGE, 1)), ((ONE_IMAGE, 0), (NO_IMAGE,))]


def cases_of(tiny: Tiny) -> list[Case]:
    """Guided, plain and contrasted prompts, with no, one and two images."""
    guided = [
        Case(tiny.prompt(text, *seeds), guidance, tiny.verdict(tiny.prompt(text, *seeds), guidance))
        for text, seeds, guidance in GUIDED
    ]
    plain = [
        Case(prompt, PLAIN, by_the_judge(tiny.ref, prompt, prompt, PLAIN))
        for prompt in (tiny.prompt(text, *seeds) for text, seeds in UNGUIDED)
    ]
    strong = Guidance(alpha=2.0)
    contrasted = [
        Case(a, strong, by_the_judge(tiny.ref, a, b, strong), b)
        for a, b in ((tiny.prompt(*first), tiny.prompt(*second)) for first, second in CONTRASTS)
    ]
    return guided + plain + contrasted


@pytest.fixture(scope="module")
def cases(llama: Tiny) -> list[Case]:
    return cases_of(llama)


def by_the_judge(ref: Reference, first: Prompt, second: Prompt, guidance: Guidance) -> Verdict:
    """The verdict on two prompts without a mask, answered by the same tokens."""
    rows, steps = [prompt_rows(ref, first), prompt_rows(ref, second)], []
    for _ in range(N_STEPS):
        l_o, l_d = (ref.forward(branch).logits[-1] for branch in rows)
        token = int(combine(l_o, l_d, alpha=guidance.alpha, beta=guidance.beta).argmax())
        steps.append(Step(l_o, l_d, token))
        rows = [np.concatenate([branch, ref.embed([token])]) for branch in rows]
    return Verdict(steps, (), [])


# --- a schedule of the test's own --------------------------------------------------------------


@dataclass(eq=False)
class Script:
    """One answer, taught with the judge's tokens and looked at row by row.

    asked: the share of the steps that want l_d. leaves_at: the step at which it is dropped.
    errors: (original, degraded) of each step; the second is 0 where nobody asked.
    """

    engine: Engine
    case: Case
    rng: np.random.Generator
    asked: float = 1.0
    leaves_at: int = N_STEPS
    errors: list[tuple[float, float]] = field(default_factory=list)
    session: AnySession | None = None

    def run(self) -> Decodes:
        case, engine, steps = self.case, self.engine, self.case.verdict.steps
        session = self.session = self._opened()
        try:
            yield from engine.prefilling(session, case.prompt)
            yield from self._look(session, 0)
            for i, step in enumerate(steps[: self.leaves_at - 1], 1):
                if i == len(steps):
                    break
                yield from session.step(step.token)
                yield from self._look(session, i)
        finally:
            engine.end(session)

    def _opened(self) -> AnySession:
        if self.case.other is not None:
            return self.engine.open_contrast(self.case.prompt, self.case.other)
        return self.engine.open(self.case.prompt, self.case.guidance)

    def _look(self, session: AnySession, i: int) -> Decodes:
        step, verdict = self.case.verdict.steps[i], self.case.verdict
        if isinstance(session, Session) and session.guided:
            assert session.layers == verdict.layers
            assert [tokens.tolist() for tokens in session.attended()] == verdict.masked[i]
        degraded = 0.0
        if self.rng.random() < self.asked:
            yield from session.catch_up()
            assert (session.l_d is not None) == session.guided
            if session.l_d is not None:
                degraded = float(np.abs(session.l_d - step.degraded).max())
        self.errors.append((float(np.abs(session.l_o - step.original).max()), degraded))


@dataclass(eq=False)
class Schedule:
    """Takes answers up at random, and decodes for a random part of them at a time.

    n_shared: decodes in which several sessions had rows. n_groups: rounds of more than one group.
    """

    engine: Engine
    rng: np.random.Generator
    n_decodes: int = 0
    n_shared: int = 0
    n_groups: int = 0
    on_decode: Callable[[], object] = lambda: None

    def run(self, scripts: Sequence[Script]) -> None:
        waiting = deque(scripts)
        active: list[tuple[Decodes, Batch | ImageBatch]] = []
        while waiting or active:
            while waiting and len(active) < len(self.engine.lanes):
                if active and self.rng.random() < 0.5:
                    break
                decodes = waiting.popleft().run()
                active.append((decodes, next(decodes)))
            size = int(self.rng.integers(1, len(active) + 1))
            chosen = set(self.rng.permutation(len(active))[:size].tolist())
            still = [one for i, one in enumerate(active) if i not in chosen]
            active = still + self._decoded([active[i] for i in sorted(chosen)])

    def _decoded(
        self, wanting: list[tuple[Decodes, Batch | ImageBatch]]
    ) -> list[tuple[Decodes, Batch | ImageBatch]]:
        left = []
        assert self.engine.make_room()
        groups = self.engine.together([batch for _, batch in wanting])
        self.n_groups += len(groups) > 1
        for group in groups:
            came = self.engine.decode([wanting[i][1] for i in group])
            self.n_decodes += 1
            self.n_shared += len(group) > 1
            self.on_decode()
            for i, one in zip(group, came, strict=True):
                if isinstance(one, BaseException):
                    raise one
                decodes = wanting[i][0]
                with suppress(StopIteration):
                    left.append((decodes, decodes.send(one)))
        return left


def errors_of(
    engine: Engine,
    cases: Sequence[Case],
    seed: int,
    *,
    asked: float = 1.0,
    n: int = 24,
    on_decode: Callable[[], object] = lambda: None,
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], Schedule]:
    """(2,): the largest errors of each branch in a random schedule of n of these cases."""
    rng = np.random.default_rng(seed)
    order = [cases[i % len(cases)] for i in rng.permutation(max(n, len(cases)))[:n]]
    scripts = [
        Script(
            engine,
            case,
            rng,
            asked,
            leaves_at=N_STEPS if rng.random() < 0.7 else int(rng.integers(1, N_STEPS)),
        )
        for case in order
    ]
    schedule = Schedule(engine, rng, on_decode=on_decode)
    schedule.run(scripts)
    assert engine.sessions == ()
    assert all(len(script.errors) == min(script.leaves_at, N_STEPS) for script in scripts)
    return np.concatenate([script.errors for script in scripts]).max(axis=0), schedule


STRATEGIES = {
    "eager": (EAGER, 1.0),
    "exact": (FORKED, 1.0),
    "auto": (AUTO, 0.4),
    "approximate": (APPROXIMATE, 1.0),
}
every_strategy = pytest.mark.parametrize(
    ("strategy", "asked"), STRATEGIES.values(), ids=STRATEGIES.keys()
)


# --- against the judge -------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("n_lanes", [2, 5, 8])
def test_every_row_of_every_session_is_the_judges(
    llama: Tiny, cases: list[Case], n_lanes: int, strategy: Strategy, asked: float
) -> None:
    lanes = Lanes(llama, n_lanes, ROOMY, strategy=strategy, pace=SharePace())
    errors, schedule = errors_of(lanes.engine, cases, n_lanes, asked=asked)
    assert errors.max() <= TOLERANCE, errors
    assert schedule.n_shared > 20
    assert schedule.n_groups > 5


@every_strategy
def test_windows_and_sessions_mix(gemma: Tiny, strategy: Strategy, asked: float) -> None:
    """Two of three layers see 32 positions; an image and what stands before it is longer."""
    lanes = Lanes(gemma, 4, ROOMY, strategy=strategy, pace=SharePace())
    good = (PICTURE, *PICTURES)
    known = [
        Case(prompt, guidance, gemma.verdict(prompt, guidance))
        for text, seeds, guidance in GUIDED
        if set(seeds) <= set(good) and not isinstance(guidance.layers, LowestCosine)
        for prompt in [gemma.prompt(text, *seeds)]
    ]
    plain = gemma.prompt(NO_IMAGE)
    known.append(Case(plain, PLAIN, by_the_judge(gemma.ref, plain, plain, PLAIN)))
    errors, schedule = errors_of(lanes.engine, known, 1, asked=asked, n=16)
    assert errors.max() <= TOLERANCE, errors
    assert schedule.n_shared > 10


@pytest.mark.parametrize("n_ubatch", [8, 13])
def test_small_micro_batches_are_shared_too(llama: Tiny, cases: list[Case], n_ubatch: int) -> None:
    options = replace(ROOMY, n_ubatch=n_ubatch)
    lanes = Lanes(llama, 4, options, strategy=AUTO, pace=SharePace())
    errors, schedule = errors_of(lanes.engine, cases, n_ubatch, n=12)
    assert errors.max() <= TOLERANCE, errors
    assert schedule.n_shared > 10


@every_strategy
def test_sessions_that_go_on_from_each_others_cells_are_the_judges(
    llama: Tiny, cases: list[Case], strategy: Strategy, asked: float
) -> None:
    """So little room that kept prompts give way all the time."""
    options = replace(ROOMY, n_ctx=640)
    lanes = Lanes(llama, 4, options, n_slots=6, strategy=strategy, pace=SharePace())
    engine, reused = lanes.engine, []
    opened = engine.open

    def noted(*arguments: Any, **settings: Any) -> Session:
        session = opened(*arguments, **settings)
        reused.append(session.n_reused)
        return session

    engine.open = noted  # type: ignore[method-assign]
    errors, _ = errors_of(engine, cases, 3, asked=asked, n=60)
    assert errors.max() <= TOLERANCE, errors
    assert sum(n > 20 for n in reused) > 10


@pytest.mark.parametrize("at_a_time", [4, 7])
def test_rows_of_no_use_change_nothing(
    llama: Tiny, cases: list[Case], at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)

    def some(self: Filling, n_below: int, n_rows: int) -> int:
        return int(rng.integers(0, at_a_time)) if n_rows < 24 else 0

    monkeypatch.setattr(Filling, "n_padding", some)
    lanes = Lanes(llama, 5, ROOMY, n_slots=2, strategy=AUTO, pace=SharePace())
    errors, _ = errors_of(lanes.engine, cases, at_a_time, asked=0.5, n=30)
    assert errors.max() <= TOLERANCE, errors
    assert lanes.context.n_rows[lanes.context.spare_seq] > 100


@pytest.mark.parametrize("layers", [LowestCosine(0.6), AttentionMass(0.3)], ids=str)
@pytest.mark.parametrize("n_padding", [1, 2, 3])
def test_rows_of_no_use_are_not_the_ones_that_layers_are_chosen_by(
    llama: Tiny, layers: LayerPolicy, n_padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer alone; every decode is filled up."""
    monkeypatch.setattr(Filling, "n_padding", lambda self, n_below, n_rows: n_padding)
    lanes = Lanes(llama, 1, ROOMY, strategy=AUTO, pace=SharePace())
    guidance = Guidance(layers=layers, scope="decode")
    prompt = llama.prompt(ONE_IMAGE, PICTURE)
    session = lanes.engine.open(prompt, guidance)
    lanes.engine.prefill(session, prompt)
    assert lanes.context.n_rows[lanes.context.spare_seq] > 0
    assert session.layers == llama.verdict(prompt, guidance).layers


def test_forks_at_different_layers_are_decoded_apart_and_the_rest_together(
    llama: Tiny, cases: list[Case]
) -> None:
    """One at layer 2, one at layer 3, one plain: two decodes a round."""
    chosen = [cases[3], cases[13], cases[14]]
    lanes = Lanes(llama, 3, ROOMY, strategy=FORKED)
    engine, rng = lanes.engine, np.random.default_rng(0)
    scripts = [Script(engine, case, rng) for case in chosen]
    steps = [script.run() for script in scripts]
    wanted = [next(decodes) for decodes in steps]
    while not all(script.errors for script in scripts):
        for i, script in enumerate(scripts):
            if not script.errors:
                wanted[i] = steps[i].send(only(engine, wanted[i]))
    layers = [batch.fork_layer for batch in wanted if isinstance(batch, Batch)]
    assert layers == [2, 3, 0]
    assert engine.together(wanted) == [[0, 2], [1]]
    n_left_out = lanes.context.patch.n_left_out
    for group in ([0, 2], [1]):
        for i, came in zip(group, engine.decode([wanted[i] for i in group]), strict=True):
            assert not isinstance(came, Exception)
            steps[i].send(came)
    assert lanes.context.patch.n_left_out == n_left_out + 2
    assert np.concatenate([script.errors for script in scripts]).max() <= TOLERANCE
    for decodes in steps:
        decodes.close()


def only(engine: Engine, batch: Batch | ImageBatch) -> Any:
    """What came of a batch by itself."""
    (came,) = engine.decode([batch])
    assert not isinstance(came, Exception)
    return came


# --- masks stay with their session -------------------------------------------------------------


class PartsSwapped(merge.Merged):
    """Gives the rows of two sessions each other's policy, layers and selections."""

    def _plan(self, batches: Sequence[Batch], *arguments: Any) -> Any:
        with_plans = [i for i, batch in enumerate(batches) if batch.plan is not None]
        swapped = list(batches)
        if len(with_plans) > 1:
            i, j = with_plans[:2]
            for k, other in ((i, j), (j, i)):
                mine, theirs = batches[k].plan, batches[other].plan
                assert mine is not None
                assert theirs is not None
                swapped[k] = replace(batches[k], plan=replace(mine, part=theirs.part))
        return super()._plan(swapped, *arguments)


class LogitsSwapped(merge.Merged):
    """Hands the rows of the first session to the second one."""

    def wanted(self, i: int) -> list[int]:
        return super().wanted(1 - i if i < 2 and len(self._places) > 1 else i)


class SeqsForgotten(merge.Merged):
    """Reads every row of the plan as the first session's."""

    def _plan(self, batches: Sequence[Batch], *arguments: Any) -> Any:
        first = next((b.plan for b in batches if b.plan is not None), None)
        if first is None:
            return None
        alike = [
            b if b.plan is None else replace(b, plan=replace(b.plan, part=first.part))
            for b in batches
        ]
        return super()._plan(alike, *arguments)


def check_errors(engine: Engine, cases: list[Case]) -> None:
    errors, _ = errors_of(engine, cases, 5)
    assert errors.max() <= TOLERANCE


@pytest.mark.parametrize("mutant", [PartsSwapped, LogitsSwapped, SeqsForgotten])
def test_a_merge_that_mixes_sessions_up_is_noticed(
    llama: Tiny, cases: list[Case], mutant: type[merge.Merged], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmg_gguf.engine.decoding.Merged", mutant)
    lanes = Lanes(llama, 5, ROOMY, strategy=FORKED)
    with pytest.raises((AssertionError, BackendError, IndexError, ValueError)):
        check_errors(lanes.engine, cases)


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [BackendError, ContextLengthError])
def test_an_error_reaches_its_session_alone_and_the_others_rows_stay_right(
    llama: Tiny, cases: list[Case], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every decode with a row of one sequence fails, before or behind llama.cpp's work."""
    lanes = Lanes(llama, 4, ROOMY, n_slots=2, strategy=AUTO, pace=SharePace())
    engine, context, rng = lanes.engine, lanes.context, np.random.default_rng(0)
    scripts = [Script(engine, case, rng) for case in (*cases[:2], cases[14], cases[5])]
    steps = [script.run() for script in scripts]
    wanted = [next(decodes) for decodes in steps]
    while not all(script.errors for script in scripts):
        for i, script in enumerate(scripts):
            if not script.errors:
                wanted[i] = steps[i].send(only(engine, wanted[i]))
    bad, decode = engine.lanes[1].original.seq, context.decode

    def failing(tokens: Any, positions: Any, seqs: Any, **more: Any) -> None:
        if bad not in seqs:
            return decode(tokens, positions, seqs, **more)
        if rng.random() < 0.5:
            decode(tokens, positions, seqs, **more)
        raise error("told to fail")

    monkeypatch.setattr(context, "decode", failing)
    left = set(range(4))
    while left:
        chosen = sorted(left)
        for group in engine.together([wanted[i] for i in chosen]):
            members = [chosen[k] for k in group]
            for i, came in zip(members, engine.decode([wanted[i] for i in members]), strict=True):
                assert isinstance(came, error) == (i == 1)
                try:
                    wanted[i] = (
                        steps[i].throw(came) if isinstance(came, Exception) else steps[i].send(came)
                    )
                except StopIteration:
                    left.remove(i)
                except error:
                    assert i == 1
                    left.remove(i)
    assert engine.prefixes.n_prefixes > 0  # of those that ended well behind the error
    assert np.concatenate([scripts[i].errors for i in (0, 2, 3)]).max() <= TOLERANCE
    assert all(len(scripts[i].errors) == N_STEPS for i in (0, 2, 3))


# --- cells -------------------------------------------------------------------------------------


@every_strategy
def test_cells_that_are_counted_are_those_that_are_held(
    llama: Tiny, cases: list[Case], strategy: Strategy, asked: float
) -> None:
    """Cells of rows that wait are counted before they are taken; none is taken uncounted."""
    options = replace(ROOMY, n_ctx=640)
    lanes = Lanes(llama, 4, options, n_slots=4, strategy=strategy, pace=SharePace())
    engine = lanes.engine
    seen = []

    def compare() -> None:
        used = lanes.context.n_used
        for seq in range(lanes.context.n_seq_max):
            assert lanes.context.held().get(seq, 0) == held(lanes.context, seq)
        assert used <= engine.n_cells <= options.n_ctx
        seen.append(engine.n_cells - used)

    errors_of(engine, cases, 4, asked=asked, n=40, on_decode=compare)
    engine.forget()
    assert engine.n_cells == lanes.context.n_used == 0
    assert min(seen) == 0


@pytest.mark.parametrize("strategy", [EAGER, FORKED, AUTO], ids=["eager", "exact", "auto"])
def test_between_steps_no_cell_is_counted_that_nobody_holds(
    llama: Tiny, cases: list[Case], strategy: Strategy
) -> None:
    """Three of them ask about one picture; cells are shared between them and with what is kept."""
    lanes = Lanes(llama, 5, ROOMY, n_slots=3, strategy=strategy, pace=SharePace())
    engine, context = lanes.engine, lanes.context
    sessions: list[AnySession] = []
    for case in (cases[0], cases[1], cases[11], cases[14], cases[18]):
        if case.other is None:
            session: AnySession = engine.open(case.prompt, case.guidance)
        else:
            session = engine.open_contrast(case.prompt, case.other)
        engine.prefill(session, case.prompt)
        sessions.append(session)
    assert sessions[1].n_reused > 10
    for i in range(4):
        for session in sessions:
            engine.step(session, 300 + i)
            engine.degraded(session)
        assert engine.n_cells == context.n_used
    for i, session in enumerate(sessions):
        (engine.drop, engine.end)[i % 2](session)
        assert engine.n_cells == context.n_used
    assert engine.prefixes.n_cells == context.n_used > 0
    assert engine.make_room(ROOMY.n_ctx)
    assert engine.n_cells == context.n_used == 0


@pytest.mark.parametrize("pairing", ["pair", "contexts"])
def test_no_context_holds_more_than_is_counted(pairing: str) -> None:
    """Without a model. Three answers go on from one kept prompt: of two contexts, the degraded
    branches' one shares nothing."""
    engine, contexts = fake_lanes(pairing, 3, n_ctx=200, n_slots=2)
    question = fake_prompt(20, -8, 6)
    for segment in question.segments:
        if isinstance(segment, ImageSegment):
            object.__setattr__(segment, "key", "a picture")
    for _ in engine.lanes:
        session = engine.open(question, Guidance(scope="question"))
        engine.prefill(session, question)
        assert max(context.n_used for context in contexts) <= engine.n_cells
    assert session.n_reused > 20
    for opened in engine.sessions:
        engine.step(opened, 1)
        assert max(context.n_used for context in contexts) <= engine.n_cells


@pytest.mark.parametrize("n_pos", [None, 3], ids=["rows", "shared positions"])
@pytest.mark.parametrize("pairing", ["pair", "contexts"])
@pytest.mark.parametrize("seed", range(4))
def test_whoever_is_let_in_gets_the_cells_that_were_set_aside(
    pairing: str, n_pos: int | None, seed: int
) -> None:
    """Without a model. Random answers are let in where `fits` says so, with all that they may need;
    kept prompts give way and nobody else."""
    rng = np.random.default_rng(seed)
    engine, contexts = fake_lanes(pairing, 4, n_ctx=160, n_slots=3)
    engine.strategy = [EAGER, AUTO][seed % 2]
    waiting = deque(fake_case(rng, n_pos) for _ in range(60))
    active: list[tuple[Decodes, Batch | ImageBatch]] = []
    n_waited = n_reused = 0

    def answer(prompt: Prompt, guidance: Guidance, n_tokens: int, n_cells: int) -> Decodes:
        nonlocal n_reused
        session = engine.open(prompt, guidance, n_reserved=n_cells)
        n_reused += session.n_reused
        yield from engine.prefilling(session)
        for token in range(n_tokens):
            if rng.random() < 0.5:
                yield from session.catch_up()
            yield from session.step(token)
        (engine.end, engine.drop)[int(rng.integers(2))](session)

    while waiting or active:
        while waiting and len(active) < 4:
            prompt, guidance, n_tokens = waiting[0]
            n_cells = engine.cells(prompt, guidance, n_tokens)
            if not engine.fits(n_cells, prompt, guidance):
                assert active, "one alone always fits"
                n_waited += 1
                break
            waiting.popleft()
            decodes = answer(prompt, guidance, n_tokens, n_cells)
            active.append((decodes, next(decodes)))
        assert engine.make_room()
        decodes, batch = active.pop(int(rng.integers(len(active))))
        came = only(engine, batch)
        used = max(context.n_used for context in contexts)
        assert used <= engine.n_cells <= 160
        with suppress(StopIteration):
            active.append((decodes, decodes.send(came)))
    assert n_waited > 20
    assert n_reused > 100


def fake_case(rng: np.random.Generator, n_pos: int | None) -> tuple[Prompt, Guidance, int]:
    """One of a few prompts, so that many begin alike."""
    parts = [(3, -4, 12), (3, -4, 20), (20, -4, 2), (30,), (2, -4, 1, -4, 8)][rng.integers(5)]
    asked = fake_prompt(*parts, n_pos=n_pos)
    segments = [
        replace(segment, key=("a picture", i, int(rng.integers(2))))
        if isinstance(segment, ImageSegment)
        else segment
        for i, segment in enumerate(asked.segments)
    ]
    scopes: list[Scope] = ["decode", "question", "text", "all"]
    refreshes: list[Refresh] = ["prompt", "step"]
    guidance = Guidance(scope=scopes[rng.integers(4)], refresh=refreshes[rng.integers(2)])
    plain = rng.random() < 0.3
    return Prompt(tuple(segments)), PLAIN if plain else guidance, int(rng.integers(1, 30))


def fake_lanes(
    pairing: str, n_lanes: int, *, n_ctx: int, n_slots: int
) -> tuple[Engine, list[FakeContext]]:
    """An engine on contexts without a model."""
    contexts = [FakeContext(Fuse(), n_ctx=n_ctx) for _ in range(1 if pairing == "pair" else 2)]
    first, second = cast(Context, contexts[0]), cast(Context, contexts[-1])
    step = 2 if pairing == "pair" else 1
    lanes = [
        Branches(Branch(first, step * i), Branch(second, step * i + step - 1))
        for i in range(n_lanes)
    ]
    slots = [(20 + i, 30 + i) for i in range(n_slots)]
    prefixes = PrefixCache((first, second), slots, n_ctx // 2)
    return Engine(lanes, prefixes, strategy=EAGER, pace=SharePace()), contexts
