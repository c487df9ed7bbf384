"""How each object looks: strokes in a unit box, in a main colour and the accent of its kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

from cmg_gguf.tiny.scenes.catalogue import KINDS, RGB

Shape = Literal["oval", "box", "area", "line", "arc", "half", "pill"]


@dataclass(frozen=True)
class Stroke:
    """One shape. at: corners or points in units of the box. ink: None = the object's colour.

    width: of lines and arcs, in boxes. angles: of arcs, in degrees clockwise from the right.
    """

    shape: Shape
    at: tuple[float, ...]
    ink: RGB | Literal["accent"] | None = None
    width: float = 0.06
    angles: tuple[float, float] = (0, 360)


def draw_icon(name: str, colour: RGB, size: int = 64) -> Image.Image:
    """The object on a transparent square of `size` pixels."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    inks = {None: colour, "accent": KINDS[name].accent}
    for stroke in ICONS[name]:
        ink = stroke.ink if isinstance(stroke.ink, tuple) else inks[stroke.ink]
        _draw(pen, stroke, ink, size)
    return image


def _draw(pen: ImageDraw.ImageDraw, stroke: Stroke, ink: RGB, size: int) -> None:
    at = [v * size for v in stroke.at]
    width = max(1, int(stroke.width * size))
    start, end = stroke.angles
    if stroke.shape == "oval":
        pen.ellipse(at, fill=ink)
    elif stroke.shape == "box":
        pen.rectangle(at, fill=ink)
    elif stroke.shape == "area":
        pen.polygon(at, fill=ink)
    elif stroke.shape == "line":
        pen.line(at, fill=ink, width=width)
    elif stroke.shape == "arc":
        pen.arc(at, start, end, fill=ink, width=width)
    elif stroke.shape == "half":
        pen.pieslice(at, 180, 360, fill=ink)
    else:
        pen.rounded_rectangle(at, radius=0.18 * size, fill=ink)


def _oval(*at: float, ink: RGB | Literal["accent"] | None = None) -> Stroke:
    return Stroke("oval", at, ink)


def _box(*at: float, ink: RGB | Literal["accent"] | None = None) -> Stroke:
    return Stroke("box", at, ink)


def _area(*at: float, ink: RGB | Literal["accent"] | None = None) -> Stroke:
    return Stroke("area", at, ink)


def _line(*at: float, ink: RGB | Literal["accent"] | None = "accent", w: float = 0.06) -> Stroke:
    return Stroke("line", at, ink, w)


def _arc(*at: float, angles: tuple[float, float], w: float = 0.06) -> Stroke:
    return Stroke("arc", at, "accent", w, angles)


