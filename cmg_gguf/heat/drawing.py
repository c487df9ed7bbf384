"""One picture with the attention of some tokens laid over it.

    overlay(rgb, heat, 0, tokens_of(reply, "fork")[0], edge=768).save("fork.png")

The scale is fixed, and the same for every picture: see `Scale`. The picture stays to be seen, in
grey; where there is nothing to say nothing is laid over it. Heat runs smoothly from image token to
image token, whose edges are drawn in thin lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from cmg_gguf.errors import ImageError
from cmg_gguf.heat.colours import colours
from cmg_gguf.heat.geometry import Boxes, Picture
from cmg_gguf.heat.maps import Heat, Layers, Values, ratio, spread

Pixels = npt.NDArray[np.uint8]

COVER = 0.8
"""How much of the picture the hottest colour covers."""
GREY = 0.75
"""How much of its colour the picture loses."""
LINE = (255, 255, 255, 70)
SMOOTH = 0.5
"""Width of the smoothing, a Gaussian's standard deviation, in edges of a tile's boxes."""


@dataclass(frozen=True)
class Scale:
    """What colours stand for, on a logarithmic scale: nothing up to `low`, the hottest from `high`
    on. ticks: values that are named. meaning: in words."""

    low: float
    high: float
    ticks: tuple[float, ...]
    meaning: str

    def shares(self, values: Values) -> Values:
        """0 to 1, of values >= 0."""
        with np.errstate(divide="ignore"):
            share = np.log(values / self.low) / np.log(self.high / self.low)
        return np.asarray(np.clip(share, 0.0, 1.0))


RELATIVE = Scale(
    1.0, 8.0, (1, 2, 4, 8), "1x = what the place gets from the answer's tokens on average"
)
ABSOLUTE = Scale(
    0.25,
    16.0,
    (0.25, 1, 4, 16),
    "1x = what the place would get if all attention were spread evenly over the picture",
)


def overlay(
    rgb: Pixels,
    heat: Heat,
    image: int,
    tokens: Sequence[int],
    *,
    layer: Layers = "mean",
    relative: bool = True,
    edge: int = 512,
) -> Image.Image:
    """A picture with what some tokens of an answer attend to in it; its longer side has `edge`
    pixels.

    rgb: (height, width, 3) uint8, the picture numbered `image`. relative: colours as `RELATIVE`
    says, else as `ABSOLUTE`. Raises what `Heat.map` raises, and ImageError for attention that is
    not known.
    """
    heat.boxes(image)  # raises where they are not known
    size, picture = fitted(rgb, edge), heat.picture(image)
    scale = np.tile([size[0] / rgb.shape[1], size[1] / rgb.shape[0]], 2)
    values = _smooth(heat.of(tokens, layer=layer, relative=False), picture, scale, size)
    if np.isnan(values).any():
        raise ImageError(
            f"the attention on some tokens of image {image} is not known: llama.cpp has given "
            "their cells away; name a layer that has them with layer="
        )
    if relative:
        usual = heat.of(range(heat.n_tokens), layer=layer, relative=False)
        shares = RELATIVE.shares(ratio(values, _smooth(usual, picture, scale, size)))
    else:
        shares = ABSOLUTE.shares(values * size[0] * size[1])
    return _with_lines(coloured(_grey(rgb, size), shares), heat.boxes(image) * scale)


def fitted(rgb: Pixels, edge: int) -> tuple[int, int]:
    """Width and height of a picture whose longer side has `edge` pixels."""
    height, width = rgb.shape[:2]
    scale = edge / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def resized(rgb: Pixels, size: tuple[int, int]) -> Image.Image:
    """The picture in another size."""
    return Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS)


def _grey(rgb: Pixels, size: tuple[int, int]) -> Values:
    picture = np.asarray(resized(rgb, size), np.float64)
    grey = picture @ [0.299, 0.587, 0.114]
    return np.asarray(GREY * grey[..., None] + (1 - GREY) * picture)


def coloured(picture: Values, shares: Values) -> Image.Image:
    """A picture, (height, width, 3) from 0 to 255, with heat from 0 to 1 laid over it."""
    hot = colours()[np.rint(255 * shares).astype(np.intp)]
    cover = (COVER * shares**0.7)[..., None]
    return Image.fromarray(np.rint((1 - cover) * picture + cover * hot).astype(np.uint8))


def _smooth(values: Values, picture: Picture, scale: Values, size: tuple[int, int]) -> Values:
    """(height, width): values spread over their boxes, and smoothed tile by tile; the sum stays."""
    found = np.zeros((size[1], size[0]))
    for tile in picture.tiles:
        assert tile.boxes is not None
        boxes = tile.boxes * scale
        if np.isnan(boxes).all():
            continue  # a tile of padding
        edges = np.nanmedian(boxes[:, 2:] - boxes[:, :2], axis=0)
        density = spread(values[tile.first : tile.first + tile.n_tokens], boxes, found.shape)
        across, down = (_blur(n, SMOOTH * edge) for n, edge in zip(size, edges, strict=True))
        found += down @ density @ across.T
    return found


def _blur(n: int, sigma: float) -> Values:
    """(n, n): what makes a Gaussian blur of n values, mirrored at the ends, so the sum stays."""
    places = np.arange(n)
    found = sum(
        np.exp(-0.5 * ((places[:, None] - mirrored) / sigma) ** 2)
        for mirrored in (places, -1 - places, 2 * n - 1 - places)
    )
    return np.asarray(found / np.sum(found, axis=0))


def _with_lines(picture: Image.Image, boxes: Boxes) -> Image.Image:
    """The edges of the smallest boxes."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    lines = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(lines)
    for left, top, right, bottom in boxes[area <= 1.5 * np.nanmedian(area)]:
        draw.rectangle((left, top, right, bottom), outline=LINE)
    return Image.alpha_composite(picture.convert("RGBA"), lines).convert("RGB")
