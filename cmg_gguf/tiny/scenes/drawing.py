"""From a scene to pixels: background, clutter, objects, noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cmg_gguf.tiny.scenes.catalogue import COLOURS, PLACES, RGB
from cmg_gguf.tiny.scenes.icons import draw_icon
from cmg_gguf.tiny.scenes.world import IMAGE_SIZE, Scene, Thing

Pixels = NDArray[np.uint8]
COLOUR_JITTER = 14


def draw(scene: Scene) -> Pixels:
    """(112, 112, 3) uint8 RGB. The same scene gives the same pixels."""
    rng = np.random.default_rng(scene.seed)
    shade = np.array(PLACES[scene.place].background) + rng.integers(-20, 21, 3)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), _rgb(shade))
    pen = ImageDraw.Draw(image)
    _draw_place(pen, scene.place, shade, rng)
    _draw_clutter(pen, shade, rng)
    for thing in scene.things:
        _paste(image, thing, rng)
    noise = rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    noise *= np.float32(rng.uniform(4, 16))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def _rgb(values: NDArray[Any]) -> RGB:
    r, g, b = (int(v) for v in np.clip(values, 0, 255))
    return r, g, b


def _draw_place(
    pen: ImageDraw.ImageDraw, place: str, shade: NDArray[Any], rng: np.random.Generator
) -> None:
    """What tells places apart: tiles, a road, sky, water, a floor, furrows."""
    s = IMAGE_SIZE
    contrast = int(rng.integers(10, 28)) * (1 if rng.random() < 0.5 else -1)
    if place in ("kitchen", "bathroom"):
        step = int(rng.integers(14, 30))
        for v in range(int(rng.integers(step)), s, step):
            pen.line([v, 0, v, s], fill=_rgb(shade + contrast))
            if place == "kitchen":
                pen.line([0, v, s, v], fill=_rgb(shade + contrast))
    elif place == "street":
        y = int(rng.integers(50, 90))
        pen.rectangle([0, y, s, y + 3], fill=_rgb(shade + 60))
    elif place == "beach":
        pen.rectangle([0, 0, s, int(rng.integers(20, 50))], fill=(90, 150, 200))
    elif place == "park":
        pen.rectangle([0, 0, s, int(rng.integers(10, 40))], fill=(150, 190, 225))
    elif place == "office":
        pen.rectangle([0, int(rng.integers(70, 100)), s, s], fill=_rgb(shade - 45))
    elif place == "bedroom":
        pen.rectangle([0, int(rng.integers(60, 95)), s, s], fill=_rgb(shade - [60, 20, 40]))
    else:
        for y in range(int(rng.integers(10)), s, int(rng.integers(10, 20))):
            pen.line([0, y, s, y + int(rng.integers(-4, 5))], fill=_rgb(shade - abs(contrast)))


def _draw_clutter(pen: ImageDraw.ImageDraw, shade: NDArray[Any], rng: np.random.Generator) -> None:
    """Spots, boxes and scratches that are no object."""
    for _ in range(int(rng.integers(3, 9))):
        x, y = (int(v) for v in rng.integers(0, IMAGE_SIZE, 2))
        w, h = (int(v) for v in rng.integers(3, 14, 2))
        fill = _rgb(shade + rng.integers(-50, 51, 3))
        shape = rng.random()
        if shape < 0.4:
            pen.ellipse([x, y, x + w, y + h], fill=fill)
        elif shape < 0.7:
            pen.rectangle([x, y, x + w, y + h], fill=fill)
        else:
            pen.line([x, y, x + 2 * w - 14, y + 2 * h - 14], fill=fill)


def _paste(image: Image.Image, thing: Thing, rng: np.random.Generator) -> None:
    colour = np.array(COLOURS[thing.colour]) + np.rint(rng.normal(0, COLOUR_JITTER, 3)).astype(int)
    icon = draw_icon(thing.name, _rgb(colour))
    icon = icon.rotate(thing.angle, resample=Image.Resampling.BILINEAR)
    if thing.mirrored:
        icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    icon = icon.resize((thing.size, thing.size), Image.Resampling.BOX)
    opacity = thing.opacity
    icon.putalpha(icon.getchannel("A").point(lambda value: int(value * opacity)))
    image.paste(icon, (thing.x, thing.y), icon)
