"""Pictures of more than one tile, with the model's own text between them: SmolVLM's way."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
from matrix import every_refresh, every_scope
from prompts import picture
from support import Rig, Tiny, agree
from tiny_llava import TinyConfig, TinyPair
from tiny_vocabulary import vocabulary

from cmg_gguf.engine.rows import PromptRows, masked_rows
from cmg_gguf.engine.steps import EXACT
from cmg_gguf.guidance import Guidance, Refresh, Scope
from cmg_gguf.llama.projector import Projector
from cmg_gguf.prompt.segments import ImageSegment, Prompt, TextSegment

TILED = TinyConfig(longest_edge=112)  # a square makes two rows of two tiles, and one of the whole
N_TILES = 5
BETWEEN = (2, 3, 2, 3)
"""Tokens between them: a mark and the tile's place, with a line break where a row begins."""
ONE = "USER: Is there a dog in this photo? <__media__> Please answer. ASSISTANT:"
TWO = "USER: <__media__> and <__media__> What is near the red car? ASSISTANT:"
QUESTION = "USER: <__media__> What is near the red car? ASSISTANT:"


@pytest.fixture(scope="module")
def tiled(open_tiny: Callable[[TinyConfig], Tiny]) -> Tiny:
    return open_tiny(TILED)


def texts(prompt: Prompt, *, inside: bool) -> list[str]:
    """The text segments inside pictures, or those outside, as their pieces."""
    pieces = vocabulary(tiles=True)
    return [
        "".join(pieces[token] for token in segment.tokens)
        for segment in prompt.segments
        if isinstance(segment, TextSegment) and segment.inside_picture == inside
    ]


# --- which rows belong to a picture -------------------------------------------------------------


def test_text_between_the_tiles_of_a_picture_belongs_to_it(tiled: Tiny) -> None:
    prompt = tiled.prompt(ONE, 2)
    mark = "<fake_token_around_image>"
    assert texts(prompt, inside=True) == [
        f"{mark}<row_1_col_2>",
        f"<0x0A>{mark}<row_2_col_1>",
        f"{mark}<row_2_col_2>",
        f"\n\n{mark}<global-img>",
    ]
    assert prompt.n_image_tokens == N_TILES * TILED.n_image_tokens
    assert prompt.in_picture.sum() == prompt.n_image_tokens + sum(BETWEEN)
    assert not (prompt.is_image & ~prompt.in_picture).any()


def test_what_stands_before_behind_and_between_pictures_belongs_to_none(tiled: Tiny) -> None:
    outside = texts(tiled.prompt(TWO, 3, 4), inside=False)
    assert len(outside) == 3
    assert outside[0].endswith("<row_1_col_1>")
    assert "and" in outside[1]
    assert outside[2].startswith("<fake_token_around_image>")


def test_a_picture_of_one_piece_has_nothing_inside(llama: Tiny) -> None:
    for prompt in (llama.prompt(ONE, 2), llama.prompt("a<__media__><__media__>b", 2, 2)):
        assert (prompt.in_picture == prompt.is_image).all()


@pytest.mark.parametrize("seed", [2, 3])
def test_scopes_leave_the_text_inside_a_picture_to_it(tiled: Tiny, seed: int) -> None:
    one, two = tiled.prompt(ONE, seed), tiled.prompt(TWO, seed, seed)
    last = int(np.flatnonzero(one.is_image)[-1])
    for scope in ("text", "question"):
        assert np.flatnonzero(masked_rows(one, scope)).tolist() == list(
            range(last + 1, one.n_tokens)
        )
    images = np.flatnonzero(two.is_image)
    expected = np.arange(two.n_tokens) > images[-1]
    assert (masked_rows(two, "question") == expected).all()
    between = np.arange(images[19] + 1, images[20])  # five tiles of four tokens each
    expected[between] = True
    assert (masked_rows(two, "text") == expected).all()
    assert (masked_rows(two, "all") == (np.arange(two.n_tokens) >= images[0])).all()
    assert np.flatnonzero(masked_rows(two, "decode")).tolist() == [two.n_tokens - 1]


# --- the judge ----------------------------------------------------------------------------------


@every_refresh
@every_scope
@pytest.mark.parametrize(("text", "seeds"), [(ONE, (2,)), (TWO, (3, 4))], ids=["one", "two"])
def test_tiles_are_the_judges(
    tiled: Tiny, text: str, seeds: tuple[int, ...], scope: Scope, refresh: Refresh
) -> None:
    guidance = Guidance(scope=scope, refresh=refresh)
    for strategy in (None, EXACT):
        rig = Rig(tiled) if strategy is None else Rig(tiled, stepping=strategy)
        agree(rig, tiled.prompt(text, *seeds), guidance)


def test_the_degraded_branch_decodes_the_question_and_no_tile(tiled: Tiny) -> None:
    prompt = tiled.prompt(ONE, 2)
    behind = prompt.n_tokens - 1 - int(np.flatnonzero(prompt.is_image)[-1])
    for scope in ("text", "question"):
        assert agree(Rig(tiled), prompt, Guidance(scope=scope)) == (prompt.n_tokens, behind)


def test_a_question_about_tiles_may_enter_at_a_later_layer(tiled: Tiny) -> None:
    for text, seeds, scope, forks in (
        (ONE, (2,), "text", True),
        (ONE, (2,), "all", False),
        (TWO, (3, 4), "text", False),
        (TWO, (3, 4), "question", True),
    ):
        prompt, guidance = tiled.prompt(text, *seeds), Guidance(scope=cast(Scope, scope))
        rows = PromptRows(prompt, guidance, tiled.model.n_layer, guided=True)
        rows.fork_at(2)
        assert (rows.fork_layer == 2) == forks


# --- tiles are told apart -----------------------------------------------------------------------


def test_no_two_tiles_of_a_picture_have_the_same_key(tiled: Tiny) -> None:
    images = [s for s in tiled.prompt(TWO, 3, 3).segments if isinstance(s, ImageSegment)]
    keys = [segment.key for segment in images]
    assert len(set(keys)) == N_TILES
    assert keys[:N_TILES] == keys[N_TILES:]


def test_a_picture_seen_again_has_the_rows_of_each_of_its_tiles(
    tiled: Tiny, written: Callable[[TinyConfig], TinyPair]
) -> None:
    expected = tiled.prompt(QUESTION, 2)
    projector = Projector(
        written(TILED).mmproj, tiled.model, use_gpu=False, n_threads=1, cache_bytes=2**20
    )
    text = QUESTION.replace("<__media__>", projector.marker)
    for _ in range(2):
        prompt = projector.encode(projector.tokenize(text, [picture(2)], ids=["2"]))
        found = [s.embd for s in prompt.segments if isinstance(s, ImageSegment)]
        rows = [s.embd for s in expected.segments if isinstance(s, ImageSegment)]
        np.testing.assert_array_equal(found, rows)
    assert len({np.asarray(embd).tobytes() for embd in found}) == N_TILES


# --- a question behind the last picture, and what is kept of it ---------------------------------


def test_rows_that_a_later_picture_left_unmasked_are_not_taken_for_masked_ones(llama: Tiny) -> None:
    """With scope "question" the same rows are masked in one prompt and not in another."""
    guidance = Guidance(scope="question")
    first = "USER: <__media__> What is near the red car?"
    short = llama.prompt(f"{first} ASSISTANT:", 3)
    long = llama.prompt(f"{first} <__media__> What is there? ASSISTANT:", 3, 4)
    for prompts in ((long, short, long), (short, long, short)):
        rig = Rig(llama, n_slots=2)
        for prompt in prompts:
            agree(rig, prompt, guidance)
