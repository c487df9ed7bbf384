"""Combination of the two branches: pure functions on logits; `_core`'s sampler does the same."""

from __future__ import annotations

import math

import numpy as np

from cmg_gguf.arrays import FloatArray
from cmg_gguf.errors import GuidanceError
from cmg_gguf.guidance import Disagreement


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


def gated(
    alpha: float, gate: Disagreement | None, original: FloatArray, degraded: FloatArray | None
) -> float:
    """The strength at one token: alpha * min(1, factor * JSD(p_o, p_d) / ln 2); alpha without gate.

    original, degraded: l_o and l_d (n_vocab,) float32; None = as if equal, which a gate makes 0.
    """
    if gate is None or alpha == 0:
        return alpha
    jsd = 0.0 if degraded is None else divergence(original, degraded)
    return alpha * min(1.0, gate.factor * jsd / math.log(2))


def divergence(first: FloatArray, second: FloatArray) -> float:
    """Jensen-Shannon divergence in nats, 0 to ln 2, of two rows' distributions (n_vocab,) float32.

        JSD = H(m) - (H(p) + H(q)) / 2,   m = (p + q) / 2
            = (sum p log(p/m) + sum q log(q/m)) / 2

    (Lin 1991.) The second form: terms in float32, summed in float64.
    """
    p, q = _softmax(first), _softmax(second)
    both = p + q
    total = 0.0
    for own in (p, q):
        ratio = np.divide(2 * own, both, where=own > 0, out=np.ones_like(own))
        total += float((own * np.log(ratio)).sum(dtype=np.float64))
    return min(max(total / 2, 0.0), math.log(2))


def entropy(logits: FloatArray) -> float:
    """Entropy in nats, 0 to log n_vocab, of the distribution of a row (n_vocab,) float32; in
    float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    powers = np.exp(shifted)
    total = float(powers.sum())
    expected = float(np.where(powers > 0, powers * np.maximum(shifted, -1e9), 0.0).sum())
    return max(math.log(total) - expected / total, 0.0)


def log_softmax(logits: FloatArray) -> FloatArray:
    """Log-probabilities (n_vocab,) float32, computed in float64; -inf stays -inf."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return (shifted - math.log(float(np.exp(shifted).sum()))).astype(np.float32)


def _softmax(logits: FloatArray) -> FloatArray:
    powers = np.exp(logits - logits.max())
    total = np.float32(powers.sum(dtype=np.float64))
    probabilities: FloatArray = powers / total
    return probabilities
