"""Influence: attention that, under flash attention, llama.cpp never writes down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import reference
from judge import prompt_rows
from matrix import HALF_FLASH, WIDE
from numpy.typing import NDArray
from prompts import TWO_IMAGES
from reference import F64
from support import EXACT, F32, Rig, Tiny
from tiny_llava import TinyConfig

from cmg_gguf import _core
from cmg_gguf.llama.context import ContextOptions
from cmg_gguf.prompt.segments import Prompt


def judged(tiny: Tiny, prompt: Prompt) -> F64:
    """(n_layer, n_tokens, n_image_tokens): influence on each row; 0 where there is none."""
    forward = tiny.ref.forward(prompt_rows(tiny.ref, prompt))
    influence = reference.candidate_influence(tiny.ref, forward, prompt.is_image)
    return np.nan_to_num(influence[:, :, prompt.is_image])


def observed(tiny: Tiny, prompt: Prompt, options: ContextOptions, rows: NDArray[np.int64]) -> F64:
    """(n_layer, len(rows), n_image_tokens): influence on `rows` as the patch sees it."""
    rig, slots = Rig(tiny, options), np.full(prompt.n_tokens, -1, np.int32)
    slots[rows] = np.arange(len(rows))
    rig.selections.resize(len(rows))
    rig.decode_prompt(prompt, slots)
    seen = np.zeros((tiny.model.n_layer, len(rows), prompt.n_image_tokens))
    for il in range(len(seen)):
        for slot in range(len(rows)):
            influence = rig.selections.influence(slot, il)
            seen[il, slot, : len(influence)] = influence
    return seen


FLOAT = replace(EXACT, flash_attn=True)
HALF = replace(EXACT, type_k="f16", type_v="f16")
EIGHT = replace(EXACT, type_k="q8_0")  # V can be quantised under flash attention alone
EIGHT_FLASH = replace(HALF_FLASH, type_k="q8_0", type_v="q8_0")


# An image token's weight here is 0.014 on average and at most 0.18. With a rounded cache the error
# is not in the softmax but in K, and in the hidden state that q comes from.
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (EXACT, 1e-6),
        (FLOAT, 1e-3),
        (HALF, 1e-3),
        (HALF_FLASH, 1e-3),
        (EIGHT, 8e-3),
        (EIGHT_FLASH, 8e-3),
    ],
    ids=["f32", "f32_flash", "f16", "f16_flash", "q8_0", "q8_0_flash"],
)
def test_influence_on_the_last_row_is_the_judges_in_every_layer(
    open_tiny: Callable[[TinyConfig], Tiny], arch: str, options: ContextOptions, tolerance: float
) -> None:
    tiny = open_tiny(replace(WIDE, arch=arch))  # type: ignore[arg-type]
    prompt = tiny.prompt(TWO_IMAGES, 0, 1)
    rows = np.array([prompt.n_tokens - 1])
    got, expected = observed(tiny, prompt, options, rows), judged(tiny, prompt)[:, rows]
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
    assert expected.max() > 0.1


@pytest.mark.parametrize("n_ubatch", [64, 8])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_influence_on_every_row_is_the_judges(
    request: pytest.FixtureRequest, name: str, n_ubatch: int
) -> None:
    """Image rows too: a token has no influence on itself, on earlier ones, or out of a window."""
    tiny: Tiny = request.getfixturevalue(name)
    prompt = tiny.prompt(TWO_IMAGES, 0, 1)
    rows = np.arange(int(prompt.is_image.argmax()), prompt.n_tokens)
    options = replace(EXACT, n_ubatch=n_ubatch)
    got, expected = observed(tiny, prompt, options, rows), judged(tiny, prompt)[:, rows]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got == 0.0, expected == 0.0)


# --- the formula on arrays ----------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Arguments of `attention_rows`: q (T, H, D), k (N, G, D), mask (T, N), sinks (H,) or (0,)."""

    q: F32
    k: F32
    mask: F32
    scale: float
    softcap: float = 0.0
    max_bias: float = 0.0
    sinks: F32 = field(default_factory=lambda: np.zeros(0, np.float32))

    def computed(self) -> F32:
        return _core.attention_rows(
            self.q,
            self.k,
            self.mask,
            scale=self.scale,
            softcap=self.softcap,
            max_bias=self.max_bias,
            sinks=self.sinks,
        )

    def expected(self) -> F64:
        """(T, N) by the formula, in float64."""
        n_head = self.q.shape[1]
        k = np.repeat(self.k.astype(np.float64), n_head // self.k.shape[1], axis=1)
        scores = np.einsum("thd,nhd->htn", self.q.astype(np.float64), k) * self.scale
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        slopes = alibi_slopes(n_head, self.max_bias) if self.max_bias else np.ones(n_head)
        with np.errstate(invalid="ignore"):
            scores = scores + slopes[:, None, None] * self.mask.astype(np.float64)
        if self.sinks.size:
            column = np.broadcast_to(self.sinks[:, None, None], (*scores.shape[:2], 1))
            scores = np.concatenate([scores, column], axis=2)
        return np.asarray(reference.softmax(scores).mean(axis=0)[:, : self.mask.shape[1]])


def alibi_slopes(n_head: int, max_bias: float) -> F64:
    """(n_head,): with n = the largest power of 2 up to n_head, head h < n has 2^(-max_bias (h+1)/n)
    and head n + i has 2^(-max_bias (2i+1)/2n), as `ggml_soft_max_ext` defines it."""
    n = 2 ** int(np.floor(np.log2(n_head)))
    h = np.arange(n_head)
    return np.asarray(2.0 ** (-max_bias * np.where(h < n, h + 1, h - n + 0.5) / n))


def random_attention(
    seed: int = 0,
    *,
    n_rows: int = 3,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 20,
    n_kv: int = 50,
) -> Attention:
    rng = np.random.default_rng(seed)
    mask = np.where(rng.random((n_rows, n_kv)) < 0.3, -np.inf, 0.0)
    mask[:, rng.integers(n_kv)] = 0.0
    return Attention(
        rng.standard_normal((n_rows, n_head, head_dim)).astype(np.float32) * 2,
        rng.standard_normal((n_kv, n_head_kv, head_dim)).astype(np.float32),
        mask.astype(np.float32),
        head_dim**-0.5,
    )


def agree(attention: Attention) -> None:
    got = attention.computed()
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, attention.expected(), rtol=2e-6, atol=1e-7)
    assert (got[attention.mask == -np.inf] == 0.0).all()


