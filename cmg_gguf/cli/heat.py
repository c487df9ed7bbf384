"""Pictures of where a model looked: a scale that is the same for every picture.

heat = np.zeros((8, 8))             # 0 to 1 for each patch, row by row
overlay(rgb, heat).save("heat.png")
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIZE = 448
_COLD, _HOT = np.array([20, 24, 60]), np.array([255, 210, 60])


def overlay(rgb: NDArray[np.uint8], heat: NDArray[np.float64], *, edge: int = _SIZE) -> Image.Image:
    """The image with `heat` laid over it: dark blue = 0, yellow = 1, half transparent.

    rgb: (H, W, 3) uint8. heat: (rows, columns) of patches, 0 to 1, not rescaled. edge: pixels of
    the longer side of the result.
    """
    scale = edge / max(rgb.shape[:2])
    size = round(rgb.shape[1] * scale), round(rgb.shape[0] * scale)
    picture = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.NEAREST), np.float32)
    grey = np.repeat(picture.mean(-1, keepdims=True), 3, -1)
    warmth = np.asarray(
        Image.fromarray(np.clip(heat, 0, 1).astype(np.float32)).resize(
            size, Image.Resampling.NEAREST
        )
    )[..., None]
    colour = _COLD + (_HOT - _COLD) * warmth
    mixed = 0.55 * (grey * (1 - warmth) + picture * warmth) + 0.45 * colour
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))
