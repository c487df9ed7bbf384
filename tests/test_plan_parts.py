"""Rows of several answers in one decode: each is as alone, whatever the others hide or note."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from judge import prompt_rows
from many import LARGE, Answer, Decodable, check, mixed, open_context
from plans import N_IMAGE, N_LAYER, Row, decode, part, plan
from prompts import ONE_IMAGE, PICTURE, TWO_IMAGES
from reference import F64, Mask
from support import FINE, TOLERANCE, Counted, Rig, Tiny, logits

from cmg_gguf import _core
from cmg_gguf.errors import BackendError
from cmg_gguf.guidance import CumulativeMass, Guidance, MeanStd, TopRatio

ASKED: list[tuple[str, tuple[int, ...], Guidance]] = [
    (ONE_IMAGE, (4,), Guidance(tokens=TopRatio(0.3), layers=[1, 2, 4], scope="question")),
    (TWO_IMAGES, (3, 4), Guidance(tokens=MeanStd(0.5), layers=[2, 3, 5], scope="question")),
    (ONE_IMAGE, (7,), Guidance(tokens=CumulativeMass(0.6), layers=[0, 5], scope="decode")),
    (TWO_IMAGES, (5, 6), Guidance(tokens=TopRatio(1.0), layers=[3], scope="question")),
    (ONE_IMAGE, (8,), Guidance(tokens=TopRatio(0.5), layers=[1, 5], scope="decode")),
]
PLAIN = TWO_IMAGES, (5, 6), Guidance(tokens=TopRatio(1.0), layers=[3], scope="question")


def asked(context: Counted, tiny: Tiny, *which: int) -> list[Answer]:
    """Answers of ASKED, the last of them in the lowest sequences."""
    prompts = [(tiny.prompt(text, *pictures), guidance) for text, pictures, guidance in ASKED]
    return [Answer(context, tiny, *prompts[i], 30 - 2 * n) for n, i in enumerate(which, 1)]


def plain_answer(context: Counted, tiny: Tiny) -> Answer:
    text, pictures, guidance = PLAIN
    return Answer(context, tiny, tiny.prompt(text, *pictures), guidance, 0)


def some_rows(answers: list[Answer], plain: Answer, random: np.random.Generator) -> list[Decodable]:
    """Up to three rows of each branch of each answer, in any order."""
    groups = [plain.plain(min(plain.n_left, int(random.integers(3))))]
    for i, answer in enumerate(answers):
        groups.append(answer.original(i, min(answer.n_left, int(random.integers(4)))))
        groups.append(answer.degraded(i, min(answer.n_waiting, int(random.integers(4)))))
    return mixed(groups, random)


# --- every row is as alone ----------------------------------------------------------------------


@pytest.mark.parametrize("which", [(0, 1), (1, 2, 0), (3, 4, 1, 2), (4, 3, 2, 1, 0)], ids=str)
def test_rows_of_several_answers_are_the_judges_in_any_mixture(
    tiny: Tiny, which: tuple[int, ...]
) -> None:
    """Other policies, layers, numbers of pictures and slots, and rows of a plain answer between."""
    random, context = np.random.default_rng(len(which)), open_context(tiny)
    answers, plain = asked(context, tiny, *which), plain_answer(context, tiny)
    while any(answer.n_left + answer.n_waiting for answer in answers):
        parts = [answer.part() for answer in answers]
        rows = some_rows(answers, plain, random)
        if rows:
            check(context, rows, parts)
    for answer in answers:
        answer.check_selections()


def test_flash_attention_hides_what_each_answer_hides(tiny: Tiny) -> None:
    """Masks are half floats there. Answers that hide all tokens, for no choice may turn."""
    random = np.random.default_rng(0)
    context = open_context(tiny, replace(LARGE, flash_attn=True, type_k="f16", type_v="f16"))
    layers = [[3], [1, 2], [0, 5]]
    answers = [
        Answer(
            context,
            tiny,
            tiny.prompt(text, *pictures),
            Guidance(tokens=TopRatio(1.0), layers=layers[n], scope="question"),
            28 - 2 * n,
        )
        for n, (text, pictures, _) in enumerate(ASKED[:3])
    ]
    plain = plain_answer(context, tiny)
    while any(answer.n_left + answer.n_waiting for answer in answers):
        parts = [answer.part() for answer in answers]
        rows = some_rows(answers, plain, random)
        if rows:
            check(context, rows, parts, tolerance=0.1)


def test_a_part_may_come_in_any_place_and_have_no_rows(llama: Tiny) -> None:
    context = open_context(llama)
    first, second = asked(context, llama, 0, 1)
    unused = _core.Selections(N_LAYER)
    idle = part(unused, observe=range(N_LAYER), mask=range(N_LAYER))
    for order in ((0, 1), (2, 1), (1, 2)):
        parts = [idle] * 3
        parts[order[0]], parts[order[1]] = first.part(), second.part()
        ours, theirs = order
        rows = first.original(ours) + first.degraded(ours)
        check(context, rows + second.original(theirs) + second.degraded(theirs), parts)
    assert len(unused) == 0


def test_parts_may_share_what_they_choose(llama: Tiny) -> None:
    """An answer's rows may be of two parts: observed in one, masked in the other."""
    context = open_context(llama)
    (answer,) = asked(context, llama, 1)
    check(context, answer.original(0, 2) + answer.degraded(1, 2), [answer.part()] * 2)


