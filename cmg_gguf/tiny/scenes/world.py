"""Scenes as pure functions of a seed: which objects are there, where, and how well one sees them.

    scene = make_scene("test", 7, "counter")
    scene.names            # {"fork", "tree"}: what is in the picture, however faint
    pixels = draw(scene)   # cmg_gguf.tiny.scenes.drawing

Two kinds. "typical": objects come as they do in training, in pairs that belong to the place.
"counter": the same pictures, but objects independent of the place and of each other, so that
expectation is a bad guide. "strong" is for text alone: pairs are all but always complete.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cmg_gguf.tiny.scenes.catalogue import COLOURS, KINDS, OBJECTS, PLACES, SIDES

Split = Literal["train", "tune", "test"]
SceneKind = Literal["typical", "counter", "strong"]
Sight = Literal["clear", "faint", "tiny"]

IMAGE_SIZE = 112
MAX_THINGS = 6
_SPLIT_SEEDS: dict[Split, int] = {"train": 11, "tune": 777, "test": 888}
_KIND_SEEDS: dict[SceneKind, int] = {"typical": 0, "counter": 1, "strong": 2}

P_ANCHOR = 0.65
P_PARTNER: dict[SceneKind, tuple[float, float]] = {"typical": (0.85, 0.1), "strong": (0.97, 0.03)}
"""Chance of the partner with and without its anchor."""
P_STRANGER = {"typical": 0.02, "strong": 0.0}
"""Chance of each object that does not belong to the place."""
P_DOUBLE = 0.1
P_TYPICAL_COLOUR = 0.7
P_FAINT, P_TINY = 0.14, 0.1
_MARGIN = 4  # pixels between an object's centre and the border of left, middle and right


@dataclass(frozen=True)
class Thing:
    """One object. x, y: top left corner; size: edge of its square, all in pixels.

    opacity: 0 to 1. angle: degrees, counterclockwise. mirrored: left and right swapped.
    """

    name: str
    colour: str
    sight: Sight
    x: int
    y: int
    size: int
    opacity: float
    angle: float
    mirrored: bool

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.size / 2, self.y + self.size / 2

    @property
    def side(self) -> str:
        """ "on the left", "in the middle" or "on the right"."""
        return SIDES[int(self.centre[0] * 3 // IMAGE_SIZE)]


@dataclass(frozen=True)
class Scene:
    """A place and its things; `seed` is what is left to chance in drawing: background and noise."""

    place: str
    things: tuple[Thing, ...]
    seed: tuple[int, ...]

    @property
    def names(self) -> frozenset[str]:
        """The classes of objects that are in the picture."""
        return frozenset(thing.name for thing in self.things)

    @property
    def counts(self) -> Counter[str]:
        """How many of each class are in the picture."""
        return Counter(thing.name for thing in self.things)

    def only(self, name: str) -> Thing | None:
        """The one thing of that class; None where there is none, or more than one."""
        found = [thing for thing in self.things if thing.name == name]
        return found[0] if len(found) == 1 else None


def make_scene(split: Split, index: int, kind: SceneKind = "typical") -> Scene:
    """Scene number `index` (0 and up) of a split. The same arguments give the same scene."""
    seed = (_SPLIT_SEEDS[split], _KIND_SEEDS[kind], index)
    rng = np.random.default_rng(seed)
    place = str(rng.choice(list(PLACES)))
    names = _counter_names(rng) if kind == "counter" else _paired_names(rng, place, kind)
    names += [name for name in names if rng.random() < P_DOUBLE]
    names = names[:MAX_THINGS]
    things: list[Thing] = []
    for i in rng.permutation(len(names)):
        things.append(_thing(rng, names[i], things))
    return Scene(place, tuple(things), (*seed, 1))


def _paired_names(rng: np.random.Generator, place: str, kind: SceneKind) -> list[str]:
    names: list[str] = []
    with_anchor, without = P_PARTNER[kind]
    while not 1 <= len(names) <= MAX_THINGS:
        names = []
        for anchor, partner in PLACES[place].pairs:
            has_anchor = rng.random() < P_ANCHOR
            if has_anchor:
                names.append(anchor)
            if rng.random() < (with_anchor if has_anchor else without):
                names.append(partner)
        strange = rng.random(len(OBJECTS)) < P_STRANGER[kind]
        own = PLACES[place].objects
        names += [
            name
            for name, is_there in zip(OBJECTS, strange, strict=True)
            if is_there and name not in own
        ]
    return names


def _counter_names(rng: np.random.Generator) -> list[str]:
    n = int(rng.integers(2, 5))
    return [OBJECTS[i] for i in rng.choice(len(OBJECTS), n, replace=False)]


def _thing(rng: np.random.Generator, name: str, others: list[Thing]) -> Thing:
    sight, size, opacity = _sight(rng)
    x, y = _free_spot(rng, size, others)
    return Thing(
        name,
        _colour(rng, name),
        sight,
        x,
        y,
        size,
        opacity,
        angle=float(rng.uniform(-18, 18)),
        mirrored=bool(rng.random() < 0.5),
    )


def _sight(rng: np.random.Generator) -> tuple[Sight, int, float]:
    chance = rng.random()
    if chance < P_FAINT:
        return "faint", int(rng.integers(16, 28)), float(rng.uniform(0.1, 0.28))
    if chance < P_FAINT + P_TINY:
        return "tiny", int(rng.integers(8, 13)), float(rng.uniform(0.5, 0.9))
    return "clear", int(rng.integers(21, 35)), float(rng.uniform(0.8, 1.0))


def _colour(rng: np.random.Generator, name: str) -> str:
    usual = KINDS[name].colour
    if rng.random() < P_TYPICAL_COLOUR:
        return usual
    return str(rng.choice([colour for colour in COLOURS if colour != usual]))


def _free_spot(rng: np.random.Generator, size: int, others: list[Thing]) -> tuple[int, int]:
    """A spot clear of the borders between sides and, if one is found soon, of other things."""
    spot = (0, 0)
    for _ in range(40):
        x, y = (int(v) for v in rng.integers(0, IMAGE_SIZE - size + 1, 2))
        if min(abs(x + size / 2 - IMAGE_SIZE * k / 3) for k in (1, 2)) < _MARGIN:
            continue
        spot = (x, y)
        if not any(_overlap(x + size / 2, y + size / 2, size, other) for other in others):
            break
    return spot


def _overlap(cx: float, cy: float, size: int, other: Thing) -> bool:
    ox, oy = other.centre
    return max(abs(cx - ox), abs(cy - oy)) < (size + other.size) * 0.45
