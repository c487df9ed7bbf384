"""Forks of many rows: several originals and others below, several degraded rows that enter."""

from __future__ import annotations

import numpy as np
import pytest
from many import Answer, Decodable, check, mixed, open_context
from plans import N_LAYER, Row, decode, part, plan, survey
from prompts import ONE_IMAGE, TWO_IMAGES
from support import FINE, Counted, Tiny

from cmg_gguf import _core
from cmg_gguf.errors import BackendError
from cmg_gguf.guidance import CumulativeMass, Guidance, MeanStd, TopRatio

LAYER = 2
FORKED: list[tuple[str, tuple[int, ...], Guidance]] = [
    (ONE_IMAGE, (4,), Guidance(tokens=TopRatio(0.5), layers=[2, 3], scope="question")),
    (TWO_IMAGES, (3, 4), Guidance(tokens=CumulativeMass(0.6), layers=[2, 4], scope="question")),
    (TWO_IMAGES, (5, 6), Guidance(tokens=TopRatio(0.3), layers=[2, 5], scope="question")),
]
WHOLE = TWO_IMAGES, (8, 9), Guidance(tokens=MeanStd(0.5), layers=[0, 2, 3, 5], scope="question")
"""Its degraded rows run through all layers, and are masked below the others' fork."""


class Batches:
    """Answers whose degraded rows fork, one whose do not, and a plain one, by hand."""

    def __init__(self, context: Counted, tiny: Tiny) -> None:
        self.context = context
        asked = [*FORKED, WHOLE]
        self.answers = [
            Answer(context, tiny, tiny.prompt(text, *pictures), guidance, 30 - 2 * n)
            for n, (text, pictures, guidance) in enumerate(asked, 1)
        ]
        self.forked, self.whole = self.answers[:-1], self.answers[-1]
        text, pictures, guidance = FORKED[0]
        self.plain = Answer(context, tiny, tiny.prompt(text, *pictures), guidance, 0)

    @property
    def parts(self) -> list[_core.Part]:
        return [answer.part() for answer in self.answers]

    def decode(self, n_below: int, n_entering: int, random: np.random.Generator) -> None:
        """One decode of so many rows. Those below are of any answer, in any order."""
        below = self.below(n_below, random)
        entering = self.entering(n_entering, random)
        fork = _core.ForkPlan(layer=LAYER, n_below=n_below)
        check(self.context, below + entering, self.parts, fork)

    def below(self, n: int, random: np.random.Generator) -> list[Decodable]:
        """Originals, whose residuals are noted, rows of the answer that does not fork, and plain
        ones."""
        groups: list[list[Decodable]] = [[] for _ in range(len(self.answers) + 2)]
        for at in random.integers(len(groups), size=n).tolist():
            if at < len(self.forked) and self.answers[at].n_left:
                groups[at] += self.answers[at].original(at, notes=True)
            elif at == len(self.forked) and self.whole.n_left:
                groups[at] += self.whole.original(at)
            elif at == len(self.forked) + 1 and self.whole.n_waiting:
                groups[at] += self.whole.degraded(len(self.forked))
            else:
                groups[-1] += self.plain.plain()
        return mixed(groups, random)

    def entering(self, n: int, random: np.random.Generator) -> list[Decodable]:
        """Degraded rows of the answers that fork, noted in this decode or before."""
        groups: list[list[Decodable]] = [[] for _ in self.forked]
        for _ in range(n):
            waiting = [i for i, answer in enumerate(self.forked) if answer.n_waiting]
            at = int(random.choice(waiting))
            groups[at] += self.forked[at].degraded(at, enters=True)
        return mixed(groups, random)

    def note(self, n: int) -> None:
        """Decodes n originals of each answer that forks; none enters."""
        rows = []
        for i, answer in enumerate(self.forked):
            rows += answer.original(i, n, notes=True)
        fork = _core.ForkPlan(layer=LAYER, n_below=len(rows))
        check(self.context, rows, self.parts, fork)


def surveyed(tiny: Tiny, sizes: tuple[int, ...] = (2, 31)) -> Counted:
    context = open_context(tiny)
    survey(context, sizes=sizes)
    assert context.patch.fork_obstacle(LAYER, shrinks=True) == ""
    return context


