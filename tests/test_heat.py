"""Heat maps' numbers: what the row that draws a token attends to, by the judge's attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from answers import answer
from guided import QUESTION, ids, open_vlm
from judge import prompt_rows
from prompts import picture
from reference import F64, Reference
from tiny_llava import TinyConfig, TinyPair

from cmg_gguf import Contrast, Guidance, GuidedVLM, ImageError, PromptError, Reply, Request
from cmg_gguf.guidance import PLAIN
from cmg_gguf.heat.geometry import Picture, Tile
from cmg_gguf.heat.maps import Heat, spread, tokens_of

TOKENS = 8
GUIDED = Guidance(alpha=1.0, beta=0.1)
IMAGES = [picture(1), picture(2)]


def judged(ref: Reference, vlm: GuidedVLM, reply: Reply) -> F64:
    """(n_tokens, n_layers, n_image_tokens): of the row before each token."""
    prompt = vlm.projector.encode(vlm.tokenize(QUESTION, IMAGES))
    said = ids(reply)
    rows = np.concatenate([prompt_rows(ref, prompt), ref.embed(said[:-1])])
    first = prompt.n_tokens - 1
    seen = ref.forward(rows).attention[:, first : first + len(said)]
    layers = np.flatnonzero(ref.hyper.attending)
    return np.swapaxes(seen[layers][:, :, : prompt.n_tokens][:, :, prompt.is_image], 0, 1)


def asked(vlm: GuidedVLM, guidance: Guidance, **settings: Any) -> Reply:
    return vlm.generate(QUESTION, IMAGES, guidance=guidance, max_tokens=TOKENS, **settings)


def weights(reply: Reply) -> F64:
    assert reply.heat is not None
    assert reply.heat.weights.dtype == np.float32
    return reply.heat.weights.astype(np.float64)


SHAPES = {
    "llama": TinyConfig(),
    "windows": TinyConfig(arch="gemma3"),
    "shared caches": TinyConfig(arch="gemma4"),
    "hybrid": TinyConfig(arch="lfm2"),
    "tiles": TinyConfig(longest_edge=112),
}


@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("shape", SHAPES)
def test_heat_is_the_judges_attention_in_every_layer_that_attends(
    written: Callable[[TinyConfig], TinyPair], shape: str, guidance: Guidance
) -> None:
    files = written(SHAPES[shape])
    with open_vlm(files, n_ctx=512) as vlm:
        reply = asked(vlm, guidance, heat=True)
        expected = judged(Reference.load(files.llm), vlm, reply)
        assert weights(reply).shape == expected.shape
        np.testing.assert_allclose(weights(reply), expected, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(weights(reply) == 0.0, expected == 0.0)
        assert expected.max() > 0.05


@pytest.mark.parametrize("strategy", ["auto", "exact", "approximate"])
@pytest.mark.parametrize(
    "guidance",
    [
        GUIDED,
        Guidance(alpha=1.0, beta=0.0),
        Guidance(alpha=1.0, refresh="prompt", scope="decode"),
        Guidance(alpha=1.0, layers=[0, 2], scope="all"),
    ],
    ids=["lazy", "together", "prompt", "all"],
)
def test_heat_is_the_judges_however_the_branches_are_decoded(
    pair: TinyPair, strategy: str, guidance: Guidance
) -> None:
    with open_vlm(pair, strategy=strategy) as vlm:
        reply = asked(vlm, guidance, heat=True)
        expected = judged(Reference.load(pair.llm), vlm, reply)
        np.testing.assert_allclose(weights(reply), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("settings", [{"pairing": "contexts"}, {"prefix_cells": 0}], ids=str)
@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_heat_needs_no_pair_and_no_kept_prefix(
    pair: TinyPair, settings: dict[str, Any], guidance: Guidance
) -> None:
    with open_vlm(pair, **settings) as vlm:
        reply = asked(vlm, guidance, heat=True)
        expected = judged(Reference.load(pair.llm), vlm, reply)
        np.testing.assert_allclose(weights(reply), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_asking_for_heat_changes_no_token(pair: TinyPair, guidance: Guidance) -> None:
    with open_vlm(pair) as vlm:
        without = asked(vlm, guidance)
        assert without.heat is None
        vlm.forget()
        assert ids(asked(vlm, guidance, heat=True)) == ids(without)


@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("kept", [PLAIN, GUIDED], ids=["behind plain", "behind guided"])
def test_heat_is_the_same_behind_a_prompt_that_was_kept(
    pair: TinyPair, kept: Guidance, guidance: Guidance
) -> None:
    with open_vlm(pair) as vlm:
        first = asked(vlm, guidance, heat=True)
        vlm.forget()
        asked(vlm, kept)
        again = asked(vlm, guidance, heat=True)
        assert again.n_reused_tokens > 0
        np.testing.assert_allclose(weights(again), weights(first), rtol=0, atol=2e-6)


def test_heat_is_the_same_beside_other_answers(pair: TinyPair) -> None:
    requests = [
        Request(QUESTION, IMAGES, guidance=guidance, heat=heat, max_tokens=n)
        for guidance, heat, n in (
            (GUIDED, True, 8),
            (PLAIN, True, 6),
            (GUIDED, False, 7),
            (Guidance(alpha=2.0, layers=[3, 4]), True, 8),
        )
    ]
    with open_vlm(pair, n_ctx=1024) as vlm:
        alone = [vlm.generate(request) for request in requests]
        vlm.forget()
        together = {out.index: out.reply for out in vlm.generate_many(requests)}
        for i, one in enumerate(alone):
            beside = together[i]
            assert beside is not None
            assert ids(beside) == ids(one)
            assert (beside.heat is None) == (one.heat is None)
            if one.heat is not None:
                np.testing.assert_allclose(weights(beside), weights(one), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"flash_attn": True, "type_k": "f16", "type_v": "f16"}, 2e-3),
        ({"flash_attn": True, "type_k": "q8_0", "type_v": "q8_0"}, 2e-2),
    ],
    ids=["f16 flash", "q8_0 flash"],
)
def test_heat_of_rounded_caches_is_near_the_judges(
    written: Callable[[TinyConfig], TinyPair], settings: dict[str, Any], tolerance: float
) -> None:
    files = written(replace(TinyConfig(), n_embd=128))
    with open_vlm(files, **settings) as vlm:
        reply = asked(vlm, PLAIN, heat=True)
        expected = judged(Reference.load(files.llm), vlm, reply)
        np.testing.assert_allclose(weights(reply), expected, rtol=0, atol=tolerance)


# --- maps on arrays -----------------------------------------------------------------------------


def heat_of(weights: F64, boxes: F64 | None, size: tuple[int, int] = (4, 2)) -> Heat:
    picture = Picture(
        *size, (Tile(0, weights.shape[2], boxes),), "" if boxes is not None else "why"
    )
    layers = tuple(range(weights.shape[1]))
    return Heat(weights.astype(np.float32), layers, (1,) if len(layers) > 1 else (), (picture,))


HALVES = np.array([[0.0, 0, 2, 2], [2, 0, 4, 2]])


def test_a_map_spreads_each_token_over_its_box() -> None:
    heat = heat_of(np.array([[[0.25, 0.5]]]), HALVES)
    expected = np.repeat([[0.0625, 0.125]], 2, axis=1).repeat(2, axis=0)
    np.testing.assert_allclose(heat.map(0, [0], relative=False), expected)


def test_a_box_that_ends_within_a_pixel_covers_a_part_of_it() -> None:
    found = spread(np.array([3.0]), np.array([[0.5, 0, 2, 1]]), (2, 3))
    np.testing.assert_allclose(found, [[1, 2, 0], [0, 0, 0]])


def test_tokens_without_a_box_are_in_no_map() -> None:
    boxes = np.array([HALVES[0], [np.nan] * 4])
    found = spread(np.array([1.0, 5.0]), boxes, (2, 4))
    assert found.sum() == pytest.approx(1.0)


def test_relative_is_the_ratio_to_the_mean_of_all_tokens() -> None:
    weights = np.array([[[0.5, 0.1]], [[0.5, 0.3]]])  # every row attends to the first
    heat = heat_of(weights, HALVES)
    np.testing.assert_allclose(heat.of([1]), [1.0, 1.5], rtol=1e-6)
    np.testing.assert_allclose(heat.of([1], relative=False), [0.5, 0.3], rtol=1e-6)
    np.testing.assert_allclose(heat.map(0, [1])[0], [1, 1, 1.5, 1.5], rtol=1e-6)


def test_a_layer_is_named_by_its_number_or_by_what_it_is() -> None:
    heat = heat_of(np.array([[[0.1], [0.3]]]), None)
    for layer, expected in ((0, 0.1), (1, 0.3), ("mean", 0.2), ("masked", 0.3)):
        found = heat.of([0], layer=layer, relative=False)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, [expected], rtol=1e-6)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda heat: heat.of([]), "no token is named"),
        (lambda heat: heat.of([3]), "token 3 is out of range: the answer has 1"),
        (lambda heat: heat.of([0], layer=7), "layer 7 does not attend: .* are 0"),
        (lambda heat: heat.of([0], layer="masked"), "needs guidance"),
        (lambda heat: heat.map(2, [0]), "image 2 is out of range: there are 1"),
        (lambda heat: heat.map(0, [0]), r"is not known \(why\)"),
    ],
)
def test_what_there_is_not_is_an_error(ask: Callable[[Heat], object], message: str) -> None:
    with pytest.raises((PromptError, ImageError), match=message):
        ask(heat_of(np.array([[[0.1]]]), None))


def test_the_tokens_of_a_word_are_those_that_hold_a_part_of_it() -> None:
    said = answer(" A", " sau", "cer", ", a cup", " and a", " saucer", ".")
    assert tokens_of(said, "saucer") == ((1, 2), (5,))
    assert tokens_of(said, "CUP") == ((3,),)
    assert tokens_of(said, " saucer, a cup") == ((1, 2, 3),)
    for word in ("sauce", "fork", ".", " ", ""):
        with pytest.raises(PromptError, match="does not say"):
            tokens_of(said, word)


def test_a_word_whose_character_is_over_token_borders_is_found() -> None:
    data = "un caf\u00e9, \u732b\u304c".encode()
    said = answer(data[:7], data[7:8], data[8:])
    assert tokens_of(said, "CAF\u00c9") == ((0, 1),)
    assert tokens_of(said, "\u732b") == ((2,),)


# --- what is asked ------------------------------------------------------------------------------


@pytest.mark.parametrize("heat", [1, "yes", None])
def test_heat_is_asked_for_with_true_or_false(heat: object) -> None:
    with pytest.raises(PromptError, match="neither True nor False"):
        Request(QUESTION, IMAGES, heat=heat)  # type: ignore[arg-type]


def test_heat_of_two_prompts_is_refused() -> None:
    with pytest.raises(PromptError, match="has two prompts"):
        Request(QUESTION, IMAGES, heat=True, contrast=Contrast(QUESTION))


def test_heat_without_a_picture_is_refused(pair: TinyPair) -> None:
    with open_vlm(pair) as vlm, pytest.raises(PromptError, match="there is no image"):
        vlm.generate(QUESTION, heat=True)


def test_heat_of_more_than_a_gibibyte_is_refused_with_what_fits(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmg_gguf.stream.HEAT_BYTES", 4 * 6 * 32 * 5)
    with open_vlm(pair) as vlm:
        with pytest.raises(PromptError, match="set max_tokens to 5 or less"):
            asked(vlm, PLAIN, heat=True)
        reply = vlm.generate(QUESTION, IMAGES, guidance=PLAIN, max_tokens=5, heat=True)
        assert len(weights(reply)) == 5


def test_a_reply_says_where_its_image_tokens_lie(pair: TinyPair) -> None:
    with open_vlm(pair) as vlm:
        heat = asked(vlm, GUIDED, heat=True).heat
    assert heat is not None
    assert [(p.width, p.height, p.first) for p in heat.images] == [(56, 56, 0), (56, 56, 16)]
    assert heat.masked == (2, 3, 4, 5)
    for image in (0, 1):
        found = heat.map(image, [2], relative=False)
        part = slice(16 * image, 16 * image + 16)
        assert found.sum() == pytest.approx(heat.of([2], relative=False)[part].sum(), rel=1e-6)


# --- of an answer that is given -----------------------------------------------------------------


@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_heat_of_an_answer_that_is_given_is_the_judges(pair: TinyPair, guidance: Guidance) -> None:
    with open_vlm(pair) as vlm:
        reply = vlm.heat(QUESTION, IMAGES, answer="a red car in the street", guidance=guidance)
        assert ids(reply) == vlm.model.tokenize("a red car in the street").tolist()
        assert reply.heat is not None
        assert (reply.heat.masked == ()) == (guidance is PLAIN)
        expected = judged(Reference.load(pair.llm), vlm, reply)
        np.testing.assert_allclose(weights(reply), expected, rtol=0, atol=2e-6)
        with pytest.raises(PromptError, match="the answer is empty"):
            vlm.heat(QUESTION, IMAGES, answer="")