# --- masks of one answer do not touch another ----------------------------------------------------


def blocked_logits(tiny: Tiny, image: Mask, rows: F64, hidden: list[list[int]]) -> F64:
    """(n_vocab,): of the last row, which hides these image tokens in each layer."""
    blocked = np.zeros((N_LAYER, len(rows), len(rows)), np.bool_)
    for il, tokens in enumerate(hidden):
        blocked[il, -1, np.flatnonzero(image)[tokens]] = True
    return np.asarray(tiny.ref.forward(rows, blocked).logits[-1])


HIDDEN: dict[str, tuple[list[list[int]], list[list[int]], int]] = {
    "other layers": ([[1, 2]] * 3 + [[]] * 3, [[]] * 2 + [[1, 2]] * 4, 3),
    "other tokens": ([[1, 2]] * N_LAYER, [[3]] * N_LAYER, 1),
    "the same where one masks": ([[4], [4], [], [], [4], []], [[], [4], [4], [], [], []], 3),
    "nothing in one": ([[]] * N_LAYER, [[5]] * 2 + [[6, 7]] * 4, 2),
}
"""What two rows hide in each layer, and how many masks that takes without a window."""


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("by", ["slots", "layers"])
def test_layers_share_a_mask_where_every_row_hides_the_same(tiny: Tiny, name: str, by: str) -> None:
    """Whether a row hides nothing by its slot, or because its part does not mask the layer."""
    first, second, n_masks = HIDDEN[name]
    rig, prompt = Rig(tiny, n_seq_max=4), tiny.prompt(ONE_IMAGE, PICTURE)
    context, n = rig.contexts[0], rig.decode_prompt(prompt)
    parts = []
    for seq, hidden in enumerate((first, second), 1):
        selections = _core.Selections(N_LAYER)
        selections.resize(1)
        for il, tokens in enumerate(hidden):
            # Where the part does not mask, its slot may hold anything.
            there = np.array(tokens if tokens or by == "slots" else [0, il], np.int32)
            selections.set_tokens(0, il, there)
        layers = [il for il, tokens in enumerate(hidden) if tokens or by == "slots"]
        parts.append(part(selections, mask=layers))
        context.share(0, seq, n)
        context.patch.copy_image_tokens(0, seq, N_IMAGE)
    context.share(0, 3, n)
    before = context.patch.n_masks
    rows = [Row(1, 0, mask=0), Row(3), Row(2, 1, mask=0)]
    decode(context, [(300, n, row.seq) for row in rows], plan(rows, *parts))
    if tiny.ref.hyper.arch == "llama":
        assert context.patch.n_masks - before == n_masks
    inputs = np.concatenate([prompt_rows(tiny.ref, prompt), tiny.ref.embed([300])])
    nothing: list[list[int]] = [[]] * N_LAYER
    for row, hidden in enumerate((first, nothing, second)):
        expected = blocked_logits(tiny, prompt.is_image, inputs, hidden)
        np.testing.assert_allclose(logits(context, row), expected, rtol=0, atol=TOLERANCE)


