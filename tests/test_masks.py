"""Masks of the patch: no more of them than there are different ones, and each where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
from judge import prompt_rows
from plans import N_IMAGE, N_LAYER, Row, decode, part, plan
from prompts import ONE_IMAGE, PICTURE, PICTURES, TWO_IMAGES
from support import TOLERANCE, Rig, Tiny, logits

from cmg_gguf.guidance import Guidance, Refresh, TopRatio


def n_sets(rig: Rig) -> int:
    """How many different sets of image tokens the newest row hides, over all masked layers."""
    return len({tuple(tokens.tolist()) for tokens in rig.engine.attended} - {()})


@pytest.mark.parametrize("refresh", ["step", "prompt"])
def test_layers_that_hide_the_same_share_one_mask(llama: Tiny, refresh: Refresh) -> None:
    rig, prompt = Rig(llama), llama.prompt(TWO_IMAGES, *PICTURES)
    patch = rig.contexts[0].patch
    guidance = Guidance(tokens=TopRatio(1.0), layers=range(N_LAYER), refresh=refresh)
    rig.engine.prefill(prompt, guidance)
    n_segments = 2  # of text behind an image token
    assert patch.n_masks == n_segments
    for i, token in enumerate((300, 301, 302), 1):
        rig.engine.step(token)
        assert (len(rig.engine.attended), n_sets(rig)) == (N_LAYER, 1)
        assert patch.n_masks == n_segments + i


def test_layers_that_hide_other_tokens_have_masks_of_their_own(llama: Tiny) -> None:
    rig, prompt = Rig(llama), llama.prompt(ONE_IMAGE, PICTURE)
    patch = rig.contexts[0].patch
    rig.engine.prefill(prompt, Guidance(tokens=TopRatio(0.3), layers=range(N_LAYER)))
    for token in (300, 301, 302):
        before = patch.n_masks
        rig.engine.step(token)
        assert patch.n_masks - before == n_sets(rig) > 1


def test_behind_a_sliding_window_layers_share_two_masks(gemma: Tiny) -> None:
    rig, prompt = Rig(gemma), gemma.prompt(TWO_IMAGES, *PICTURES)
    patch = rig.contexts[0].patch
    rig.engine.prefill(prompt, Guidance(tokens=TopRatio(1.0), layers=range(N_LAYER)))
    for token in (300, 301, 302):
        before = patch.n_masks
        rig.engine.step(token)
        assert patch.n_masks - before == n_sets(rig) == 2


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_layer_shares_only_what_is_its_own_too(name: str, request: pytest.FixtureRequest) -> None:
    """Rows hide the same in some layers and not in others, in any order of them."""
    tiny: Tiny = request.getfixturevalue(name)
    rig, prompt, ref = Rig(tiny, n_seq_max=3), tiny.prompt(ONE_IMAGE, PICTURE), tiny.ref
    context, n = rig.contexts[0], rig.decode_prompt(prompt)
    hidden = [
        [[1, 2], [1, 2], [3], [1, 2], [3], [1, 2]],
        [[4], [4], [4], [5, 6], [4], []],
    ]
    rig.selections.resize(2)
    for row, layers in enumerate(hidden):
        context.share(0, 1 + row, n)
        context.patch.copy_image_tokens(0, 1 + row, N_IMAGE)
        for il, tokens in enumerate(layers):
            rig.selections.set_tokens(row, il, np.array(tokens, np.int32))
    rows = [Row(1, 0, mask=0), Row(2, 0, mask=1)]
    before = context.patch.n_masks
    shared = part(rig.selections, mask=range(N_LAYER))
    decode(context, [(300, n, 1), (300, n, 2)], plan(rows, shared))
    # 0 and 1 hide the same, and 2 and 4, of which 2 has no window; 3 and 5 differ in one row.
    assert context.patch.n_masks - before == (5 if ref.hyper.arch == "gemma3" else 4)
    image = np.flatnonzero(prompt.is_image)
    inputs = np.concatenate([prompt_rows(ref, prompt), ref.embed([300])])
    for row, layers in enumerate(hidden):
        blocked = np.zeros((N_LAYER, len(inputs), len(inputs)), np.bool_)
        for il, tokens in enumerate(layers):
            blocked[il, -1, image[tokens]] = True
        expected = ref.forward(inputs, blocked).logits[-1]
        np.testing.assert_allclose(logits(context, row), expected, rtol=0, atol=TOLERANCE)
