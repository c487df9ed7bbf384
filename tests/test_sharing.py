"""Layers that read another layer's KV cache (Gemma 3n, Gemma 4 E2B and E4B) are masked and seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
from prompts import ONE_IMAGE, PICTURE
from support import APART, TOLERANCE, Pairing, Rig, Tiny
from tiny_llava import TinyConfig

from cmg_gguf.guidance import AttentionMass, Guidance, LayerPolicy, LayerRange, LowestCosine

CONFIG = TinyConfig(arch="gemma4")


@pytest.fixture(scope="module")
def sharing(open_tiny: Callable[[TinyConfig], Tiny]) -> Tiny:
    return open_tiny(CONFIG)


def test_layers_that_share_a_cache_attend(sharing: Tiny) -> None:
    assert sharing.model.attention_layers == tuple(range(CONFIG.n_layer))


@pytest.mark.parametrize("pairing", ["pair", "contexts"])
@pytest.mark.parametrize("refresh", ["prompt", "step"])
@pytest.mark.parametrize(
    "layers", [LayerRange(), [4], [5], [4, 5], AttentionMass(0.5), LowestCosine(0.5)], ids=str
)
def test_both_branches_are_the_judges(
    sharing: Tiny, layers: LayerPolicy, refresh: Literal["prompt", "step"], pairing: Pairing
) -> None:
    prompt, guidance = sharing.prompt(ONE_IMAGE, PICTURE), Guidance(layers=layers, refresh=refresh)
    verdict = sharing.verdict(prompt, guidance)
    errors = Rig(sharing, pairing=pairing).follow(prompt, guidance, verdict)
    assert errors.max() <= TOLERANCE
    assert verdict.gaps.min() > APART
