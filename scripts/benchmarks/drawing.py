"""What drawing a token under guidance costs besides the model: combination, cut, sampler chain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.ratios import Middle, milliseconds
from cmg_gguf.arrays import FloatArray
from cmg_gguf.llama.sampler import Sampler
from cmg_gguf.sampling import Sampling

N_VOCAB = 152_000
"""As many tokens as the largest vocabularies in use have."""


def measure_drawing(n_vocab: int = N_VOCAB, n_runs: int = 200) -> Middle:
    """Milliseconds of drawing one token greedily from two rows of logits, guided and plain."""
    model: Any = SimpleNamespace(n_vocab=n_vocab, vocab=None)
    sampler = Sampler(model, Sampling(), alpha=1.0, beta=0.1, seed=0)
    rng = np.random.default_rng(0)
    # Other rows each time: what a step has just computed is not in the nearest cache either.
    rows = rng.normal(0, 3, (8, 2, n_vocab)).astype(np.float32)

    def draw(original: FloatArray, degraded: FloatArray) -> None:
        sampler.prepare(original)
        sampler.draw(original, degraded)

    def timed(original: FloatArray, degraded: FloatArray) -> float:
        return milliseconds(lambda: draw(original, degraded))

    runs = [timed(*rows[i % len(rows)]) for i in range(n_runs + len(rows))]
    return Middle.of(runs[len(rows) :])
