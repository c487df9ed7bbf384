"""What evidence costs: a caption with it against one without, on random weights of 1.1 billion
parameters, by turns in one process.

    python scripts/bench_evidence.py                # plain, Q4_0, 64 tokens: told at the end
    python scripts/bench_evidence.py --live         # guided by `BLIND`: told with each chunk

Seconds of the CPU, not of the clock, so that what else the machine does hardly counts; with one
thread. A table for people on stdout, and one JSON object as its last line for programs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import get_args

from benchmark_model import cache_folder
from benchmarks.quantized import BenchQuant
from benchmarks.subjects import Subject, pictures, random_subject
from rich.console import Console
from rich.table import Table

from cmg_gguf import Guidance, GuidedVLM
from cmg_gguf.guidance import BLIND, PLAIN


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, returns 0."""
    parser = argparse.ArgumentParser(description="What evidence costs.")
    parser.add_argument("--quant", choices=get_args(BenchQuant), default="q4_0")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--live", action="store_true", help="evidence in every chunk")
    options = parser.parse_args(argv)
    subject = random_subject(cache_folder(), options.quant)
    found = measure(subject, options.tokens, options.rounds, BLIND if options.live else PLAIN)
    table = Table("", "without", "with", "ratio", box=None, title="CPU seconds, medians")
    for name in ("request", "answer alone"):
        without, with_evidence, ratios = found[name]
        table.add_row(name, f"{without:.2f}", f"{with_evidence:.2f}", told(ratios))
    Console(highlight=False).print(table)
    print(json.dumps(found))
    return 0


def measure(
    subject: Subject, n_tokens: int, n_rounds: int, guidance: Guidance
) -> dict[str, tuple[float, float, list[float]]]:
    """Medians without and with evidence, and the ratio of each round; of whole requests, picture
    and prompt included, and of what is behind the prompt. The first round does not count."""
    times: dict[tuple[str, bool], list[float]] = {}
    (picture,) = pictures(subject, 1)
    with GuidedVLM(*subject.pair, n_ctx=2048, n_gpu_layers=0, n_threads=1) as vlm:
        for i in range(n_rounds + 1):
            for evidence in (False, True) if i % 2 else (True, False):
                whole, prompt = timed(vlm, subject, picture, n_tokens, guidance, evidence=evidence)
                if i > 0:
                    times.setdefault(("request", evidence), []).append(whole)
                    times.setdefault(("answer alone", evidence), []).append(whole - prompt)
    return {
        name: (
            median(times[name, False]),
            median(times[name, True]),
            [b / a for a, b in zip(times[name, False], times[name, True], strict=True)],
        )
        for name in ("request", "answer alone")
    }


def timed(
    vlm: GuidedVLM,
    subject: Subject,
    picture: object,
    n_tokens: int,
    guidance: Guidance,
    *,
    evidence: bool,
) -> tuple[float, float]:
    """CPU seconds of a request, and of its part before the first token."""
    vlm.forget()
    started = time.process_time()
    stream = vlm.stream(
        subject.messages(pixels=picture),  # type: ignore[arg-type]
        guidance=guidance,
        max_tokens=n_tokens,
        evidence=evidence,
    )
    first = 0.0
    is_told = False
    for piece in stream:
        first = first or time.process_time()
        is_told |= any(token.evidence is not None for token in piece.tokens)
    ended = time.process_time()
    assert is_told == (evidence and guidance == BLIND)
    assert len(stream.reply.tokens) == n_tokens
    return ended - started, first - started


def told(ratios: Sequence[float]) -> str:
    """The median, and the least and greatest."""
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(main())
