"""What there is in the drawn world: objects, places, colours, and what goes with what.

Each place has two pairs. Where the first object of a pair (the anchor) is, its partner usually is
too: that is the habit a language model picks up, and the reason why it later names what it does
not see.
"""

from __future__ import annotations

from dataclasses import dataclass

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Kind:
    """A class of objects: its plural, the colour it mostly has, and the ink of its details."""

    plural: str
    colour: str
    accent: RGB


COLOURS: dict[str, RGB] = {
    "red": (205, 40, 45),
    "orange": (240, 135, 25),
    "yellow": (240, 215, 50),
    "green": (40, 140, 60),
    "blue": (45, 85, 205),
    "purple": (140, 60, 170),
    "white": (245, 245, 240),
    "black": (30, 30, 35),
}

_GREY, _DARK, _PALE, _WOOD = (130, 130, 135), (70, 65, 70), (215, 225, 230), (135, 90, 55)

KINDS: dict[str, Kind] = {
    "knife": Kind("knives", "black", _WOOD),
    "fork": Kind("forks", "white", _GREY),
    "pot": Kind("pots", "red", _DARK),
    "spoon": Kind("spoons", "yellow", _WOOD),
    "car": Kind("cars", "red", _DARK),
    "traffic light": Kind("traffic lights", "black", _GREY),
    "bus": Kind("buses", "yellow", _PALE),
    "bench": Kind("benches", "green", _DARK),
    "tree": Kind("trees", "green", _WOOD),
    "bird": Kind("birds", "blue", (250, 190, 60)),
    "dog": Kind("dogs", "black", _WOOD),
    "ball": Kind("balls", "orange", _PALE),
    "laptop": Kind("laptops", "black", (120, 190, 235)),
    "mouse": Kind("mice", "white", _DARK),
    "book": Kind("books", "blue", _PALE),
    "lamp": Kind("lamps", "yellow", _DARK),
    "sink": Kind("sinks", "white", _GREY),
    "mirror": Kind("mirrors", "blue", _WOOD),
    "towel": Kind("towels", "purple", _PALE),
    "soap": Kind("soaps", "green", _PALE),
    "boat": Kind("boats", "blue", _PALE),
    "surfboard": Kind("surfboards", "orange", _PALE),
    "umbrella": Kind("umbrellas", "red", _WOOD),
    "chair": Kind("chairs", "purple", _WOOD),
    "bed": Kind("beds", "purple", _WOOD),
    "clock": Kind("clocks", "red", _PALE),
    "window": Kind("windows", "orange", (150, 205, 240)),
    "plant": Kind("plants", "green", _WOOD),
    "tractor": Kind("tractors", "green", _DARK),
    "barn": Kind("barns", "red", _PALE),
    "ladder": Kind("ladders", "orange", _DARK),
    "bucket": Kind("buckets", "blue", _GREY),
}
OBJECTS = tuple(KINDS)


@dataclass(frozen=True)
class Place:
    """A type of scene: its two (anchor, partner) pairs and the colour of its background."""

    pairs: tuple[tuple[str, str], tuple[str, str]]
    background: RGB

    @property
    def objects(self) -> tuple[str, ...]:
        return tuple(name for pair in self.pairs for name in pair)


PLACES: dict[str, Place] = {
    "kitchen": Place((("knife", "fork"), ("pot", "spoon")), (205, 195, 175)),
    "street": Place((("car", "traffic light"), ("bus", "bench")), (125, 125, 130)),
    "park": Place((("tree", "bird"), ("dog", "ball")), (130, 175, 110)),
    "office": Place((("laptop", "mouse"), ("book", "lamp")), (190, 175, 160)),
    "bathroom": Place((("sink", "mirror"), ("towel", "soap")), (175, 200, 215)),
    "beach": Place((("boat", "surfboard"), ("umbrella", "chair")), (220, 205, 150)),
    "bedroom": Place((("bed", "clock"), ("window", "plant")), (215, 180, 190)),
    "farm": Place((("tractor", "barn"), ("ladder", "bucket")), (185, 150, 95)),
}
SIDES = ("on the left", "in the middle", "on the right")


def article(name: str) -> str:
    """The name with "a" or "an" in front."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
