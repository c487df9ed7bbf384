"""Answers from steps: what ends them, what is shown of them, what is recorded. No model."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from scripted import N_VOCAB, FakeEngine, Run, asking, told

from cmg_gguf.answer.logits import combine, divergence, log_softmax
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.errors import SamplingError
from cmg_gguf.guidance import Disagreement, Guidance
from cmg_gguf.reply import Token
from cmg_gguf.request import Contrast

# --- what ends an answer -----------------------------------------------------------------------


def test_the_end_token_ends_the_answer_and_is_no_part_of_it() -> None:
    run = told("a", "b")
    assert (run.answer.text, run.answer.finish_reason, run.ids) == ("ab", "stop", [0, 1])
    assert run.script.accepted == run.engine.steps == [0, 1]


def test_an_answer_that_ends_at_once_is_empty() -> None:
    run = told()
    assert (run.pieces, run.answer.text, run.answer.tokens) == ([], "", [])
    assert run.answer.finish_reason == "stop"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_max_tokens_ends_the_answer_without_a_step_too_many(n: int) -> None:
    run = told("a", "b", "c", max_tokens=n)
    assert (run.answer.text, run.answer.finish_reason) == ("abc"[:n], "length")
    assert run.engine.steps == run.ids[:-1]


def test_an_end_token_within_max_tokens_is_a_stop() -> None:
    assert told("a", max_tokens=2).answer.finish_reason == "stop"


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_full_context_ends_the_answer_with_length_and_keeps_the_last_token(room: int) -> None:
    run = told("a", "b", "c", "d", engine=FakeEngine(room=room))
    assert (run.answer.text, run.answer.finish_reason) == ("abcd"[: room + 1], "length")


def test_a_stop_string_over_token_borders_is_never_shown() -> None:
    run = told("yes", "<", "/", "s>", " never", stop=["</s>"])
    assert (run.answer.text, run.answer.finish_reason) == ("yes", "stop")
    assert run.ids == [0, 1, 2, 3]  # what was generated is recorded
    assert run.engine.steps == [0, 1, 2]  # and nothing is computed behind it


def test_a_stop_string_in_the_last_allowed_token_is_a_stop() -> None:
    run = told("a.", "b", stop=["."], max_tokens=1)
    assert (run.answer.text, run.answer.finish_reason) == ("a", "stop")


@pytest.mark.parametrize("settings", [{}, {"max_tokens": 2}])
def test_what_only_began_like_a_stop_string_is_shown_at_the_end(settings: dict[str, int]) -> None:
    run = told("yes", "<", stop=["</s>"], **settings)
    assert run.answer.text == "yes<"
    assert [piece.text for piece in run.pieces] == ["yes", "<"]


def test_a_stop_string_that_the_end_completes_is_a_stop() -> None:
    run = told("a", b"\xf0", stop=["\ufffd"])
    assert (run.answer.text, run.answer.finish_reason) == ("a", "stop")


def test_a_closed_answer_keeps_what_was_said() -> None:
    run = Run([b"a", b"b", b"c"])
    next(run.generator)
    next(run.generator)
    cast(Any, run.generator).close()
    assert (run.answer.text, run.ids, run.answer.finish_reason) == ("ab", [0, 1], "length")


# --- what is shown -----------------------------------------------------------------------------


def test_a_character_of_several_tokens_comes_whole_with_all_of_them() -> None:
    smile = "\U0001f642".encode()
    run = told("a", smile[:1], smile[1:3], smile[3:] + b"b")
    assert [(piece.text, len(piece.tokens)) for piece in run.pieces] == [
        ("a", 1),
        ("\U0001f642b", 3),
    ]
    assert [token.text for token in run.answer.tokens] == ["a", "\ufffd", "\ufffd" * 2, "\ufffdb"]


def test_an_unfinished_character_at_the_end_is_shown_as_a_replacement() -> None:
    assert told("a", b"\xf0\x9f").answer.text == "a\ufffd"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([" yes", " no"], "yes no"),
        ([" ", " ", "  yes"], "yes"),
        (["\n", " yes"], "\n yes"),
        ([" "], ""),
        (["", " a"], "a"),
    ],
)
def test_spaces_in_front_are_dropped_and_no_others(words: list[str], text: str) -> None:
    run = told(*words)
    assert run.answer.text == text
    assert "".join(piece.text for piece in run.pieces) == text


def test_any_cut_into_tokens_shows_the_same_and_every_token_once() -> None:
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab .\u00e9\u4e2d\U0001f642", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("ab .\u00e9", k=2)) for _ in range(rng.randint(0, 2))]
        data = text.encode()
        cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randint(0, 6)))
        run = told(*(data[i:j] for i, j in pairwise([0, *cuts, len(data)])), stop=stops)
        assert (
            run.answer.text
            == "".join(piece.text for piece in run.pieces)
            == definition(text, stops)
        )
        assert [token for piece in run.pieces for token in piece.tokens] == run.answer.tokens


def definition(text: str, stops: list[str]) -> str:
    """What is shown: all before the stop string that ends first, the longer of two."""
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(ends)[1]] if ends else text).lstrip(" ")


# --- what is recorded --------------------------------------------------------------------------


def test_a_token_is_changed_where_plain_decoding_draws_another() -> None:
    run = told("a", "b", "c", draws=[(0, 0), (1, 2), (2, 0)])
    assert [(t.id, t.plain, t.changed) for t in run.answer.tokens] == [
        (0, 0, False),
        (1, 2, True),
        (2, 0, True),
    ]


def test_a_sampler_gets_both_rows_of_the_newest_step() -> None:
    run = Run([b"a", b"b"])
    for n_steps in range(2):
        next(run.generator)
        original, degraded = run.engine.original_logits, run.engine.degraded_logits
        for row, expected in zip(
            run.script.given[n_steps], (original, original, degraded), strict=True
        ):
            assert row is expected


def test_without_a_degraded_branch_there_is_no_row_of_it() -> None:
    run = told("a", engine=FakeEngine(guided=False))
    assert [degraded for _, _, degraded in run.script.given] == [None, None]


def test_the_time_of_an_answer_grows_with_it() -> None:
    run = Run([b"a", b"b"])
    next(run.generator)
    first = run.answer.seconds
    assert 0 < first < run.finish().answer.seconds


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("n_top", [0, 1, 5, N_VOCAB])
def test_logprobs_are_those_of_the_guided_distribution(guided: bool, n_top: int) -> None:
    run = told("a", "b", top_logprobs=n_top, engine=FakeEngine(guided=guided))
    for i, token in enumerate(run.answer.tokens):
        engine = FakeEngine(guided=guided)
        for _ in range(i):
            list(engine.step(0))
        expected = log_softmax(
            combine(engine.original_logits, engine.degraded_logits, alpha=1.0, beta=0.1)
        )
        assert token.logprob == expected[token.id]
        best = np.flatnonzero(np.isfinite(expected))
        best = best[np.argsort(-expected[best], kind="stable")][:n_top]
        assert token.top == tuple((int(t), float(expected[t])) for t in best)


def test_without_being_asked_for_there_are_no_logprobs() -> None:
    assert told("a").answer.tokens == [Token(0, "a", 0)]


# --- logits processors -------------------------------------------------------------------------


def test_processors_change_what_is_drawn_from_one_after_another() -> None:
    def double(tokens: IntArray, logits: FloatArray) -> FloatArray:
        return logits * 2

    def add_count(tokens: IntArray, logits: FloatArray) -> FloatArray:
        assert tokens.dtype == np.int32
        return logits + len(tokens)

    run = told("a", "b", logits_processors=[double, add_count])
    engine = FakeEngine()
    for n_tokens, row in enumerate(run.script.rows):
        np.testing.assert_array_equal(row, engine.original_logits * 2 + n_tokens)
        list(engine.step(0))
    for drawn_from, original, _ in run.script.given:
        assert drawn_from is not original


def test_processors_see_the_answer_so_far() -> None:
    seen: list[list[int]] = []

    def look(tokens: IntArray, logits: FloatArray) -> FloatArray:
        seen.append(tokens.tolist())
        return logits

    told("a", "b", draws=[1, 0], logits_processors=[look])
    assert seen == [[], [1], [1, 0]]


def test_a_processor_that_changes_its_argument_leaves_the_engines_logits_alone() -> None:
    def forbid_all_but_3(tokens: IntArray, logits: FloatArray) -> FloatArray:
        logits[np.arange(N_VOCAB) != 3] = -np.inf
        return logits

    run = told("a", logits_processors=[forbid_all_but_3])
    assert all(np.flatnonzero(np.isfinite(row)).tolist() == [3] for row in run.script.rows)
    assert np.isfinite(run.engine.original_logits).all()


def test_nothing_is_drawn_if_a_processor_ended_the_request() -> None:
    ended = False

    def end(tokens: IntArray, logits: FloatArray) -> FloatArray:
        nonlocal ended
        ended = True
        return logits

    def check() -> None:
        if ended:
            raise InterruptedError

    run = Run([b"a"], request=asking(logits_processors=[end]), check=check)
    with pytest.raises(InterruptedError):
        run.finish()
    assert run.script.given == []


def test_a_processor_may_return_another_dtype_or_layout() -> None:
    def wide(tokens: IntArray, logits: FloatArray) -> Any:
        return np.repeat(logits.astype(np.float64), 2)[::2]

    run = told("a", logits_processors=[wide])
    np.testing.assert_array_equal(run.script.rows[0], FakeEngine().original_logits)


@pytest.mark.parametrize("shape", [(N_VOCAB + 1,), (1, N_VOCAB), (0,)])
def test_a_processor_that_returns_another_shape_is_refused_with_both(
    shape: tuple[int, ...],
) -> None:
    with pytest.raises(SamplingError) as info:
        told("a", logits_processors=[lambda tokens, logits: np.zeros(shape, np.float32)])
    assert str(shape) in str(info.value)
    assert f"({N_VOCAB},)" in str(info.value)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"stop": ["a", ""]}, ["stop string 1", "''"]),
        ({"stop": [3]}, ["stop string 0", "3"]),
        ({"top_logprobs": -1}, ["top_logprobs=-1", "0"]),
    ],
)
def test_limits_that_cannot_be_are_refused_when_they_are_made(
    setting: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(SamplingError) as info:
        asking(**setting)
    assert all(part in str(info.value) for part in says)


def test_a_gate_scales_alpha_by_what_the_branches_say_at_each_token() -> None:
    gate = Disagreement(0.5)
    run = told("a", "b", "c", guidance=Guidance(alpha=2.0, gate=gate), engine=FakeEngine())
    shares = [divergence(l_o, l_d) for _, l_o, l_d in run.script.given if l_d is not None]
    assert run.script.alphas == [2.0 * min(1.0, 0.5 * x / math.log(2)) for x in shares]
    assert 0 < min(run.script.alphas) < max(run.script.alphas) < 2.0


def test_a_strength_of_the_callers_is_gated_as_alpha_is() -> None:
    gate = Guidance(gate=Disagreement(0.5))
    whole = told("a", "b", "c", guidance=gate)
    double = told("a", "b", "c", guidance=gate, contrast=Contrast("", strength=lambda n: 2.0 + n))
    expected = [alpha * (2.0 + n) for n, alpha in enumerate(whole.script.alphas)]
    assert double.script.alphas == pytest.approx(expected)