@pytest.mark.parametrize(
    ("n_below", "n_rows"),
    [(1, 2), (1, 5), (1, 12), (2, 4), (2, 7), (3, 6), (4, 8), (5, 9), (5, 12), (0, 5), (12, 12)],
)
def test_any_rows_fork_behind_any_others(tiny: Tiny, n_below: int, n_rows: int) -> None:
    random, context = np.random.default_rng(10 * n_rows + n_below), surveyed(tiny)
    batches = Batches(context, tiny)
    batches.note(6)
    before = context.patch.n_left_out
    n_decodes = 2 if n_rows - n_below < 6 else 1
    for _ in range(n_decodes):
        batches.decode(n_below, n_rows - n_below, random)
    assert context.patch.n_left_out - before == n_decodes * (n_rows - n_below)
    for answer in batches.answers:
        answer.check_selections()


def test_an_answer_in_forks_of_many_sizes_is_the_judges(tiny: Tiny) -> None:
    """Every row behind a fork reads cells that other forks wrote."""
    random, context = np.random.default_rng(3), surveyed(tiny)
    batches = Batches(context, tiny)
    batches.note(1)
    for _ in range(20):
        n_below = int(random.integers(6))
        below = batches.below(n_below, random)
        n_waiting = sum(answer.n_waiting for answer in batches.forked)
        entering = batches.entering(int(random.integers(min(n_waiting, 6) + 1)), random)
        if below or entering:
            fork = _core.ForkPlan(layer=LAYER, n_below=n_below)
            check(context, below + entering, batches.parts, fork)
    assert context.patch.n_left_out > 20
    assert min(answer.n_degraded - answer.first for answer in batches.forked) > 5


def test_each_enters_with_what_its_original_notes_in_the_same_decode(tiny: Tiny) -> None:
    context = surveyed(tiny)
    batches = Batches(context, tiny)
    for n in (1, 3):
        rows, entering = [], []
        for i, answer in enumerate(batches.forked):
            rows += answer.original(i, n, notes=True)
            entering += answer.degraded(i, n, enters=True)
        fork = _core.ForkPlan(layer=LAYER, n_below=len(rows))
        check(context, rows + entering, batches.parts, fork)


@pytest.mark.parametrize("sizes", [(8, 4, 2), (16, 2), (37, 2)], ids=str)
def test_surveys_of_as_many_rows_as_heads_or_numbers_tell_them_apart(
    tiny: Tiny, sizes: tuple[int, ...]
) -> None:
    """4 heads of 16 numbers, 2 of them of keys."""
    batches, random = Batches(surveyed(tiny, sizes), tiny), np.random.default_rng(0)
    batches.note(6)
    for n_below, n_entering in ((2, 2), (1, 3), (1, 1), (4, 4)):
        batches.decode(n_below, n_entering, random)


def test_many_rows_fork_where_as_many_were_surveyed(llama: Tiny) -> None:
    context = surveyed(llama, (5, 37))
    batches = Batches(context, llama)
    batches.note(12)
    batches.decode(4, 32, np.random.default_rng(0))


def test_the_stream_is_read_of_rows_below_a_fork(tiny: Tiny) -> None:
    context = surveyed(tiny)
    batches = Batches(context, tiny)
    batches.note(3)
    parts = batches.parts
    reader = batches.whole
    parts[-1] = reader.part(read_residual=True)
    rows = reader.original(len(parts) - 1, reader.n_prompt - reader.n_original)
    rows += batches.plain.plain()
    entering = batches.entering(4, np.random.default_rng(0))
    check(context, rows + entering, parts, _core.ForkPlan(layer=LAYER, n_below=len(rows)))
    np.testing.assert_allclose(reader.selections.cosines, reader.judged.cosines, rtol=0, atol=FINE)


def test_a_decode_after_a_fork_that_failed_is_as_without_it(llama: Tiny) -> None:
    context = surveyed(llama)
    batches = Batches(context, llama)
    batches.note(2)
    answer = batches.forked[0]
    first = Row(answer.seq)
    enters = Row(answer.seq + 1, 0, mask=0, residual=0)
    answer.selections.set_tokens(0, LAYER, np.array([99], np.int32))
    fork = _core.ForkPlan(layer=LAYER, n_below=1)
    batch = [(300, answer.n_original, answer.seq), (300, answer.first, answer.seq + 1)]
    with pytest.raises(BackendError, match="image token 99 is hidden"):
        decode(context, batch, plan([first, enters], answer.part(), fork=fork))
    context.truncate(answer.seq, answer.n_original)
    context.truncate(answer.seq + 1, answer.first)
    hidden = np.flatnonzero(answer.judged.hidden[LAYER, answer.first]).astype(np.int32)
    answer.selections.set_tokens(0, LAYER, hidden)
    batches.decode(3, 5, np.random.default_rng(1))


