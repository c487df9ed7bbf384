"""Where an answer looked, as JSON that a page can draw.

{"layers": [0, 1, ...], "masked": [1], "shape": [n_tokens, n_layers, n_image_tokens],
 "images": [{"size": [width, height], "n_tokens": n,
             "boxes": [[left, top, right, bottom], null, ...]}],
 "weights": "..."}
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from cmg_gguf.heat.geometry import Boxes, Picture
from cmg_gguf.heat.maps import Heat

WEIGHT_BYTES = 2
"""Of each weight, before base64."""


def heat_block(heat: Heat) -> dict[str, Any]:
    """The attention of an answer's tokens on its pictures, JSON-ready.

    layers, masked: as in `Heat`. weights: base64 of float16, little-endian, in C order, of
    `shape`, (n_tokens, n_layers, n_image_tokens): 0 to 1, the nearest to `Heat.weights` (within
    2**-11 of it, and 2**-25), NaN where that is. images: in order; size in pixels, boxes in pixels
    to a hundredth, one for each image token, null where a token shows none of the picture. The
    image tokens of all pictures stand in a row. Where the places are not known, boxes is null and
    `unknown` says why.
    """
    data = np.asarray(heat.weights, np.dtype("<f2")).tobytes()
    return {
        "layers": list(heat.layers),
        "masked": list(heat.masked),
        "shape": list(heat.weights.shape),
        "images": [_image(picture) for picture in heat.images],
        "weights": base64.b64encode(data).decode("ascii"),
    }


def _image(picture: Picture) -> dict[str, Any]:
    size, boxes = [picture.width, picture.height], picture.boxes
    if boxes is None:
        return {
            "size": size,
            "n_tokens": picture.n_tokens,
            "boxes": None,
            "unknown": picture.unknown,
        }
    return {"size": size, "n_tokens": picture.n_tokens, "boxes": _rounded(boxes)}


def _rounded(boxes: Boxes) -> list[list[float] | None]:
    return [None if np.isnan(box).any() else [round(float(x), 2) for x in box] for box in boxes]
