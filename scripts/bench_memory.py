"""What memory a guided answer takes, by settings: for boards of a few gigabytes. Linux only.

    python scripts/bench_memory.py         # a random LLaVA of 1.1 billion parameters, Q4_0

A table for people on stdout, and one JSON object as its last line for programs. Each row is a
process of its own that opens the pair, answers one question about a picture of 576 tokens in 64
tokens, guided, and reads from /proc what it holds: its peak, and at the end the part that is its
own and the part that are pages of files, which the system may take back and read again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_model import benchmark_pair, cache_folder
from rich.console import Console
from rich.table import Table

from cmg_gguf import Guidance, GuidedVLM

N_TOKENS, SIDE = 64, 336
BOARD: dict[str, Any] = {"n_ctx": 1024, "n_parallel": 1, "image_cache_bytes": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "for a board": BOARD,
    "the same, n_ubatch=128": {**BOARD, "n_ubatch": 128},
    "the same, weights read (use_mmap=False)": {**BOARD, "use_mmap": False},
}
FIELDS = {"VmHWM": "peak", "RssAnon": "own", "RssFile": "files"}


def status() -> dict[str, float]:
    """{"peak", "own", "files"}: this process, MiB."""
    text = Path("/proc/self/status").read_text("ascii")
    return {
        name: int(re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)[1]) / 1024  # type: ignore[index]
        for field, name in FIELDS.items()
    }


def measure(settings: dict[str, Any]) -> None:
    """Answers once with these settings and prints what this process then holds, as JSON."""
    imported = status()["peak"]
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    with GuidedVLM(*benchmark_pair(cache_folder(), "q4_0"), **settings) as vlm:
        reply = vlm.generate("w1 w2 w3", [picture], guidance=Guidance(), max_tokens=N_TOKENS)
        found = status()
    n_tokens = len(reply.tokens)
    print(json.dumps({**settings, "imported": imported, **found, "tokens": n_tokens}))


def main() -> None:
    rows = {}
    for name, settings in SETTINGS.items():
        command = [sys.executable, __file__, json.dumps(settings)]
        rows[name] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    table = Table("MiB", "peak", "its own", "pages of files", "tokens", title="One guided answer")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.0f}" for key in ("peak", "own", "files", "tokens")))
    Console().print(table)
    llm = benchmark_pair(cache_folder(), "q4_0").llm
    print(json.dumps({"model_bytes": llm.stat().st_size, "rows": rows}))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        measure(json.loads(sys.argv[1]))
    else:
        main()
