"""Whether the built-in model looks at an object when it names it: heat maps against drawn truth.

    python scripts/measure_heat.py                            # tune split, 300 scenes a kind
    python scripts/measure_heat.py --split test --scenes 1000

A Markdown table on stdout, and one JSON object as its last line for programs; progress is on
stderr. Every scene is captioned plainly and under the model's own guidance. Each first mention of
an object that is in the picture exactly once counts: does the object's own box hold at least twice
its area's share of the map at the word? A map is the mean of a model's layers. It is relative (to
the mean of all the answer's tokens) or absolute, of the row that the word was drawn from, or of the
word's own row. Two controls on the same map: boxes of the other objects in the picture, and chance,
a box of the same size at any place, all places alike. Intervals are 95 %, a bootstrap over scenes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from cmg_gguf import Guidance, GuidedVLM, PromptError, Reply, Request
from cmg_gguf.guidance import PLAIN
from cmg_gguf.heat.maps import Layers, tokens_of
from cmg_gguf.tiny.pair import embedded_guidance, embedded_pair
from cmg_gguf.tiny.scenes import Scene, Thing, draw, make_scene
from cmg_gguf.tiny.scenes.texts import CAPTION_PROMPTS

TWICE = 2.0
N_BOOTSTRAP = 2000
CAPTION_TOKENS = 96
MAPS: dict[str, tuple[Layers, bool, int]] = {
    "relative": ("mean", True, 0),
    "absolute": ("mean", False, 0),
    "relative, the word's own row": ("mean", True, 1),
}
"""Layers, relative or not, and how many rows behind the one that the word was drawn from."""


@dataclass(frozen=True)
class Mention:
    """hit: 1 where the object's box holds twice its share. others: how many other objects' boxes
    do, of n_others. chance: the share of all places where a box of that size would."""

    scene: int
    hit: float
    others: float
    n_others: int
    chance: float


def mentions(scene: Scene, number: int, reply: Reply, name: str) -> Iterator[Mention]:
    """Of one answer and one kind of map."""
    layer, relative, behind = MAPS[name]
    assert reply.heat is not None
    for thing in scene.things:
        if scene.only(thing.name) is None:
            continue
        try:
            tokens = tokens_of(reply, thing.name)[0]
        except PromptError:
            continue
        last = reply.heat.n_tokens - 1
        rows = [min(token + behind, last) for token in tokens]
        found = reply.heat.map(0, rows, layer=layer, relative=relative)
        hit, chance = scored(found, thing)
        others = [scored(found, other)[0] for other in scene.things if other is not thing]
        yield Mention(number, hit, sum(others), len(others), chance)


def scored(found: NDArray[np.float64], thing: Thing) -> tuple[float, float]:
    """1 if a thing's box holds twice its area's share of a map, else 0; and the same on average of
    a box of that size."""
    height, width = found.shape
    left, top = max(0, thing.x), max(0, thing.y)
    right, bottom = min(width, thing.x + thing.size), min(height, thing.y + thing.size)
    held = box_sums(found, right - left, bottom - top) / found.sum()
    hits = held >= TWICE * (right - left) * (bottom - top) / found.size
    return float(hits[top, left]), float(hits.mean())


def box_sums(values: NDArray[np.float64], width: int, height: int) -> NDArray[np.float64]:
    """What boxes of a size hold, by their top left corner."""
    total = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return np.asarray(
        total[height:, width:]
        - total[:-height, width:]
        - total[height:, :-width]
        + total[:-height, :-width]
    )


def summary(found: Sequence[Mention]) -> dict[str, float]:
    scenes, of_scene = np.unique([m.scene for m in found], return_inverse=True)
    hits, counts = (
        np.bincount(of_scene, weights) for weights in ([m.hit for m in found], np.ones(len(found)))
    )
    drawn = np.random.default_rng(0).integers(0, len(scenes), (N_BOOTSTRAP, len(scenes)))
    shares = hits[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(100 * shares, [2.5, 97.5])
    return {
        "n": len(found),
        "share": 100 * hits.sum() / counts.sum(),
        "low": float(low),
        "high": float(high),
        "others": 100 * sum(m.others for m in found) / sum(m.n_others for m in found),
        "chance": 100 * sum(m.chance for m in found) / len(found),
    }


def measured(
    vlm: GuidedVLM, split: str, kind: str, guidance: Guidance, n: int
) -> dict[str, object]:
    found: dict[str, list[Mention]] = {name: [] for name in MAPS}
    make = partial(make_scene, split, kind=kind)  # type: ignore[arg-type]
    ask = partial(Request, guidance=guidance, heat=True, max_tokens=CAPTION_TOKENS)
    requests = (ask(CAPTION_PROMPTS["plain"], [draw(make(i))]) for i in range(n))
    outcomes = track(vlm.generate_many(requests), kind, total=n, console=Console(stderr=True))
    for outcome in outcomes:
        if outcome.reply is None:
            raise SystemExit(f"scene {outcome.index}: {outcome.error}")
        for name, of_map in found.items():
            of_map += mentions(make(outcome.index), outcome.index, outcome.reply, name)
    return {name: summary(of_map) for name, of_map in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--split", choices=("tune", "test"), default="tune")
    parser.add_argument("--scenes", type=int, default=300, help="of each kind")
    given = parser.parse_args()
    results: dict[str, dict[str, dict[str, object]]] = {}
    print("| scenes | answers | map | twice its share, % | other objects, % | chance, % | n |")
    print("|---|---|---|---|---|---|---|")
    with GuidedVLM(*embedded_pair(), n_ctx=2048) as vlm:
        for kind in ("counter", "typical"):
            for name, guidance in (("plain", PLAIN), ("guided", embedded_guidance())):
                found = measured(vlm, given.split, kind, guidance, given.scenes)
                results.setdefault(kind, {})[name] = found
                for map_name, of in found.items():
                    assert isinstance(of, dict)
                    print(
                        f"| {kind} | {name} | {map_name} | {of['share']:.1f} "
                        f"[{of['low']:.1f}, {of['high']:.1f}] | {of['others']:.1f} "
                        f"| {of['chance']:.1f} | {of['n']} |",
                        flush=True,
                    )
    print(json.dumps({"split": given.split, "scenes": given.scenes, "results": results}))


if __name__ == "__main__":
    main()
