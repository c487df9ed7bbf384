"""A small benchmark for devices: milliseconds a token of the built-in pair, by the way of stepping.

    python scripts/bench_device.py --ngl 99
    python scripts/bench_device.py | tail -n 1 | jq

One caption of one drawn scene, asked as often as there are rounds; the fewest milliseconds count. A
table on stdout, and one JSON object as its last line. "left out" are rows that a fork did not
compute below the first masked layer: 0 where nothing forks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cmg_gguf import Guidance, GuidedVLM, Reply
from cmg_gguf.guidance import PLAIN
from cmg_gguf.llama.about import devices
from cmg_gguf.tiny.pair import embedded_pair
from cmg_gguf.tiny.scenes import draw, make_scene
from cmg_gguf.tiny.scenes.texts import CAPTION_PROMPTS

GUIDED = Guidance(alpha=1.0, beta=0.1)
WAYS: dict[str, tuple[dict[str, Any], Guidance]] = {
    "plain": ({}, PLAIN),
    "exact": ({"strategy": "exact"}, GUIDED),
    "auto": ({"strategy": "auto"}, GUIDED),
    "contexts": ({"pairing": "contexts"}, GUIDED),
}


def measure(options: dict[str, Any], guidance: Guidance, rounds: int, n_tokens: int) -> Any:
    """{"ms", "left_out", "text"} of the fastest of the answers."""
    scene = draw(make_scene("test", 0))
    with GuidedVLM(*embedded_pair(), n_ctx=1024, prefix_cells=0, n_parallel=1, **options) as vlm:
        replies: list[Reply] = [
            vlm.generate(CAPTION_PROMPTS["plain"], [scene], guidance=guidance, max_tokens=n_tokens)
            for _ in range(rounds)
        ]
        left_out = vlm.engine.lanes[0].original.context.patch.n_left_out
    seconds = min(reply.seconds.decode / max(1, len(reply.tokens)) for reply in replies)
    return {"ms": round(1e3 * seconds, 2), "left_out": left_out, "text": replies[0].text}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, returns 0."""
    parser = argparse.ArgumentParser(description="Milliseconds a token on a device.")
    parser.add_argument("--ngl", type=int, default=-1, help="layers on the device; -1 = all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24, help="of each answer, at most")
    parser.add_argument("--flash-attn", action="store_true")
    args = parser.parse_args(argv)
    shape = {"n_gpu_layers": args.ngl, "flash_attn": args.flash_attn}
    table = Table("way", "ms a token", "ratio", "left out")
    rows = {}
    for name, (options, guidance) in WAYS.items():
        rows[name] = measure({**shape, **options}, guidance, args.rounds, args.tokens)
        rows[name]["ratio"] = round(rows[name]["ms"] / rows["plain"]["ms"], 2)
        table.add_row(name, *(str(rows[name][key]) for key in ("ms", "ratio", "left_out")))
    Console().print(table)
    names = [device.name for device in devices()]
    print(json.dumps({"devices": names, "n_gpu_layers": args.ngl, "ways": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
