"""Colours of a heat map: lightness rises evenly, so that they can be told without their hue.

In OKLab (Bjorn Ottosson, 2020), where equal steps look equal: lightness from 0.35 to 0.95, while
the hue goes from violet over red and orange to yellow.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]

LIGHTNESS = 0.35, 0.95
HUE = 300.0, 460.0
CHROMA = 0.19
N = 256

_TO_LMS = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def colours() -> npt.NDArray[np.uint8]:
    """(256, 3) sRGB, from cold to hot."""
    share = np.linspace(0, 1, N)
    lightness = LIGHTNESS[0] + share * (LIGHTNESS[1] - LIGHTNESS[0])
    hue = np.deg2rad(HUE[0] + share * (HUE[1] - HUE[0]))
    chroma = np.full(N, CHROMA)
    for _ in range(60):  # what a screen cannot show gets paler, and keeps its lightness
        rgb = _linear(lightness, chroma, hue)
        beyond = (rgb.min(axis=1) < 0) | (rgb.max(axis=1) > 1)
        chroma = np.where(beyond, chroma * 0.96, chroma)
    linear = np.clip(_linear(lightness, chroma, hue), 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(255 * encoded), np.uint8)


def _linear(lightness: _Floats, chroma: _Floats, hue: _Floats) -> _Floats:
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    return np.asarray((lab @ _TO_LMS.T) ** 3 @ _TO_RGB.T)
