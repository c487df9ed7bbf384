"""What the engine asks of its contexts, in which order and of which sequence. No model."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import PROMPT, PROMPTS, Call, Pairing, Rig, filled, prompt
from matrix import every_refresh, every_scope

from cmg_gguf.arrays import FloatArray
from cmg_gguf.errors import (
    BackendError,
    CMGError,
    ContextLengthError,
    GuidanceError,
    PromptError,
    UnsupportedError,
)
from cmg_gguf.guidance import PLAIN, Guidance, LayerRange, Refresh, Scope
from cmg_gguf.prompt.segments import ImageSegment, Prompt

PAIRINGS: tuple[Pairing, ...] = ("pair", "contexts")


# --- order and sequences -----------------------------------------------------------------------


def test_the_original_branch_is_decoded_first_and_the_prefix_is_shared_as_it_grows() -> None:
    rig = Rig()
    assert rig.asked(PROMPT, Guidance(scope="text")) == [
        ("decode", [0, 1, 2], [0, 1, 2], [0, 0, 0]),
        ("share", 0, 1, 3),
        ("decode_image", 4, 3, 0),
        ("share", 0, 1, 7),
        ("decode", [3, 4], [7, 8], [0, 0]),
        ("decode", [3, 4], [7, 8], [1, 1]),
    ]
    rig.forget()
    rig.engine.step(5)
    assert rig.calls == [("decode", [5, 5], [9, 9], [0, 1])]


@pytest.mark.parametrize(
    ("scope", "own"),
    [
        ("decode", [("decode", [4], [8], [1])]),
        ("text", [("decode", [3, 4], [7, 8], [1, 1])]),
        ("all", [("decode_image", 4, 3, 1), ("decode", [3, 4], [7, 8], [1, 1])]),
    ],
)
def test_the_degraded_branch_computes_from_its_first_masked_row(
    scope: Scope, own: list[Call]
) -> None:
    calls = Rig().asked(PROMPT, Guidance(scope=scope))
    n_own = sum(len(call[1]) if call[0] == "decode" else call[1] for call in own)
    assert calls[-len(own) :] == own
    last_share = [call for call in calls if call[0] == "share"][-1]
    assert last_share == ("share", 0, 1, 9 - n_own)


def test_text_before_the_first_masked_row_is_shared_even_behind_other_images() -> None:
    asked = Rig().asked(prompt(1, -2, 3, -2, 2), Guidance(scope="decode"))
    assert asked[-2:] == [("share", 0, 1, 9), ("decode", [5], [9], [1])]
    assert asked[-3] == ("decode", [4, 5], [8, 9], [0, 0])


@every_refresh
@every_scope
def test_sequence_ids_are_respected(scope: Scope, refresh: Refresh) -> None:
    guidance = Guidance(scope=scope, refresh=refresh)
    rigs = Rig(seqs=(0, 1)), Rig(seqs=(7, 3))
    for rig in rigs:
        rig.asked(PROMPT, guidance)
        rig.engine.step(5)
        rig.engine.step(5)
        rig.engine.reset()
    renamed = {0: 7, 1: 3}

    def rename(call: Call) -> Call:
        if call[0] == "decode":
            return (*call[:3], [renamed[s] for s in call[3]])
        if call[0] == "decode_image":
            return (*call[:3], renamed[call[3]])
        if call[0] == "share":
            return (call[0], renamed[call[1]], renamed[call[2]], call[3])
        return (call[0], renamed[call[1]], call[2])

    assert [rename(call) for call in rigs[0].calls] == rigs[1].calls


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(
    ("asked", "guidance"),
    [(PROMPT, PLAIN), (prompt(5), Guidance()), (PROMPT, Guidance(alpha=0.0, beta=0.5))],
)
def test_without_contrast_the_degraded_sequence_is_never_touched(
    asked: Prompt, guidance: Guidance, pairing: Pairing
) -> None:
    rig = Rig(pairing, seqs=(2, 5))
    rig.asked(asked, guidance)
    rig.engine.step(5)
    decodes = [call for call in rig.calls if call[0] != "truncate"]
    assert {seq for call in decodes for seq in np.ravel(call[-1])} == {2}
    assert decodes[-1] == ("decode", [5], [asked.n_tokens], [2])
    assert not rig.engine.guided
    assert rig.engine.degraded_logits is None
    assert rig.engine.degraded_address == 0


@every_scope
def test_two_contexts_each_see_the_whole_prompt_and_share_nothing(scope: Scope) -> None:
    rig = Rig("contexts", seqs=(0, 0))
    rig.asked(PROMPT, Guidance(scope=scope))
    rig.engine.step(5)
    first, second = (
        [call for call in context.calls if call[0] != "truncate"] for context in rig.contexts
    )
    assert first == second
    assert [call[0] for call in first] == ["decode", "decode_image", "decode", "decode"]


def test_text_is_cut_to_micro_batches_and_only_the_last_row_has_logits() -> None:
    rig = Rig(n_ubatch=8)
    asked = rig.asked(prompt(20, -9, 17), Guidance(scope="text"))
    sizes = [len(call[1]) for call in asked if call[0] == "decode"]
    assert sizes == [8, 8, 4, 8, 8, 1, 8, 8, 1]
    assert filled(rig.engine.original_address) == 45


def test_positions_go_on_behind_an_image_that_takes_fewer_of_them() -> None:
    rig = Rig()
    asked = rig.asked(prompt(3, -6, 2, n_pos=2), Guidance())
    assert asked[-2] == ("decode", [3, 4], [5, 6], [0, 0])
    assert rig.engine.n_past == 7
    assert rig.engine.n_cells == rig.contexts[0].n_used == 3 + 6 + 2 + 2


# --- logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", PAIRINGS)
@every_scope
@pytest.mark.parametrize("asked", PROMPTS)
def test_both_rows_are_those_of_the_newest_token(
    asked: Prompt, scope: Scope, pairing: Pairing
) -> None:
    rig = Rig(pairing, seqs=(0, 1))
    rig.engine.prefill(asked, Guidance(scope=scope))
    for position in range(asked.n_tokens - 1, asked.n_tokens + 3):
        original, degraded = rig.engine.original_address, rig.engine.degraded_address
        assert (filled(original), filled(degraded)) == (position, position + 1000)
        rows: tuple[FloatArray, FloatArray | None]
        rows = rig.engine.original_logits, rig.engine.degraded_logits
        assert rows[1] is not None
        assert (rows[0][0], rows[1][0]) == (position, position + 1000)
        rig.engine.step(5)


# --- cells -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", PAIRINGS)
@every_scope
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("asked", PROMPTS)
def test_cells_are_counted_as_they_are_taken(
    asked: Prompt, guided: bool, scope: Scope, pairing: Pairing
) -> None:
    guidance = Guidance(scope=scope) if guided else PLAIN
    rig = Rig(pairing)
    rig.engine.prefill(asked, guidance)
    assert rig.engine.n_cells == rig.engine.cells_needed(asked, guidance)
    for _ in range(3):
        assert rig.engine.n_cells == max(context.n_used for context in rig.contexts)
        rig.engine.step(5)
    rig.engine.reset()
    assert [context.n_used for context in rig.contexts] == [0, 0]
    assert (rig.engine.n_past, rig.engine.n_cells, rig.engine.layers) == (0, 0, ())


@pytest.mark.parametrize("guidance", [PLAIN, Guidance()])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_prompt_fits_exactly_as_long_as_one_step_fits_behind_it(
    guidance: Guidance, pairing: Pairing
) -> None:
    probe = Rig(pairing)
    probe.engine.prefill(PROMPT, guidance)
    probe.engine.step(5)
    needed = probe.engine.n_cells
    Rig(pairing, n_ctx=needed).engine.prefill(PROMPT, guidance)
    small = Rig(pairing, n_ctx=needed - 1)
    with pytest.raises(ContextLengthError, match=rf"{needed} KV cells .*has {needed - 1};"):
        small.engine.prefill(PROMPT, guidance)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("guidance", [PLAIN, Guidance()])
def test_an_answer_takes_all_cells_there_are_and_no_more(
    guidance: Guidance, pairing: Pairing
) -> None:
    for n_ctx in (30, 31):
        rig = Rig(pairing, n_ctx=n_ctx)
        rig.engine.prefill(PROMPT, guidance)
        per_step = 2 if pairing == "pair" and guidance.alpha else 1
        while rig.engine.has_room:
            rig.engine.step(5)
        assert rig.contexts[0].n_used == n_ctx - (n_ctx - rig.engine.n_cells) % per_step
        assert n_ctx - rig.engine.n_cells < per_step
        with pytest.raises(ContextLengthError, match=f"all {n_ctx} KV cells"):
            rig.engine.step(5)


WIDE = Prompt((ImageSegment(30, 30, True, None), *prompt(1).segments))
"""An image that sees itself as a whole, and more of it than a micro-batch holds."""


# --- faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "guidance", "error", "says"),
    [
        (Prompt(()), Guidance(), PromptError, "the prompt is empty"),
        (prompt(3, -4), Guidance(), PromptError, "ends with an image"),
        (prompt(-4), Guidance(), PromptError, "ends with an image"),
        (prompt(200), Guidance(), ContextLengthError, "201 KV cells"),
        (prompt(3, -200, 1), Guidance(), ContextLengthError, "200 of them image tokens"),
        (PROMPT, Guidance(layers=[0, 4]), GuidanceError, "layer 4 is out of range"),
        (PROMPT, Guidance(layers=LayerRange(0.0, 0.1)), GuidanceError, "hold no layer"),
        (prompt(3), Guidance(layers=[4]), GuidanceError, "layer 4 is out of range"),
        (WIDE, Guidance(), UnsupportedError, "30 tokens of an image at once and n_ubatch is 8"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(
    asked: Prompt, guidance: Guidance, error: type[CMGError], says: str
) -> None:
    rig = Rig()
    with pytest.raises(error, match=says):
        rig.asked(asked, guidance)
    assert [call for call in rig.calls if call[0] != "truncate"] == []
    assert rig.engine.n_past == 0
    rig.asked(PROMPT, Guidance())


@pytest.mark.parametrize("pairing", PAIRINGS)
@every_scope
def test_a_prefill_that_fails_anywhere_leaves_the_engine_empty_and_usable(
    scope: Scope, pairing: Pairing
) -> None:
    guidance, asked = Guidance(scope=scope), prompt(9, -4, 11, -4, 2)
    expected = Rig(pairing).asked(asked, guidance)
    for i in range(len(expected)):
        rig = Rig(pairing)
        rig.fuse.left = i
        with pytest.raises(BackendError, match="told to fail"):
            rig.engine.prefill(asked, guidance)
        assert_empty(rig)
        rig.fuse.left = None
        assert rig.asked(asked, guidance) == expected


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_an_interrupt_in_the_progress_report_leaves_the_engine_empty_and_usable(
    pairing: Pairing,
) -> None:
    rig, n_reports = Rig(pairing), 0

    def count(done: int, total: int) -> None:
        nonlocal n_reports
        n_reports += 1

    rig.engine.prefill(PROMPT, Guidance(), count)
    for stop_at in range(n_reports):
        left = stop_at

        def interrupt(done: int, total: int) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1

        with pytest.raises(KeyboardInterrupt):
            rig.engine.prefill(PROMPT, Guidance(), interrupt)
        assert_empty(rig)
    rig.engine.prefill(PROMPT, Guidance())
    assert rig.engine.n_past == PROMPT.n_tokens


def test_a_step_that_fails_leaves_the_count_of_cells_as_it_was() -> None:
    rig = Rig()
    rig.engine.prefill(PROMPT, Guidance())
    before = rig.engine.n_cells, rig.engine.n_past
    rig.fuse.left = 0
    with pytest.raises(BackendError):
        rig.engine.step(5)
    assert (rig.engine.n_cells, rig.engine.n_past) == before


def test_there_is_no_step_without_a_prompt() -> None:
    rig = Rig()
    with pytest.raises(BackendError, match="call prefill first"):
        rig.engine.step(5)
    rig.engine.prefill(PROMPT, Guidance())
    rig.engine.reset()
    with pytest.raises(BackendError, match="call prefill first"):
        rig.engine.step(5)


def assert_empty(rig: Rig) -> None:
    assert [context.n_used for context in rig.contexts] == [0, 0]
    assert (rig.engine.n_past, rig.engine.n_cells) == (0, 0)
    with pytest.raises(BackendError, match="call prefill first"):
        rig.engine.step(5)


# --- progress ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", PAIRINGS)
@every_scope
@pytest.mark.parametrize("asked", PROMPTS)
def test_progress_counts_every_computed_row_up_to_the_total(
    asked: Prompt, scope: Scope, pairing: Pairing
) -> None:
    rig = Rig(pairing)
    reports: list[tuple[int, int]] = []
    rig.engine.prefill(asked, Guidance(scope=scope), lambda *report: reports.append(report))
    done = [report[0] for report in reports]
    rows = [call[1] for call in rig.calls if call[0].startswith("decode")]
    computed = [len(row) if isinstance(row, list) else row for row in rows]
    assert np.diff([0, *done]).tolist() == computed
    assert {total for _, total in reports} == {done[-1]} == {sum(computed)}