# --- what each part says of its own prompt --------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_token_is_none_of_a_prompt_though_another_has_as_many(
    llama: Tiny, order: tuple[int, int]
) -> None:
    context = open_context(llama)
    one, two = asked(context, llama, 0, 1)
    for answer in (one, two):
        for il in answer.layers:
            answer.selections.set_tokens(0, il, np.array([N_IMAGE], np.int32))
    parts = [(one, two)[i].part() for i in order]
    rows = [Row(two.seq + 1, order.index(1), mask=0)]
    batch = [(300, two.first, two.seq + 1)]
    decode(context, batch, plan(rows, *parts))
    context.truncate(two.seq + 1, two.first)
    rows.append(Row(one.seq + 1, order.index(0), mask=0))
    batch.append((300, one.first, one.seq + 1))
    with pytest.raises(BackendError, match=f"image token {N_IMAGE} .* the prompt has {N_IMAGE}"):
        decode(context, batch, plan(rows, *parts))


def test_influence_is_kept_for_those_that_ask(tiny: Tiny) -> None:
    context = open_context(tiny)
    answers = asked(context, tiny, 1, 0, 3)
    parts = [answer.part(keep_influence=i != 1) for i, answer in enumerate(answers)]
    groups = [answer.original(i, 3) for i, answer in enumerate(answers)]
    check(context, mixed(groups, np.random.default_rng(5)), parts)
    for i, answer in enumerate(answers):
        for il in range(N_LAYER):
            for slot in range(3):
                kept = answer.selections.influence(slot, il)
                if i == 1 or il not in answer.layers:
                    assert kept.tolist() == []
                    continue
                expected = np.nan_to_num(answer.judged.influence[il, answer.first + slot])
                assert len(kept) == len(expected) > 0
                np.testing.assert_allclose(kept, expected, rtol=0, atol=FINE)


# --- cosines --------------------------------------------------------------------------------------


def last_rows(answer: Answer, part: int) -> list[Decodable]:
    """The rest of its prompt."""
    return answer.original(part, answer.n_prompt - answer.n_original)


@pytest.mark.parametrize("wanted", ["all", "read", "read and others"])
def test_each_part_reads_the_stream_of_its_own_last_row(tiny: Tiny, wanted: str) -> None:
    """llama.cpp's last layer goes on with the rows alone whose logits are wanted."""
    context = open_context(tiny)
    answers, plain = asked(context, tiny, 0, 1, 3), plain_answer(context, tiny)
    reads = [True, False, True]
    parts = [a.part(read_residual=r) for a, r in zip(answers, reads, strict=True)]
    groups = [last_rows(answer, i) for i, answer in enumerate(answers)]
    rows = mixed([*groups, plain.plain(3)], np.random.default_rng(1))
    last = [max(i for i, r in enumerate(rows) if r.row.part == p) for p in range(3)]
    assert last[0] != len(rows) - 1 or last[2] != len(rows) - 1
    outputs = {
        "all": range(len(rows)),
        "read": [last[0], last[2]],
        "read and others": [1, *last, last[0] - 1],
    }[wanted]
    batch = [(r.token, r.position, r.row.seq) for r in rows]
    decode(context, batch, plan([r.row for r in rows], *parts), wanted=outputs)
    for answer, read in zip(answers, reads, strict=True):
        expected = answer.judged.cosines if read else np.zeros(0)
        np.testing.assert_allclose(answer.selections.cosines, expected, rtol=0, atol=FINE)
    assert not np.allclose(answers[0].judged.cosines, answers[2].judged.cosines, atol=1e-4)