@pytest.mark.parametrize("n_head_kv", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [1, 15, 16, 17, 64])
def test_weights_are_the_mean_of_the_heads_softmax(n_head_kv: int, head_dim: int) -> None:
    attention = random_attention(n_head_kv=n_head_kv, head_dim=head_dim)
    agree(attention)
    np.testing.assert_allclose(attention.computed().sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("n_rows", [1, 31, 32, 33, 64, 71])
def test_rows_in_blocks_are_rows(n_rows: int) -> None:
    attention = random_attention(n_rows=n_rows)
    agree(attention)
    alone = replace(attention, q=attention.q[-1:], mask=attention.mask[-1:])
    # Another set of cells is summed in another order.
    np.testing.assert_allclose(attention.computed()[-1:], alone.computed(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap_bends_scores_before_the_mask(softcap: float) -> None:
    agree(replace(random_attention(1), softcap=softcap))


@pytest.mark.parametrize("n_head", [4, 6, 12])
@pytest.mark.parametrize("max_bias", [8.0, 3.0])
def test_alibi_multiplies_the_mask_by_each_heads_slope(n_head: int, max_bias: float) -> None:
    attention = random_attention(2, n_head=n_head)
    distance = -np.arange(attention.mask.shape[1], dtype=np.float32)[::-1]
    mask = np.where(attention.mask == 0.0, distance, attention.mask).astype(np.float32)
    agree(replace(attention, mask=mask, max_bias=max_bias))


def test_alibi_slopes_by_hand() -> None:
    assert alibi_slopes(4, 8.0).tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    np.testing.assert_allclose(alibi_slopes(6, 8.0)[4:], [2**-1, 2**-3])


def test_a_bias_in_the_mask_is_added_to_the_score() -> None:
    attention = random_attention(3)
    bias = np.random.default_rng(0).standard_normal(attention.mask.shape).astype(np.float32)
    agree(replace(attention, mask=attention.mask + bias))


def test_sinks_take_their_share_and_give_it_to_nobody() -> None:
    attention = random_attention(4)
    for value in (-30.0, 0.0, 2.0, 30.0):
        sinks = np.linspace(value - 1, value + 1, 4).astype(np.float32)
        agree(replace(attention, sinks=sinks))
    assert replace(attention, sinks=np.zeros(4, np.float32)).computed().sum(axis=1).max() < 1.0


def test_large_scores_do_not_overflow() -> None:
    attention = random_attention(5)
    agree(replace(attention, q=attention.q * 1000))


def test_softcap_alibi_and_sinks_go_together() -> None:
    sinks = np.array([0.5, -1.0, 2.0, 0.0, 1.0, 3.0], np.float32)
    attention = random_attention(6, n_head=6, n_rows=40)
    agree(replace(attention, softcap=3.0, max_bias=4.0, sinks=sinks))


@pytest.mark.parametrize(
    "changes",
    [
        {"q": np.zeros((3, 4), np.float32)},
        {"q": np.zeros((2, 4, 20), np.float32)},
        {"q": np.zeros((3, 3, 20), np.float32)},
        {"q": np.zeros((3, 4, 19), np.float32)},
        {"k": np.zeros((49, 2, 20), np.float32)},
        {"k": np.zeros((50, 0, 20), np.float32)},
        {"mask": np.zeros(50, np.float32)},
        {"sinks": np.zeros(3, np.float32)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes: dict[str, F32]) -> None:
    with pytest.raises(ValueError, match="q is "):
        replace(random_attention(), **changes).computed()  # type: ignore[arg-type]


@pytest.mark.parametrize("n_rows", [1, 40])
def test_the_number_of_threads_changes_nothing(n_rows: int) -> None:
    rng = np.random.default_rng(n_rows)
    q = rng.standard_normal((n_rows, 32, 128), np.float32)
    k = rng.standard_normal((300, 8, 128), np.float32)
    mask = np.zeros((n_rows, 300), np.float32)
    one, four = (
        _core.attention_rows(q, k, mask, scale=0.1, n_threads=n_threads) for n_threads in (1, 4)
    )
    np.testing.assert_array_equal(one, four)
