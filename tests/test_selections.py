"""What rows picked, kept by slot and layer: given back as it was set, and small."""

from __future__ import annotations

import numpy as np
import pytest
from prompts import ONE_IMAGE, PICTURE
from support import Rig, Tiny
from tiny_llava import TinyConfig

from cmg_gguf import _core

N_LAYER = TinyConfig().n_layer
N_IMAGE = TinyConfig().n_image_tokens
NONE = -1


def test_selections_know_their_slots_and_layers() -> None:
    selections = _core.Selections(N_LAYER)
    selections.resize(2)
    selections.set_tokens(1, 5, np.array([3, 4], np.int32))
    assert len(selections) == 2
    assert selections.tokens(1, 5).tolist() == [3, 4]
    assert selections.tokens(0, 5).tolist() == []
    for slot, il in ((2, 0), (-1, 0), (0, N_LAYER), (0, -1)):
        for read in (selections.tokens, selections.influence):
            with pytest.raises(IndexError):
                read(slot, il)


def test_selections_give_back_what_was_set_in_ascending_order() -> None:
    selections, random = _core.Selections(3), np.random.default_rng(0)
    selections.resize(5)
    expected: dict[tuple[int, int], list[int]] = {}
    for n_tokens in (1, 63, 64, 65, 576, 577, 130):
        for slot in random.permutation(5).tolist():
            il = int(random.integers(3))
            tokens = np.flatnonzero(random.random(n_tokens) < 0.5).astype(np.int32)
            selections.set_tokens(slot, il, random.permutation(tokens))
            expected[slot, il] = tokens.tolist()
            for s in range(5):
                for layer in range(3):
                    found = selections.tokens(s, layer)
                    assert found.dtype == np.int32
                    assert found.tolist() == expected.get((s, layer), [])


def test_an_image_token_below_0_is_refused() -> None:
    selections = _core.Selections(N_LAYER)
    selections.resize(1)
    selections.set_tokens(0, 0, np.array([5], np.int32))
    with pytest.raises(ValueError, match="image token -1 does not exist"):
        selections.set_tokens(0, 0, np.array([2, -1], np.int32))
    assert selections.tokens(0, 0).tolist() == [5]


def test_slots_that_are_added_are_empty_and_the_others_stay() -> None:
    selections, tokens = _core.Selections(2), np.array([0, 64, 575], np.int32)
    selections.resize(2)
    selections.set_tokens(1, 1, tokens)
    selections.grow(4)
    selections.grow(3)
    assert len(selections) == 4
    assert [selections.tokens(slot, 1).tolist() for slot in range(4)] == [[], [0, 64, 575], [], []]
    selections.set_tokens(3, 1, tokens[1:])
    assert selections.tokens(1, 1).tolist() == [0, 64, 575]
    selections.keep_last()
    assert len(selections) == 1
    assert [selections.tokens(0, il).tolist() for il in range(2)] == [[], [64, 575]]
    selections.resize(2)
    assert [selections.tokens(slot, 1).tolist() for slot in range(2)] == [[], []]


@pytest.mark.parametrize("shrink", ["resize", "keep_last"])
def test_selections_take_a_bit_a_token_and_only_while_they_are_there(shrink: str) -> None:
    n_rows, n_layer, n_tokens, overhead = 3000, 32, 576, 10_000
    selections, observed = _core.Selections(n_layer), range(11, 32)
    selections.resize(n_rows)
    assert selections.n_bytes < overhead
    for slot in range(n_rows):
        for il in observed:
            selections.set_tokens(slot, il, np.array([slot % n_tokens, n_tokens - 1], np.int32))
    bits = n_rows * len(observed) * n_tokens // 8
    assert bits <= selections.n_bytes <= bits + overhead
    if shrink == "resize":
        selections.resize(1)
        assert selections.n_bytes < overhead
    else:
        selections.keep_last()
        assert selections.n_bytes < overhead + len(observed) * n_tokens // 8
        assert selections.tokens(0, 20).tolist() == [(n_rows - 1) % n_tokens, n_tokens - 1]


def test_influence_is_kept_through_what_drops_the_other_slots(llama: Tiny) -> None:
    rig, prompt = Rig(llama), llama.prompt(ONE_IMAGE, PICTURE)
    rig.selections.resize(3)
    slots = np.full(prompt.n_tokens, NONE, np.int32)
    slots[-1] = 2
    rig.decode_prompt(prompt, slots)
    kept = [rig.selections.influence(2, il).tolist() for il in range(N_LAYER)]
    assert all(len(influence) == N_IMAGE and min(influence) > 0 for influence in kept)
    assert rig.selections.influence(1, 0).tolist() == []
    rig.selections.keep_last()
    assert [rig.selections.influence(0, il).tolist() for il in range(N_LAYER)] == kept
    rig.selections.resize(3)
    assert rig.selections.influence(2, 0).tolist() == []
