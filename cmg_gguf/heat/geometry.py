"""Where image tokens lie in the picture that was given. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Boxes: TypeAlias = npt.NDArray[np.float64]
"""(n_tokens, 4): left, top, right, bottom in pixels of the picture; NaN where a token shows none of
it: padding, the end of a row."""


@dataclass(frozen=True, eq=False)
class Tile:
    """One view of a picture that the image encoder was given: the whole of it, or a part.

    first, n_tokens: its image tokens, counted over all pictures of the prompt. boxes: of them, or
    None where their places are not known.
    """

    first: int
    n_tokens: int
    boxes: Boxes | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as its image tokens see it.

    width, height: pixels, upright, as `cmg_gguf.prompt.images.load_image` reads it. tiles: its
    views, in the order of the prompt. unknown: why the places of its tokens are not known; "" =
    they are.
    """

    width: int
    height: int
    tiles: tuple[Tile, ...]
    unknown: str = ""

    @property
    def first(self) -> int:
        """The first of its image tokens."""
        return self.tiles[0].first

    @property
    def n_tokens(self) -> int:
        """Image tokens of all its tiles. They stand in a row."""
        return sum(tile.n_tokens for tile in self.tiles)

    @property
    def boxes(self) -> Boxes | None:
        """(n_tokens, 4) of all its tiles; None where they are not known."""
        found = [tile.boxes for tile in self.tiles if tile.boxes is not None]
        return np.concatenate(found) if len(found) == len(self.tiles) else None
