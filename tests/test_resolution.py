"""Pictures of any resolution: how many tokens they take, and that limits are kept to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.plain_llama import open_llama
from commands import flat, invoke
from guided import open_vlm, png
from PIL import Image
from tiny_llava import TinyConfig, TinyPair

from cmg_gguf import CMGChatHandler, GuidedVLM, ImageError, UnsupportedError
from cmg_gguf.facts import pair_facts
from cmg_gguf.llama.chunks import Pixels
from cmg_gguf.llama.resolution import LARGE, measured

Written = Callable[[TinyConfig], TinyPair]


@pytest.fixture
def any_size(written: Written) -> TinyPair:
    """28 x 28 pixels a token, of its own accord 8 to 1024 tokens."""
    return written(TinyConfig(any_resolution=True))


def blank(width: int, height: int) -> Pixels:
    return np.zeros((height, width, 3), np.uint8)


def n_tokens(vlm: GuidedVLM, width: int, height: int) -> int:
    return vlm.tokenize("What?", [blank(width, height)]).n_image_tokens


def test_a_picture_takes_half_of_the_context_at_most(any_size: TinyPair) -> None:
    for n_ctx in (256, 512, 1024):
        with open_vlm(any_size, n_ctx=n_ctx) as vlm:
            sizes = [n_tokens(vlm, *shape) for shape in (*LARGE, (4032, 3024))]
            assert max(sizes) <= n_ctx // 2
            assert n_tokens(vlm, 4032, 3024) > 0.9 * n_ctx // 2


def test_where_the_context_is_large_the_models_own_limit_holds(any_size: TinyPair) -> None:
    with open_vlm(any_size, n_ctx=4096) as vlm:
        assert 1024 - 64 <= n_tokens(vlm, 4096, 4096) <= 1024
        found = measured(vlm.projector)
        assert (found.fewest, found.by_size) == (9, True)  # 3 x 3 is the least square from 8 on


def test_a_photograph_is_answered_in_a_small_context(any_size: TinyPair) -> None:
    with open_vlm(any_size, n_ctx=256) as vlm:
        reply = vlm.generate("What?", [blank(1200, 900)], max_tokens=3)
        assert reply.n_image_tokens == n_tokens(vlm, 1200, 900) <= 128
        assert len(reply.tokens) == 3


def test_the_limits_are_those_asked_for(any_size: TinyPair) -> None:
    with open_vlm(any_size, n_ctx=512, image_max_tokens=40) as vlm:
        assert 30 <= n_tokens(vlm, 4032, 3024) <= 40
    with open_vlm(any_size, n_ctx=512, image_max_tokens=400) as vlm:  # above the share
        assert 360 <= n_tokens(vlm, 4032, 3024) <= 400
    with open_vlm(any_size, n_ctx=512, image_min_tokens=100) as vlm:
        assert n_tokens(vlm, 30, 30) >= 100
        assert n_tokens(vlm, 4032, 3024) <= 256
    with open_vlm(any_size, n_ctx=256, image_min_tokens=180) as vlm:  # also above the share
        assert n_tokens(vlm, 30, 30) >= 180


def test_models_that_make_every_picture_alike_are_left_alone(
    pair: TinyPair, written: Written
) -> None:
    with open_vlm(pair, n_ctx=24) as vlm:
        assert n_tokens(vlm, 4032, 3024) == 16
    with open_vlm(written(TinyConfig(longest_edge=224)), n_ctx=64) as vlm:
        found = measured(vlm.projector)
        assert found.is_cut
        assert not found.by_size


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"image_max_tokens": 8}, "image_max_tokens=8 has no effect: a picture takes 16 tokens"),
        ({"image_min_tokens": 64}, "image_min_tokens=64 has no effect: a picture takes 16 tokens"),
        ({"image_max_tokens": 0}, "image_max_tokens=0 is out of range"),
        ({"image_min_tokens": -1}, "image_min_tokens=-1 is out of range"),
        ({"image_max_tokens": True}, "image_max_tokens=True is out of range"),
        ({"image_max_tokens": 1.5}, "image_max_tokens=1.5 is out of range"),
        ({"image_min_tokens": 9, "image_max_tokens": 8}, "is above image_max_tokens=8"),
    ],
)
def test_a_limit_that_would_not_be_kept_to_is_refused(
    pair: TinyPair, limits: dict[str, Any], says: str
) -> None:
    with pytest.raises(UnsupportedError) as info:
        open_vlm(pair, **limits)
    assert says in str(info.value)


def test_info_says_how_many_tokens_a_picture_takes(any_size: TinyPair, pair: TinyPair) -> None:
    facts = pair_facts(any_size.llm, any_size.mmproj)["mmproj"]
    fewest, most = facts["image_tokens_by_size"]
    assert (fewest, 960 <= most <= 1024) == (9, True)
    assert pair_facts(pair.llm, pair.mmproj)["mmproj"]["image_tokens_by_size"] is None
    flags = ["info", "-m", str(any_size.llm), "--mmproj", str(any_size.mmproj)]
    assert f"{fewest} to {most} by an image's size" in flat(invoke(*flags).stdout)


def test_the_command_line_has_llama_cpps_names_for_the_limits(
    any_size: TinyPair, tmp_path: Path
) -> None:
    Image.fromarray(blank(800, 600)).save(tmp_path / "photo.png")
    pair_flags = ["-m", str(any_size.llm), "--mmproj", str(any_size.mmproj), "-c", "512"]
    asked = ["run", *pair_flags, "--image", str(tmp_path / "photo.png"), "-p", "What?", "-n", "2"]

    def n_image_tokens(*flags: str) -> int:
        done = invoke(*asked, *flags)
        assert done.exit_code == 0
        found = re.search(r"image \((\d+) tokens\)", flat(done.stderr))
        assert found is not None
        return int(found[1])

    assert 100 < n_image_tokens() <= 256
    assert 20 < n_image_tokens("--image-max-tokens", "40") <= 40
    assert n_image_tokens("--image-max-tokens", "400") > 360
    refused = invoke(*asked, "--max-pixels", "479999")
    assert refused.exit_code == 1
    assert "800 x 600 = 480000 pixels and the limit is 479999" in flat(refused.stderr)
    assert "raise max_pixels (--max-pixels)" in flat(refused.stderr)
    assert invoke(*asked, "--max-pixels", "480000").exit_code == 0


def test_the_handler_takes_the_limits_too(any_size: TinyPair) -> None:
    llama = open_llama(any_size.llm, n_ctx=2048, verbose=False)
    limits: dict[str, Any] = {"image_min_tokens": 32, "image_max_tokens": 64, "max_pixels": 10**6}
    handler = CMGChatHandler(any_size.mmproj, use_gpu=False, **limits)
    vlm = handler.vlm(llama)
    assert n_tokens(vlm, 28, 28) >= 32
    assert n_tokens(vlm, 900, 900) <= 64
    with pytest.raises(ImageError, match="1000000"):
        vlm.tokenize("What?", [png(blank(1001, 1000))])
    with pytest.raises(UnsupportedError, match="image_max_tokens=0"):
        CMGChatHandler(any_size.mmproj, image_max_tokens=0).vlm(llama)
    llama.close()
