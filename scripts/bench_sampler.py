"""What choosing a token costs beside computing it: milliseconds of one draw, guided and plain.

    python scripts/bench_sampler.py --vocabulary 152064

Both tokens are drawn, as in an answer: the guided one, and the one that plain decoding would have
drawn. Logits are random; some tens of tokens are plausible.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from cmg_gguf import Sampling
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.sampler import Sampler

KINDS = {
    "greedy": Sampling(),
    "greedy, penalties": Sampling(repeat_penalty=1.1),
    "temperature, top-k 40": Sampling(temperature=0.8, seed=1),
    "temperature alone": Sampling(temperature=0.8, seed=1, top_k=0, top_p=1.0, min_p=0.0),
}


def measure(sampling: Sampling, n_vocab: int, beta: float, n: int) -> float:
    """Median milliseconds of n draws."""
    rng = np.random.default_rng(0)
    original = (rng.standard_normal(n_vocab) * 3).astype(np.float32)
    degraded = (original + rng.standard_normal(n_vocab)).astype(np.float32)
    model = cast(Any, SimpleNamespace(n_vocab=n_vocab))
    drawer = Sampler(cast(Model, model), sampling, alpha=1.0, beta=beta, seed=1)
    times = []
    for _ in range(n):
        started = time.perf_counter()
        drawer.prepare(original)
        drawer.draw(original, degraded)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, returns 0."""
    parser = argparse.ArgumentParser(description="What drawing a token costs.")
    parser.add_argument("--vocabulary", type=int, default=152_064)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--draws", type=int, default=100)
    args = parser.parse_args(argv)
    results = {
        name: measure(sampling, args.vocabulary, args.beta, args.draws)
        for name, sampling in KINDS.items()
    }
    for name, ms in results.items():
        print(f"{name:24s} {ms:7.3f} ms")
    print(json.dumps({**vars(args), "milliseconds": results}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
