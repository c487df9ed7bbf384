"""Which prompts are kept, in how many cells, and who gives way. No model."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from fakes import Pairing, Rig
from matrix import REFRESHES, SCOPES

from cmg_gguf.engine.prefixes import (
    NO_CELLS,
    ImageItem,
    Item,
    Prefix,
    PrefixStore,
    head,
    items_of,
    n_common,
    n_image_rows,
    n_positions,
    n_rows,
)
from cmg_gguf.engine.rows import PromptRows
from cmg_gguf.errors import BackendError
from cmg_gguf.guidance import PLAIN, AttentionMass, Guidance, TopRatio
from cmg_gguf.prompt.segments import ImageSegment, Prompt, Segment, TextSegment

CAT, DOG = ImageItem("cat", 4, 2), ImageItem("dog", 4, 2)


def prompt(*parts: int | str) -> Prompt:
    """Tokens, and images of four tokens and two positions by name; "?" has no key."""
    segments: list[Segment] = []
    for is_text, run in itertools.groupby(parts, lambda part: isinstance(part, int)):
        if is_text:
            segments.append(TextSegment(np.array(list(run), np.int32)))
        else:
            segments += [
                ImageSegment(4, 2, False, None, key=None if name == "?" else name) for name in run
            ]
    return Prompt(tuple(segments))


def kept(slot: int, items: tuple[Item, ...], *cells: int) -> Prefix:
    return Prefix(slot, items, np.array(cells, np.int64), NO_CELLS, None)


# --- items -------------------------------------------------------------------------------------


def test_items_are_tokens_and_whole_images() -> None:
    items = items_of(prompt(7, 8, "cat", 9, "dog", "cat"))
    assert items == (7, 8, CAT, 9, DOG, CAT)
    assert (n_rows(items), n_positions(items), n_image_rows(items)) == (15, 9, 12)


@pytest.mark.parametrize(
    ("one", "other", "n"),
    [
        ((1, 2, 3), (1, 2, 3), 3),
        ((1, 2, 3), (1, 2), 2),
        ((1, 2, 3), (1, 5, 3), 1),
        ((CAT, 1), (CAT, 2), 1),
        ((CAT, 1), (DOG, 1), 0),
        ((CAT,), (ImageItem("cat", 4, 3),), 0),
        ((CAT,), (ImageItem("cat", 5, 2),), 0),
        ((), (1,), 0),
    ],
)
def test_prompts_are_alike_up_to_the_first_item_that_differs(
    one: tuple[Item, ...], other: tuple[Item, ...], n: int
) -> None:
    assert n_common(one, other) == n_common(other, one) == n


def test_an_image_without_a_key_is_not_even_like_itself() -> None:
    unknown = prompt(1, "?", 2)
    assert n_common(items_of(unknown), items_of(unknown)) == 1


def test_a_head_never_holds_part_of_an_image() -> None:
    items = (1, CAT, 2, DOG)
    heads = [len(head(items, n)) for n in range(12)]
    assert heads == [0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4]


# --- the store ---------------------------------------------------------------------------------


def test_the_one_that_was_not_used_for_longest_is_the_oldest() -> None:
    store = PrefixStore(3)
    prefixes = [kept(slot, (slot,), slot) for slot in range(3)]
    assert (store.oldest, store.free_slot) == (None, 0)
    for prefix in prefixes:
        store.add(prefix)
    assert (store.oldest, store.free_slot) == (prefixes[0], None)
    store.touch(prefixes[0])
    assert store.oldest is prefixes[1]
    assert [prefix.slot for prefix in store] == [0, 2, 1]
    store.remove(prefixes[2])
    assert (len(store), store.free_slot) == (2, 2)


def test_cells_that_prefixes_share_count_once() -> None:
    store = PrefixStore(3)
    store.add(kept(0, (1, 2, 3), 10, 11, 12))
    store.add(kept(1, (1, 2, 4), 10, 11, 13))
    assert store.n_cells() == 4
    assert store.n_cells(beside=np.array([10, 13, 99])) == 2


def test_a_prefix_is_superseded_by_one_that_has_all_its_images() -> None:
    store = PrefixStore(4)
    prefixes: list[tuple[Item, ...]] = [(1, CAT, 2), (1, CAT, DOG), (1, DOG), (5, 6)]
    for slot, items in enumerate(prefixes):
        store.add(kept(slot, items))
    assert [prefix.slot for prefix in store.superseded((1, CAT, 3, 4))] == [0]
    assert [prefix.slot for prefix in store.superseded((1, CAT, DOG, 3))] == [0, 1]
    assert [prefix.slot for prefix in store.superseded((5, 9))] == [3]


# --- what rows depend on -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance", "depends_on_more"),
    [
        (Guidance(), False),
        (Guidance(scope="all"), False),
        (Guidance(scope="decode"), True),
        (Guidance(refresh="prompt"), True),
        (Guidance(layers=AttentionMass(0.5)), True),
    ],
)
def test_degraded_rows_are_known_by_their_settings_where_nothing_behind_them_matters(
    guidance: Guidance, depends_on_more: bool
) -> None:
    rows = PromptRows(prompt(1, "cat", 2, 3), guidance, 4, guided=True)
    assert (rows.variant is None) == depends_on_more


def test_strength_and_cut_are_no_settings_of_the_rows() -> None:
    def variant(guidance: Guidance) -> object:
        return PromptRows(prompt(1, "cat", 2, 3), guidance, 4, guided=True).variant

    assert variant(Guidance(alpha=2.0, beta=0.3)) == variant(Guidance())
    others = [Guidance(scope="all"), Guidance(tokens=TopRatio(0.4)), Guidance(layers=[0, 1])]
    assert variant(Guidance()) not in [variant(other) for other in others]


# --- in an engine ------------------------------------------------------------------------------


def decoded(rig: Rig, *arguments: Any) -> list[Any]:
    """Sequences of all rows that a prefill decodes."""
    rows: list[Any] = []
    for call in rig.asked(*arguments):
        if call[0] == "decode":
            rows += call[3]
        elif call[0] == "decode_image":
            rows += [call[3]] * call[1]
    return rows


def n_held(rig: Rig) -> int:
    """Cells taken in the original branch's context."""
    return rig.contexts[0].n_used


