"""Combining two rows of logits: the formula, its neutral values, and what it leaves alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cmg_gguf.answer.logits import combine, divergence, gated, log_softmax
from cmg_gguf.arrays import FloatArray
from cmg_gguf.errors import GuidanceError
from cmg_gguf.guidance import Disagreement

ALPHAS = (0.0, 0.5, 1.0, 7.0, 100.0)
BETAS = (0.0, 1e-9, 0.1, 0.5, 1.0)


def rows(seed: int = 0) -> tuple[FloatArray, FloatArray]:
    original, degraded = np.random.default_rng(seed).standard_normal((2, 500)) * 4
    return original.astype(np.float32), degraded.astype(np.float32)


def probabilities(logits: FloatArray) -> FloatArray:
    return np.exp(log_softmax(logits))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beta", BETAS)
def test_the_score_is_the_original_pushed_away_from_the_degraded(alpha: float, beta: float) -> None:
    original, degraded = rows()
    score = combine(original, degraded, alpha=alpha, beta=beta)
    plausible = original >= original.max() + math.log(beta) if beta else np.ones(500, bool)
    exact = (1 + alpha) * original.astype(np.float64) - alpha * degraded.astype(np.float64)
    np.testing.assert_allclose(score[plausible], exact[plausible], rtol=1e-5, atol=1e-4)
    assert (score[~plausible] == -np.inf).all()
    assert score.dtype == np.float32


def test_zero_alpha_is_the_original_cut_at_beta() -> None:
    original, degraded = rows()
    for beta in BETAS:
        np.testing.assert_array_equal(
            combine(original, degraded, alpha=0.0, beta=beta),
            combine(original, None, alpha=5.0, beta=beta),
        )
    np.testing.assert_array_equal(combine(original, degraded, alpha=0.0, beta=0.0), original)


def test_zero_beta_cuts_nothing_and_one_leaves_the_top_token() -> None:
    original, degraded = rows()
    assert np.isfinite(combine(original, degraded, alpha=1.0, beta=0.0)).all()
    left = np.flatnonzero(np.isfinite(combine(original, degraded, alpha=1.0, beta=1.0)))
    assert left.tolist() == [original.argmax()]


def test_what_is_plausible_is_for_the_original_alone_to_say() -> None:
    original = np.array([5.0, 4.0, -5.0], np.float32)
    degraded = np.array([9.0, 4.0, -90.0], np.float32)  # the last gains most
    score = combine(original, degraded, alpha=1.0, beta=0.1)
    assert score.argmax() == 1
    assert score[2] == -np.inf


def test_log_probabilities_in_place_of_logits_give_the_same_distribution() -> None:
    original, degraded = rows()
    for alpha in ALPHAS[:4]:
        np.testing.assert_allclose(
            probabilities(combine(original, degraded, alpha=alpha, beta=0.1)),
            probabilities(
                combine(log_softmax(original), log_softmax(degraded), alpha=alpha, beta=0.1)
            ),
            atol=1e-4,
        )


def test_the_rows_given_stay_as_they_are() -> None:
    original, degraded = rows()
    kept = original.copy(), degraded.copy()
    for row in (original, degraded):
        row.flags.writeable = False
    score = combine(original, degraded, alpha=0.0, beta=0.0)
    score[:] = 0
    np.testing.assert_array_equal((original, degraded), kept)


def test_rows_of_two_vocabularies_are_refused_with_both_shapes() -> None:
    with pytest.raises(GuidanceError, match=r"\(3,\) and \(4,\)"):
        combine(np.zeros(3, np.float32), np.zeros(4, np.float32), alpha=1.0, beta=0.1)


def test_probabilities_sum_to_one_and_forbidden_tokens_have_none() -> None:
    logits = np.array([1e4, 1e4 - 1, -np.inf, -1e4], np.float32)
    logprobs = log_softmax(logits)
    assert np.exp(logprobs).sum() == pytest.approx(1.0, abs=1e-6)
    assert logprobs[2] == -np.inf
    np.testing.assert_allclose(logprobs[:2], np.log([1 / (1 + 1 / math.e), 1 / (1 + math.e)]), 1e-6)


# --- the gate ----------------------------------------------------------------------------------


def exact_divergence(first: FloatArray, second: FloatArray) -> float:
    """By the definition, in float64: H((p + q) / 2) - (H(p) + H(q)) / 2."""

    def entropy(p: FloatArray) -> float:
        return -float(sum(x * math.log(x) for x in p.tolist() if x > 0))

    p, q = ((e := np.exp(row.astype(np.float64) - row.max())) / e.sum() for row in (first, second))
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_the_divergence_is_jensen_and_shannons(seed: int, scale: float) -> None:
    original, degraded = rows(seed)
    first, second = original * np.float32(scale), degraded * np.float32(scale)
    assert divergence(first, second) == pytest.approx(exact_divergence(first, second), abs=2e-6)
    assert divergence(first, second) == pytest.approx(divergence(second, first), abs=1e-7)


def test_equal_rows_do_not_diverge_and_disjoint_ones_by_ln_2() -> None:
    original, _ = rows()
    assert divergence(original, original + np.float32(3)) == pytest.approx(0, abs=1e-6)
    apart = np.full((2, 4), -np.inf, np.float32)
    apart[0, 1] = apart[1, 2] = 5.0
    assert divergence(apart[0], apart[1]) == pytest.approx(math.log(2))


@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0, 1000.0])
def test_the_gate_is_alpha_times_the_share_of_disagreement_and_never_more(factor: float) -> None:
    original, degraded = rows()
    near = original + np.float32(0.1) * degraded
    for row in (degraded, near, original):
        share = min(1.0, factor * exact_divergence(original, row) / math.log(2))
        strength = gated(2.0, Disagreement(factor), original, row)
        assert strength == pytest.approx(2 * share, rel=1e-3, abs=2e-5 * factor)


def test_without_a_gate_alpha_is_constant_and_without_a_degraded_row_a_gate_is_closed() -> None:
    original, degraded = rows()
    assert gated(1.5, None, original, degraded) == 1.5
    assert gated(1.5, Disagreement(), original, None) == 0.0