def test_cosines_stay_until_others_are_read(llama: Tiny) -> None:
    context = open_context(llama)
    (answer,) = asked(context, llama, 0)
    check(context, last_rows(answer, 0), [answer.part(read_residual=True)])
    before = answer.selections.cosines
    check(context, answer.original(0), [answer.part()])
    decode(context, [(300, 0, 0)])
    assert answer.selections.cosines.tolist() == before.tolist()
    check(context, answer.original(0), [answer.part(read_residual=True)])
    assert not np.allclose(answer.selections.cosines, before, atol=1e-4)


def test_no_part_gets_cosines_where_one_rows_logits_are_not_wanted(llama: Tiny) -> None:
    context = open_context(llama)
    answers = asked(context, llama, 0, 1)
    parts = [answer.part(read_residual=True) for answer in answers]
    rows = last_rows(answers[0], 0) + last_rows(answers[1], 1)
    batch = [(r.token, r.position, r.row.seq) for r in rows]
    wanted = [len(rows) - 1]
    with pytest.raises(BackendError, match="cannot be read: its logits are not wanted"):
        decode(context, batch, plan([r.row for r in rows], *parts), wanted=wanted)
    assert [answer.selections.cosines.tolist() for answer in answers] == [[], []]


# --- plans that cannot be -------------------------------------------------------------------------

REFUSED = {
    "part 2 of 2": (Row(0, 2), "row 1 is of part 2 and the plan has 2"),
    "part -2": (Row(0, -2), "row 1 is of part -2"),
    "plain, an image token": (Row(0, image_token=1), "row 1 is of no part"),
    "plain, observed": (Row(0, observe=0), "row 1 is of no part"),
    "plain, masked": (Row(0, mask=0), "row 1 is of no part"),
    "plain, a residual": (Row(0, residual=0), "row 1 is of no part"),
    "a residual without a fork": (Row(0, 1, residual=0), "names residual 0 and the plan has no"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_name_what_is_not_there_make_no_plan(name: str) -> None:
    row, error = REFUSED[name]
    parts = [part(_core.Selections(N_LAYER)) for _ in range(2)]
    with pytest.raises(ValueError, match=error):
        plan([Row(0), row], *parts)


def test_a_part_without_selections_is_none() -> None:
    with pytest.raises(TypeError):
        part(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [{"observe": 2}, {"mask": 2}])
@pytest.mark.parametrize("at", [0, 1])
def test_a_slot_that_is_not_there_is_refused_before_the_decode(
    llama: Tiny, columns: dict[str, int], at: int
) -> None:
    """Though the other part has it, and in whatever layers."""
    context = open_context(llama)
    (answer,) = asked(context, llama, 0)
    sizes = [9, 9]
    sizes[at] = 2
    parts = []
    for size in sizes:
        selections = _core.Selections(N_LAYER)
        selections.resize(size)
        parts.append(part(selections))
    n_rows = context.n_rows.total()
    rows = [Row(answer.seq, at, **columns)]
    with pytest.raises(BackendError, match="row 0 names slot 2 of 2"):
        decode(context, [(300, answer.first, answer.seq)], plan(rows, *parts))
    assert context.n_rows.total() == n_rows
    check(context, answer.original(0) + answer.degraded(0), [answer.part()])


def test_slots_count_when_the_decode_begins(llama: Tiny) -> None:
    context = open_context(llama)
    (answer,) = asked(context, llama, 0)
    made = plan([Row(answer.seq, 0, observe=3)], answer.part())
    answer.selections.resize(3)
    with pytest.raises(BackendError, match="slot 3 of 3"):
        decode(context, [(300, answer.first, answer.seq)], made)
    answer.selections.grow(4)
    decode(context, [(300, answer.first, answer.seq)], made)


def test_a_plan_holds_what_its_parts_name(llama: Tiny) -> None:
    """A session may be dropped while its rows are decoded."""
    context = open_context(llama)
    (answer,) = asked(context, llama, 0)
    rows = answer.original(0) + answer.degraded(0)
    made = plan([r.row for r in rows], answer.part())
    del answer
    decode(context, [(r.token, r.position, r.row.seq) for r in rows], made)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(logits(context, i), row.expected, rtol=0, atol=TOLERANCE)