def test_without_slots_nothing_is_kept() -> None:
    rig = Rig()
    rig.engine.prefill(prompt(1, "cat", 2), Guidance())
    rig.engine.release()
    assert n_held(rig) == 0
    assert rig.engine.prefixes.n_prefixes == 0


def test_a_prompt_asked_again_decodes_its_last_row_alone() -> None:
    rig = Rig(n_slots=2)
    asked = prompt(1, 2, "cat", 3, 4, 5)
    assert decoded(rig, asked, Guidance()) == [0] * 9 + [1] * 3
    assert decoded(rig, asked, Guidance()) == [0, 1]
    assert decoded(rig, asked, PLAIN) == [0]
    assert rig.engine.n_reused == 8
    # The last one was plain: there is no degraded branch to go on from, nor its observed rows.
    assert decoded(rig, asked, Guidance()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("guidance", "first", "others"),
    [
        (PLAIN, 640, 18),
        (Guidance(refresh="prompt"), 664, 18 + 24),
        (Guidance(), 664, 18 + 18),
        (Guidance(scope="all"), 640 + 600, 18 + 18),
        (Guidance(scope="all", refresh="prompt"), 640 + 600, 18 + 600),
    ],
)
def test_questions_about_an_image_decode_what_is_their_own(
    guidance: Guidance, first: int, others: int
) -> None:
    """40 tokens, an image of 576, 6 tokens more, and 18 of each question."""
    rig = Rig(n_slots=8, max_cells=2048, n_ctx=4096, n_ubatch=512)
    image = ImageSegment(576, 576, False, None, key="cat")
    before, behind = np.arange(40, dtype=np.int32), np.arange(6, dtype=np.int32)
    counts = []
    for question in range(6):
        own = np.arange(18, dtype=np.int32) + 100 * (question + 1)
        text = TextSegment(np.concatenate([behind, own]))
        counts.append(len(decoded(rig, Prompt((TextSegment(before), image, text)), guidance)))
        rig.engine.step(1)
    assert counts == [first] + [others] * 5
    rig.engine.release()
    assert rig.engine.prefixes.n_prefixes == 1


def test_the_row_to_encode_from_is_the_first_that_is_decoded() -> None:
    rig = Rig(n_slots=2)
    asked, other = prompt(1, 2, "cat", 3, "dog", 4), prompt(1, 2, "cat", 7, "dog", 4)
    assert rig.engine.first_decoded_row(asked, Guidance()) == 0
    rig.engine.prefill(asked, Guidance())
    rig.engine.release()
    assert rig.engine.first_decoded_row(asked, Guidance()) == 11
    assert rig.engine.first_decoded_row(other, Guidance()) == 6
    assert rig.engine.first_decoded_row(asked, Guidance(refresh="prompt")) == 6
    assert rig.engine.first_decoded_row(asked, Guidance(scope="all", refresh="prompt")) == 2
    assert rig.engine.first_decoded_row(asked, PLAIN) == 11


