"""Combining two rows of logits: the formula, its neutral values, and what it leaves alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cmg_gguf.answer.logits import combine, log_softmax
from cmg_gguf.arrays import FloatArray
from cmg_gguf.errors import GuidanceError

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
