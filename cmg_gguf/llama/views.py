"""What of a picture an image encoder is given, measured: scaled, padded, cropped or cut into tiles.

How a kind of projector prepares a picture is in llama.cpp's code alone, and changes with it. So the
encoder is shown a picture whose colours are coordinates, and what reaches its graph is read there:

    red     from 0 at the left edge to 255 at the right
    green   from 0 at the top to 255 at the bottom
    blue    255, where padding is darker

No token is computed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cmg_gguf.arrays import FloatArray

_Floats = npt.NDArray[np.float64]

LEAST = 8
"""Levels of 255 that a view's colours must span: of fewer, nothing is believed."""
RESIDUAL = 1.5
"""Levels by which a colour may be off the straight line."""
SNAP = 0.01
"""A view that ends so near the picture's edge, as a share of the picture, ends there."""


@dataclass(frozen=True)
class Axis:
    """One dimension of a view: its pixels `start` to `stop` - 1 show the picture, the others are
    padding. first, last: where in the picture they begin and end, in its pixels."""

    start: int
    stop: int
    first: float
    last: float

    def place(self, of_view: _Floats) -> _Floats:
        """Where in the picture places in the view lie; those in the padding at its edge."""
        n = max(1, self.stop - self.start)
        share = (np.clip(of_view, self.start, self.stop) - self.start) / n
        return np.asarray(self.first + share * (self.last - self.first))


NOTHING = Axis(0, 0, 0.0, 0.0)


@dataclass(frozen=True)
class View:
    """What an encoder is given at once. width, height: its pixels. across, down: what they show."""

    width: int
    height: int
    across: Axis
    down: Axis

    @property
    def is_padding(self) -> bool:
        """Whether it shows nothing of the picture."""
        return self.across == NOTHING


class ViewError(Exception):
    """What the encoder is given is no plain part of the picture; the message says why."""


def coordinates(width: int, height: int) -> npt.NDArray[np.uint8]:
    """(height, width, 3): the picture whose colours are coordinates."""
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[..., 0] = np.rint((np.arange(width) + 0.5) / width * 255)
    picture[..., 1] = np.rint((np.arange(height) + 0.5) / height * 255)[:, None]
    return picture


def levels(black: Sequence[FloatArray], white: Sequence[FloatArray]) -> _Floats:
    """(2, 3): what an encoder is given for 0 and for 255, by colour; padding lies between.

    black, white: what it is given of pictures of one colour, (3, height, width) each.
    """
    lowest = np.min([view.min(axis=(1, 2)) for view in black], axis=0)
    highest = np.max([view.max(axis=(1, 2)) for view in white], axis=0)
    return np.array([lowest, highest], np.float64)


def view_of(seen: FloatArray, known: _Floats, size: tuple[int, int]) -> View:
    """What a view shows of the picture `coordinates(*size)`.

    seen: (3, height, width), what the encoder is given. known: `levels`. Raises ViewError.
    """
    low, high = known[:, :, None, None]
    red, green, blue = (seen - low) / (high - low) * 255
    shows = blue > 250
    columns, rows = (np.flatnonzero(shows.any(axis=i)) for i in (0, 1))
    if not len(columns):
        return View(seen.shape[2], seen.shape[1], NOTHING, NOTHING)
    if shows.sum() != len(columns) * len(rows):
        raise ViewError("its padding is no frame around it")
    inner = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    if shows[inner].size != shows.sum():
        raise ViewError("it is in several pieces")
    return View(
        seen.shape[2],
        seen.shape[1],
        _axis(red[inner], int(columns[0]), size[0]),
        _axis(green[inner].T, int(rows[0]), size[1]),
    )


def _axis(colour: _Floats, start: int, size: int) -> Axis:
    """colour: (n, n_along): levels that rise along the second dimension, and along it alone."""
    along = np.median(colour, axis=0)
    if np.abs(colour - along).max() > RESIDUAL:
        raise ViewError("it is not scaled evenly")
    n = len(along)
    low, high = along.min(), along.max()
    margin = 0.1 * (high - low)  # a filter has nothing beyond an edge
    inner = (along > low + margin) & (along < high - margin)
    if high - low < LEAST or inner.sum() < 2:
        raise ViewError("it shows too few pixels to tell which")
    places = np.arange(n) + 0.5
    slope, offset = np.polyfit(places[inner], along[inner], 1)
    if slope <= 0:
        raise ViewError("it is turned or mirrored")
    if np.abs(slope * places + offset - along)[inner].max() > RESIDUAL:
        raise ViewError("it is not scaled evenly")
    first, last = offset / 255, (slope * n + offset) / 255
    first, last = (_snapped(share) * size for share in (first, last))
    return Axis(start, start + n, first, last)


def _snapped(share: float) -> float:
    return next((edge for edge in (0.0, 1.0) if abs(share - edge) < SNAP), float(share))
