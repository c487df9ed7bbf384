"""How often the same request and seed give another answer where its prompt is kept.

    python scripts/measure_repetition.py            # the built-in model in Q8_0
    python scripts/measure_repetition.py -n 50

Drawn scenes, captions drawn at temperature 1. Each request is made three times with one seed: with
nothing kept, with its prompt kept, and twice with `repeatable=True`, prompts kept before. Shown are
how many answers of the second are not those of the first, how far the scores of the first token
are apart, and how many of the repeatable ones differ. A table for people on stdout, and one JSON
object as its last line for programs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cmg_gguf import GuidedVLM, Reply, Request, Sampling
from cmg_gguf.evaluation.tasks.scenes import SceneCaptions
from cmg_gguf.tiny.pair import embedded_guidance, embedded_pair


def apart(first: Reply, second: Reply) -> float:
    """The largest difference of two answers' scores at the first token, where both are finite."""
    a, b = (reply.scores[0].astype(np.float64) for reply in (first, second))
    known = np.isfinite(a) & np.isfinite(b)
    return float(np.abs(a - b)[known].max())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-n", type=int, default=150, help="scenes")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    task = SceneCaptions("tune", "counter", args.n)
    gaps, others, unlike = [], 0, 0
    with GuidedVLM(*embedded_pair(), n_threads=args.threads, n_gpu_layers=0) as vlm:
        items = list(task.items())
        for seed, item in enumerate(track(items, console=Console(stderr=True))):
            request = Request(
                item.prompt,
                [task.load(item)],
                guidance=embedded_guidance(),
                max_tokens=item.max_tokens,
                sampling=Sampling(temperature=1.0, seed=seed),
                n_scores=1,
            )
            vlm.forget()
            whole, kept = vlm.generate(request), vlm.generate(request)
            assert kept.n_reused_tokens > whole.n_reused_tokens == 0
            gaps.append(apart(whole, kept))
            others += whole.text != kept.text
            again = [vlm.generate(replace(request, repeatable=True)) for _ in range(2)]
            unlike += again[0].text != again[1].text
    table = Table("of", "answers that differ", "first scores apart, at most")
    table.add_row(f"{len(gaps)}, whole and kept", str(others), f"{max(gaps):.2g}")
    table.add_row(f"{len(gaps)}, repeatable, twice", str(unlike), "")
    Console().print(table)
    found = {"n": len(gaps), "differ": others, "repeatable_differ": unlike, "apart": max(gaps)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
