"""Controls that cost nothing: logits of earlier steps of the same answer steer the later ones.

There is no second branch. Both are greedy, score tokens with l_t >= max(l_t) + log(beta) alone, and
leave the first token as it is. They are the published ideas, not the authors' code.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.evaluation.method import Method, Question
from cmg_gguf.request import Request


@dataclass(frozen=True)
class FirstLogit(Method):
    """First-logit boosting (arXiv 2604.00455): the first step's logits, with a weight that grows.

        score = l_t + alpha * gamma * (1 - exp(-decay * t)) * l_0     t = 0 at the first token

    Published: gamma 0.3, decay 0.05, beta 0.1, drawn by sampling; alpha 1 is that strength.
    """

    alpha: float = 1.0
    beta: float = 0.1
    gamma: float = 0.3
    decay: float = 0.05
    name: str = "first-logit"

    def request(self, question: Question) -> Request:
        return question.ask(logits_processors=(_First(self),))

    def weight(self, n_said: int) -> float:
        """Of l_0, in the draw behind `n_said` tokens."""
        return -self.alpha * self.gamma * math.expm1(-self.decay * n_said)


@dataclass(frozen=True)
class Residual(Method):
    """Residual decoding (arXiv 2602.01047): earlier steps' logits, the surer the heavier.

        score = (l_t + alpha * r_t) / (1 + alpha)
        r_t   = sum C_i l_i / sum C_i        over the steps i from the bottom of the U to t - 1
        C_i   = -mean over the candidates of log p_i
        bottom: the step whose distribution over the candidates is closest (Jensen-Shannon) to that
                of the step before it; among the last `window` steps

    The candidates are the likeliest tokens at step t. Published: weights 1/2 and 1/2, which is
    alpha 1; beta 0.1; 64 to 512 candidates. Ours, for the text is not known to us in full: the
    window's length, and that the U begins right at its bottom.
    """

    alpha: float = 1.0
    beta: float = 0.1
    window: int = 32
    candidates: int = 128
    name: str = "residual"

    def request(self, question: Question) -> Request:
        return question.ask(logits_processors=(_Residual(self),))


@dataclass(eq=False)
class _First:
    """Of one answer: what it has to remember."""

    method: FirstLogit
    first: FloatArray | None = None

    def __call__(self, tokens: IntArray, logits: FloatArray) -> FloatArray:
        if self.first is None:
            self.first = logits.copy()
            return logits
        weight = np.float32(self.method.weight(len(tokens)))
        return _cut(logits + weight * self.first, logits, self.method.beta)


@dataclass(eq=False)
class _Residual:
    """Of one answer. steps: the last `window` rows of logits, each less its log-sum-exp."""

    method: Residual
    steps: deque[FloatArray] = field(default_factory=deque)

    def __call__(self, tokens: IntArray, logits: FloatArray) -> FloatArray:
        score = logits
        if self.steps:
            added = np.float32(self.method.alpha) * self._residual(logits)
            score = (logits + added) / np.float32(1 + self.method.alpha)
            score = _cut(score, logits, self.method.beta)
        self.steps.append(logits - np.float32(_log_sum_exp(logits)))
        if len(self.steps) > self.method.window:
            self.steps.popleft()
        return score

    def _residual(self, logits: FloatArray) -> FloatArray:
        """r_t, but for a constant; (n_vocab,) float32."""
        n = min(self.method.candidates, len(logits))
        candidates = np.argpartition(-logits, n - 1)[:n]
        log_p = np.array([step[candidates] for step in self.steps], np.float64)
        start = 0
        if len(log_p) > 1:
            start = 1 + int(np.argmin(_divergences(log_p)))
        weights = -log_p[start:].mean(axis=1)
        weights /= weights.sum()
        steps = np.stack(list(self.steps)[start:])
        residual: FloatArray = weights.astype(np.float32) @ steps
        return residual


def _divergences(log_p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Jensen-Shannon divergences in nats of neighbouring rows' distributions: (n - 1,) of (n, m)
    log-probabilities up to a constant a row."""
    p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    both = (p[1:] + p[:-1]) / 2
    found: NDArray[np.float64] = _entropies(both) - (_entropies(p[1:]) + _entropies(p[:-1])) / 2
    return found


def _entropies(p: NDArray[np.float64]) -> NDArray[np.float64]:
    logs = np.log(p, where=p > 0, out=np.zeros_like(p))
    found: NDArray[np.float64] = -(p * logs).sum(axis=1)
    return found


def _log_sum_exp(logits: FloatArray) -> float:
    most = float(logits.max())
    return most + math.log(float(np.exp(logits - most).sum(dtype=np.float64)))


def _cut(score: FloatArray, logits: FloatArray, beta: float) -> FloatArray:
    """The score where `logits` are plausible, -inf elsewhere; beta 0 cuts nothing."""
    if beta == 0:
        return score
    threshold = logits.max() + np.float32(math.log(beta))
    cut: FloatArray = np.where(logits < threshold, np.float32(-np.inf), score)
    return cut
