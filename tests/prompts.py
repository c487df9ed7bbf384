"""What the tests ask: pictures, and prompts with a place for each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ONE_IMAGE = "USER: Is there a dog in this photo? <__media__> Please answer yes or no. ASSISTANT:"
TWO_IMAGES = "USER: <__media__> and <__media__> What is near the red car, and how many? ASSISTANT:"
TWO_IN_A_ROW = "USER: <__media__><__media__> What is near the red car? ASSISTANT:"
THREE_AND_A_LONG_END = (
    "<__media__> USER: <__media__> and <__media__> Please answer the question about the left "
    "photo and the right photo: how many people are there in the street? ASSISTANT:"
)

PICTURE = 2
PICTURES = (3, 4)
"""Seeds for which no choice hangs by a hair: in every row and layer the last token that is taken is
ahead of the first one left by 0.03 percent and more. A float32 forward is off by 0.001 percent."""


def picture(seed: int, size: int = 56) -> NDArray[np.uint8]:
    """(size, size, 3) coloured squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.ascontiguousarray(squares.repeat(size // 4, axis=0).repeat(size // 4, axis=1))