# --- forks that cannot be -------------------------------------------------------------------------


def noted(context: Counted, tiny: Tiny) -> Answer:
    """An answer that noted the residuals of slots 0 and 1 at LAYER."""
    text, pictures, guidance = FORKED[0]
    answer = Answer(context, tiny, tiny.prompt(text, *pictures), guidance, 0)
    rows = answer.original(0, 2, notes=True)
    check(context, rows, [answer.part()], _core.ForkPlan(layer=LAYER, n_below=2))
    return answer


@pytest.mark.parametrize(
    ("residual", "layer", "error"),
    [
        (2, LAYER, "row 0 enters at layer 2 with residual 2, where nothing was noted"),
        (1, 1, "row 0 enters at layer 1 with residual 1, noted at layer 2"),
    ],
)
def test_a_row_enters_with_what_was_noted_there_or_not_at_all(
    llama: Tiny, residual: int, layer: int, error: str
) -> None:
    context = surveyed(llama)
    answer = noted(context, llama)
    n_rows = context.n_rows.total()
    fork = _core.ForkPlan(layer=layer, n_below=0)
    made = plan([Row(1, 0, mask=0, residual=residual)], answer.part(), fork=fork)
    with pytest.raises(BackendError, match=error):
        decode(context, [(300, answer.first, 1)], made)
    assert context.n_rows.total() == n_rows
    rows = answer.degraded(0, 2, enters=True)
    check(context, rows, [answer.part()], _core.ForkPlan(layer=LAYER, n_below=0))


def test_rows_below_note_for_their_own_slots_and_parts_alone(llama: Tiny) -> None:
    context = surveyed(llama)
    answer = noted(context, llama)
    other = part(_core.Selections(N_LAYER), residuals=_core.Residuals())
    fork = _core.ForkPlan(layer=LAYER, n_below=1)
    below = Row(answer.seq, 0, residual=2)
    batch = [(300, answer.n_original, answer.seq), (300, answer.first, 1)]
    for enters in (Row(1, 0, residual=3), Row(1, 1, residual=2)):
        with pytest.raises(BackendError, match=r"row 1 enters .* where nothing was noted"):
            decode(context, batch, plan([below, enters], answer.part(), other, fork=fork))
    decode(context, batch, plan([below, Row(1, 0, residual=2)], answer.part(), other, fork=fork))


def test_residuals_are_those_of_the_rows_own_part(llama: Tiny) -> None:
    context = surveyed(llama)
    answer = noted(context, llama)
    other = part(_core.Selections(N_LAYER), residuals=_core.Residuals())
    fork = _core.ForkPlan(layer=LAYER, n_below=0)
    made = plan([Row(1, 1, residual=0)], answer.part(), other, fork=fork)
    with pytest.raises(BackendError, match="where nothing was noted"):
        decode(context, [(300, answer.first, 1)], made)


IMPOSSIBLE = {
    "no residual named": (Row(1, 0), "row 1 enters at layer 2 and names no residual"),
    "a plain row": (Row(1), "row 1 enters at layer 2 and names no residual"),
    "masked below": (
        Row(1, 1, mask=0, residual=0),
        "row 1 enters at layer 2 and is masked below, in layer 1",
    ),
    "observed below": (
        Row(1, 1, observe=0, residual=0),
        "row 1 enters at layer 2 and is observed below, in layer 1",
    ),
    "no residuals": (Row(1, 2, residual=0), "row 1 names residual 0 and its part has none"),
    "read below": (Row(1, 3, residual=0), "row 1 enters at layer 2 and the residual stream"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_rows_that_cannot_enter_make_no_plan(name: str) -> None:
    row, error = IMPOSSIBLE[name]
    selections, residuals = _core.Selections(N_LAYER), _core.Residuals()
    parts = [
        part(selections, mask=[2, 3], residuals=residuals),
        part(selections, mask=[1, 3], observe=[1, 3], residuals=residuals),
        part(selections, mask=[2, 3]),
        part(selections, mask=[2, 3], residuals=residuals, read_residual=True),
    ]
    with pytest.raises(ValueError, match=error):
        plan([Row(0), row], *parts, fork=_core.ForkPlan(layer=2, n_below=1))
