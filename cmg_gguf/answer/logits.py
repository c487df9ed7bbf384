"""Combination of the two branches: pure functions on logits; `_core`'s sampler does the same."""

from __future__ import annotations

import math

import numpy as np

from cmg_gguf.arrays import FloatArray
from cmg_gguf.errors import GuidanceError


def combine(
    original: FloatArray, degraded: FloatArray | None, *, alpha: float, beta: float
) -> FloatArray:
    """Guided logits (n_vocab,) float32; tokens that are not plausible get -inf.

        score = l_o + alpha * (l_o - l_d),   -inf where l_o < max(l_o) + log(beta)

    original: l_o (n_vocab,) float32. degraded: l_d, or None: as if equal to l_o. alpha >= 0,
    neutral 0. beta in [0, 1], neutral 0. For fixed alpha this is the same distribution as
    contrastive decoding (arXiv 2210.15097) on log-probabilities, and as classifier-free guidance
    with scale 1 + alpha. Raises GuidanceError for rows that differ in shape.
    """
    if degraded is not None and degraded.shape != original.shape:
        raise GuidanceError(f"logits of {original.shape} and {degraded.shape} cannot be combined")
    score = original.astype(np.float32)
    if degraded is not None and alpha > 0:
        score = score + np.float32(alpha) * (original - degraded)
    if beta > 0:
        threshold = original.max() + np.float32(math.log(beta))
        score = np.where(original < threshold, np.float32(-np.inf), score)
    return score


def log_softmax(logits: FloatArray) -> FloatArray:
    """Log-probabilities (n_vocab,) float32, computed in float64; -inf stays -inf."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return (shifted - math.log(float(np.exp(shifted).sum()))).astype(np.float32)