ICONS: dict[str, tuple[Stroke, ...]] = {
    "knife": (
        _area(0.42, 0.02, 0.62, 0.12, 0.62, 0.6, 0.42, 0.6),
        _box(0.45, 0.6, 0.59, 0.98, ink="accent"),
    ),
    "fork": (
        *(_box(x, 0.02, x + 0.08, 0.36) for x in (0.3, 0.46, 0.62)),
        _box(0.3, 0.34, 0.7, 0.46),
        _box(0.45, 0.46, 0.55, 0.98, ink="accent"),
    ),
    "pot": (
        _box(0.15, 0.35, 0.85, 0.85),
        _box(0.02, 0.42, 0.15, 0.52, ink="accent"),
        _box(0.85, 0.42, 0.98, 0.52, ink="accent"),
        _box(0.15, 0.26, 0.85, 0.33, ink="accent"),
        _box(0.44, 0.15, 0.56, 0.26, ink="accent"),
    ),
    "spoon": (_oval(0.3, 0.02, 0.7, 0.48), _box(0.45, 0.46, 0.55, 0.98, ink="accent")),
    "car": (
        _box(0.02, 0.45, 0.98, 0.72),
        _area(0.2, 0.45, 0.32, 0.22, 0.7, 0.22, 0.82, 0.45),
        _oval(0.12, 0.6, 0.36, 0.84, ink="accent"),
        _oval(0.64, 0.6, 0.88, 0.84, ink="accent"),
    ),
    "traffic light": (
        _box(0.32, 0.02, 0.68, 0.7),
        _oval(0.4, 0.06, 0.6, 0.24, ink=(235, 60, 60)),
        _oval(0.4, 0.27, 0.6, 0.45, ink=(240, 210, 60)),
        _oval(0.4, 0.48, 0.6, 0.66, ink=(60, 210, 90)),
        _box(0.46, 0.7, 0.54, 0.98, ink="accent"),
    ),
    "bus": (
        _box(0.02, 0.15, 0.98, 0.75),
        *(_box(x, 0.24, x + 0.15, 0.44, ink="accent") for x in (0.08, 0.32, 0.56, 0.78)),
        _oval(0.14, 0.64, 0.34, 0.86, ink=(40, 40, 45)),
        _oval(0.66, 0.64, 0.86, 0.86, ink=(40, 40, 45)),
    ),
    "bench": (
        _box(0.02, 0.5, 0.98, 0.62),
        _box(0.02, 0.25, 0.98, 0.36),
        _box(0.1, 0.62, 0.18, 0.92, ink="accent"),
        _box(0.82, 0.62, 0.9, 0.92, ink="accent"),
    ),
    "tree": (_oval(0.1, 0.02, 0.9, 0.62), _box(0.42, 0.6, 0.58, 0.98, ink="accent")),
    "bird": (
        _oval(0.2, 0.35, 0.7, 0.75),
        _oval(0.6, 0.2, 0.85, 0.45),
        _area(0.85, 0.3, 0.99, 0.35, 0.85, 0.4, ink="accent"),
        _area(0.2, 0.5, 0.01, 0.35, 0.05, 0.65),
        _area(0.35, 0.45, 0.5, 0.08, 0.6, 0.45),
    ),
    "dog": (
        _box(0.2, 0.4, 0.75, 0.68),
        _box(0.68, 0.2, 0.95, 0.46),
        _area(0.7, 0.2, 0.75, 0.05, 0.8, 0.2, ink="accent"),
        _box(0.22, 0.68, 0.31, 0.95),
        _box(0.62, 0.68, 0.71, 0.95),
        _line(0.2, 0.45, 0.04, 0.25, ink=None, w=0.07),
    ),
    "ball": (
        _oval(0.12, 0.12, 0.88, 0.88),
        _line(0.5, 0.12, 0.5, 0.88),
        _line(0.12, 0.5, 0.88, 0.5),
        _arc(0.3, 0.12, 0.7, 0.88, angles=(0, 360), w=0.04),
    ),
    "laptop": (
        _box(0.18, 0.1, 0.82, 0.58),
        _box(0.25, 0.16, 0.75, 0.52, ink="accent"),
        _area(0.05, 0.85, 0.18, 0.62, 0.82, 0.62, 0.95, 0.85),
    ),
    "mouse": (
        _oval(0.25, 0.2, 0.75, 0.95),
        _line(0.5, 0.2, 0.5, 0.5),
        _line(0.25, 0.5, 0.75, 0.5),
        _arc(0.4, -0.2, 0.9, 0.3, angles=(90, 200), w=0.05),
    ),
    "book": (
        _area(0.05, 0.25, 0.48, 0.33, 0.48, 0.85, 0.05, 0.77),
        _area(0.95, 0.25, 0.52, 0.33, 0.52, 0.85, 0.95, 0.77),
        _line(0.15, 0.42, 0.4, 0.47, w=0.05),
        _line(0.6, 0.47, 0.85, 0.42, w=0.05),
        _line(0.15, 0.58, 0.4, 0.63, w=0.05),
        _line(0.6, 0.63, 0.85, 0.58, w=0.05),
    ),
    "lamp": (
        _area(0.3, 0.05, 0.7, 0.05, 0.9, 0.42, 0.1, 0.42),
        _box(0.46, 0.42, 0.54, 0.88, ink="accent"),
        _box(0.25, 0.86, 0.75, 0.96, ink="accent"),
    ),
    "sink": (
        _area(0.05, 0.45, 0.95, 0.45, 0.78, 0.88, 0.22, 0.88),
        _box(0.46, 0.12, 0.54, 0.45, ink="accent"),
        _box(0.46, 0.12, 0.75, 0.2, ink="accent"),
        _box(0.69, 0.12, 0.75, 0.3, ink="accent"),
    ),
    "mirror": (
        _oval(0.2, 0.02, 0.8, 0.8, ink="accent"),
        _oval(0.27, 0.09, 0.73, 0.73),
        _line(0.38, 0.5, 0.58, 0.25, ink=(240, 245, 250), w=0.05),
        _box(0.44, 0.8, 0.56, 0.98, ink="accent"),
    ),
    "towel": (
        _box(0.2, 0.1, 0.8, 0.92),
        _box(0.2, 0.25, 0.8, 0.34, ink="accent"),
        _box(0.2, 0.7, 0.8, 0.79, ink="accent"),
        _box(0.08, 0.06, 0.92, 0.12, ink=(110, 110, 115)),
    ),
    "soap": (
        Stroke("pill", (0.08, 0.35, 0.92, 0.75)),
        _oval(0.55, 0.08, 0.72, 0.25, ink="accent"),
        _oval(0.75, 0.18, 0.86, 0.29, ink="accent"),
        _oval(0.4, 0.2, 0.5, 0.3, ink="accent"),
    ),
    "boat": (
        _area(0.05, 0.68, 0.95, 0.68, 0.78, 0.92, 0.22, 0.92),
        _box(0.47, 0.05, 0.52, 0.68, ink=(120, 85, 55)),
        _area(0.55, 0.1, 0.9, 0.6, 0.55, 0.6, ink="accent"),
    ),
    "surfboard": (_oval(0.32, 0.0, 0.68, 1.0), _line(0.5, 0.04, 0.5, 0.96, w=0.07)),
    "umbrella": (
        Stroke("half", (0.05, 0.1, 0.95, 0.95)),
        _line(0.5, 0.5, 0.5, 0.92),
        _arc(0.5, 0.82, 0.68, 1.0, angles=(0, 180), w=0.05),
    ),
    "chair": (
        _box(0.22, 0.05, 0.32, 0.95),
        _box(0.22, 0.5, 0.8, 0.6),
        _box(0.7, 0.6, 0.8, 0.95),
        _box(0.32, 0.15, 0.4, 0.5, ink="accent"),
    ),
    "bed": (
        _box(0.02, 0.2, 0.1, 0.9, ink="accent"),
        _box(0.1, 0.5, 0.98, 0.74),
        _box(0.12, 0.38, 0.36, 0.5, ink=(240, 240, 235)),
        _box(0.9, 0.74, 0.98, 0.9, ink="accent"),
    ),
    "clock": (
        _oval(0.1, 0.05, 0.42, 0.35),
        _oval(0.58, 0.05, 0.9, 0.35),
        _oval(0.12, 0.16, 0.88, 0.92),
        _oval(0.22, 0.26, 0.78, 0.82, ink="accent"),
        _line(0.5, 0.54, 0.5, 0.32, ink=(30, 30, 35), w=0.07),
        _line(0.5, 0.54, 0.68, 0.62, ink=(30, 30, 35), w=0.07),
    ),
    "window": (
        _box(0.08, 0.08, 0.92, 0.92),
        *(_box(x, y, x + 0.3, y + 0.3, ink="accent") for x in (0.16, 0.54) for y in (0.16, 0.54)),
    ),
    "plant": (
        _area(0.28, 0.62, 0.72, 0.62, 0.64, 0.98, 0.36, 0.98, ink="accent"),
        _area(0.5, 0.64, 0.02, 0.3, 0.2, 0.12),
        _area(0.5, 0.64, 0.98, 0.3, 0.8, 0.12),
        _area(0.42, 0.64, 0.5, 0.0, 0.58, 0.64),
    ),
    "tractor": (
        _oval(0.48, 0.4, 0.98, 0.92, ink="accent"),
        _oval(0.04, 0.62, 0.34, 0.92, ink="accent"),
        _box(0.08, 0.4, 0.6, 0.68),
        _box(0.5, 0.1, 0.84, 0.18),
        _box(0.52, 0.1, 0.6, 0.5),
        _box(0.76, 0.1, 0.84, 0.5),
        _box(0.16, 0.2, 0.22, 0.4, ink="accent"),
    ),
    "barn": (
        _area(0.5, 0.02, 0.95, 0.4, 0.05, 0.4, ink=(95, 75, 70)),
        _box(0.12, 0.4, 0.88, 0.95),
        _box(0.36, 0.55, 0.64, 0.95, ink="accent"),
        _line(0.36, 0.55, 0.64, 0.95, ink=None),
        _line(0.64, 0.55, 0.36, 0.95, ink=None),
    ),
    "ladder": (
        _box(0.24, 0.0, 0.34, 1.0),
        _box(0.66, 0.0, 0.76, 1.0),
        *(_box(0.34, y, 0.66, y + 0.08, ink="accent") for y in (0.12, 0.34, 0.56, 0.78)),
    ),
    "bucket": (
        _area(0.15, 0.42, 0.85, 0.42, 0.72, 0.96, 0.28, 0.96),
        _box(0.13, 0.36, 0.87, 0.44, ink="accent"),
        _arc(0.17, 0.04, 0.83, 0.7, angles=(180, 360), w=0.06),
    ),
}
