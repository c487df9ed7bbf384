"""The heat of an answer as JSON."""

from __future__ import annotations

import base64
import json

import numpy as np

from cmg_gguf.chat.heat import heat_block
from cmg_gguf.heat.geometry import Picture, Tile
from cmg_gguf.heat.maps import Heat


def test_weights_come_back_and_what_is_not_known_is_null() -> None:
    boxes = np.array([[0, 0, 10.126, 5], [np.nan] * 4])
    pictures = (
        Picture(20, 10, (Tile(0, 2, boxes),)),
        Picture(7, 9, (Tile(2, 1),), "nobody knows"),
    )
    weights = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 2, 3)
    weights[1, 1, 2] = np.nan
    block = json.loads(
        json.dumps(heat_block(Heat(weights, (3, 7), (7,), pictures)), allow_nan=False)
    )
    assert (block["layers"], block["masked"], block["shape"]) == ([3, 7], [7], [2, 2, 3])
    assert block["images"] == [
        {"size": [20, 10], "n_tokens": 2, "boxes": [[0, 0, 10.13, 5], None]},
        {"size": [7, 9], "n_tokens": 1, "boxes": None, "unknown": "nobody knows"},
    ]
    found = np.frombuffer(base64.b64decode(block["weights"]), "<f2").reshape(2, 2, 3)
    np.testing.assert_allclose(found, weights, rtol=2**-11, atol=2**-25)