def test_a_prompt_too_long_to_be_kept_is_kept_in_part() -> None:
    asked = prompt(1, 2, "cat", 3, 4, "dog", 5, 6)
    reused = {}
    for max_cells in (0, 1, 2, 5, 6, 8, 11, 12, 13, 14, 22, 23):
        rig = Rig(n_slots=1, max_cells=max_cells)
        rig.engine.prefill(asked, Guidance())
        rig.engine.release()
        assert n_held(rig) == rig.engine.prefixes.n_cells <= max_cells
        rig.engine.prefill(asked, PLAIN)
        reused[max_cells] = rig.engine.n_reused
    assert reused == {
        0: 0, 1: 1, 2: 2, 5: 2, 6: 6, 8: 8, 11: 8, 12: 12, 13: 13, 14: 13, 22: 13, 23: 13
    }  # fmt: skip


def random_prompt(rng: np.random.Generator) -> Prompt:
    parts: list[int | str] = []
    for _ in range(int(rng.integers(1, 5))):
        parts += rng.integers(0, 2, int(rng.integers(0, 4))).tolist()
        parts += rng.choice(
            ["cat", "dog", "?"], int(rng.integers(0, 3)), p=[0.5, 0.4, 0.1]
        ).tolist()
    return prompt(*parts, 3)


@pytest.mark.parametrize("pairing", ["pair", "contexts"])
@pytest.mark.parametrize("seed", range(5))
def test_cells_are_counted_as_the_cache_counts_them(pairing: Pairing, seed: int) -> None:
    """The fake context refuses a cell too many, and positions that do not follow one another."""
    rig, rng = Rig(pairing, n_slots=3, max_cells=60, n_ctx=100), np.random.default_rng(seed)
    engine, most = rig.engine, 0
    for _ in range(300):
        asked = random_prompt(rng)
        scope, refresh = SCOPES[rng.integers(len(SCOPES))], REFRESHES[rng.integers(2)]
        guidance = [Guidance(scope=scope, refresh=refresh), PLAIN][int(rng.random() < 0.2)]
        if engine.cells_needed(asked, guidance) + 2 > 100:
            continue
        engine.prefill(asked, guidance)
        for _ in range(int(rng.choice([0, 2, 60], p=[0.5, 0.45, 0.05]))):
            if engine.has_room:
                engine.step(int(rng.integers(2)))
        engine.release()
        assert n_held(rig) == engine.prefixes.n_cells <= 60
        most = max(most, engine.prefixes.n_prefixes)
    assert most > 1
    engine.prefixes.forget()
    assert n_held(rig) == 0


@pytest.mark.parametrize("n_calls", range(14))
def test_wherever_it_fails_nothing_is_left_that_is_not_counted(n_calls: int) -> None:
    rig = Rig(n_slots=2, n_ctx=60)
    asked = [prompt(1, "cat", 2), prompt(1, "dog", 2), prompt(1, "cat", "dog", 2)]
    for one in asked[:2]:
        rig.engine.prefill(one, Guidance())
    rig.fuse.left = n_calls

    def go_on() -> None:
        for one in itertools.cycle(asked[::-1]):
            rig.engine.prefill(one, Guidance())
            rig.engine.step(4)

    with pytest.raises(BackendError, match="told to fail"):
        go_on()
    rig.fuse.left = None
    rig.engine.release()
    assert n_held(rig) == rig.engine.prefixes.n_cells
    for one in asked * 2:
        rig.engine.prefill(one, Guidance())
        rig.engine.release()
        assert n_held(rig) == rig.engine.prefixes.n_cells


def test_a_count_that_another_threads_change_overtook_is_not_taken_for_todays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a loop looks at a model that answers."""
    rig = Rig(n_slots=2)
    unique = np.unique

    def overtaken(cells: Any) -> Any:
        monkeypatch.undo()
        rig.engine.prefill(prompt(1, "cat", 2), PLAIN)
        rig.engine.release()
        return unique(cells)

    monkeypatch.setattr(np, "unique", overtaken)
    rig.engine.prefixes.n_held()
    assert rig.engine.prefixes.n_held() == n_held(rig) > 0


def test_a_prefix_that_lost_cells_is_let_go() -> None:
    rig = Rig(n_slots=2)
    asked = prompt(1, 2, "cat", 3)
    rig.engine.prefill(asked, PLAIN)
    rig.engine.release()
    del rig.contexts[0]._cells[10][0]
    rig.engine.prefill(asked, PLAIN)
    assert rig.engine.n_reused == 0
    rig.engine.release()
    assert n_held(rig) == rig.engine.prefixes.n_cells == 7
