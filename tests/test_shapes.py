"""Pictures of any shape where the model decodes all tokens of a picture at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from guided import QUESTION, open_vlm
from numpy.typing import NDArray
from tiny_encoder import TinyEncoder, write_encoder
from tiny_llava import TinyConfig, TinyPair, write_pair

from cmg_gguf import ContextLengthError, GuidedVLM, UnsupportedError
from cmg_gguf.facts import pair_facts

NEEDED = 1152
"""Rows for the 1120 tokens of Gemma 4's largest pictures, as a multiple of 64."""


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("unified")
    pair = write_pair(folder, TinyConfig(arch="gemma3", n_ctx=4096))
    encoder = write_encoder(Path(folder) / "unified.gguf", TinyEncoder("gemma4uv", patch_size=4))
    return TinyPair(pair.llm, encoder)


@pytest.fixture(scope="module")
def vlm(unified: TinyPair) -> Iterator[GuidedVLM]:
    with open_vlm(unified, n_ctx=4096, n_ubatch=None) as opened:
        yield opened


def blank(width: int, height: int) -> NDArray[np.uint8]:
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize(
    "size", [(280, 256), (400, 300), (300, 400), (2000, 40), (30, 900), (8, 8)]
)
def test_a_picture_of_any_shape_is_answered_by_default(
    vlm: GuidedVLM, size: tuple[int, int]
) -> None:
    assert vlm.generate(QUESTION, [blank(*size)], max_tokens=2).tokens


def test_no_shape_needs_more_rows_than_a_decode_has_by_default(vlm: GuidedVLM) -> None:
    assert vlm.n_ubatch == NEEDED
    rng: np.random.Generator = np.random.default_rng(0)
    most = 0
    for _ in range(500):
        ratio, area = 64 ** rng.uniform(-1, 1), 10 ** rng.uniform(2, 7)
        width, height = round((area * ratio) ** 0.5) or 1, round((area / ratio) ** 0.5) or 1
        if max(width, height) <= 64 * min(width, height):
            n = vlm.projector.tokenize(vlm.projector.marker, [blank(width, height)]).n_image_tokens
            most = max(most, n)
    assert 512 < most <= NEEDED


def test_too_few_rows_that_are_asked_for_are_refused_by_name(unified: TinyPair) -> None:
    with (
        open_vlm(unified, n_ctx=4096, n_ubatch=512) as small,
        pytest.raises(UnsupportedError, match="n_ubatch is 512; raise n_ubatch"),
    ):
        small.generate(QUESTION, [blank(400, 300)], max_tokens=2)


def test_a_context_shorter_than_the_picture_is_what_is_named(unified: TinyPair) -> None:
    with (
        open_vlm(unified, n_ctx=512, n_ubatch=None, image_max_tokens=2048) as short,
        pytest.raises(ContextLengthError, match="raise n_ctx"),
    ):
        short.generate(QUESTION, [blank(400, 300)], max_tokens=2)


def test_other_models_keep_512_rows(pair: TinyPair) -> None:
    with open_vlm(pair, n_ctx=1024, n_ubatch=None) as plain:
        assert plain.n_ubatch == 512


def test_what_pictures_need_is_among_the_facts(unified: TinyPair, pair: TinyPair) -> None:
    assert pair_facts(*unified)["mmproj"]["n_ubatch"] == NEEDED
    assert pair_facts(*pair)["mmproj"]["n_ubatch"] == 512
