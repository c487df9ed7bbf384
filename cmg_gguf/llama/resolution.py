"""How many tokens a picture takes, where its size decides: measured, and kept to limits.

Some image encoders take pictures of any resolution, and then one photograph can be more tokens than
the context holds. llama.cpp has a lower and an upper limit for them (--image-min-tokens,
--image-max-tokens); which models heed them, and what their own limits are, is not in their files.
So it is measured, on sizes alone: nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral

from cmg_gguf.errors import UnsupportedError, shown
from cmg_gguf.llama.projector import SHAPES, Projector

SMALL = (32, 32)
LARGE = SHAPES[::32]
SLACK = 1.25
"""A limit is heeded where it is kept to by so much: some models round, or mark ends of rows."""


@dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """Limits of the tokens of a picture, or of a tile where it is cut into some; None = the
    model's own. Raises UnsupportedError for what cannot be."""

    fewest: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("image_min_tokens", self.fewest), ("image_max_tokens", self.most)):
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if value is not None and not (whole and 1 <= value < 2**20):
                raise UnsupportedError(
                    f"{name}={shown(value)} is out of range: whole numbers from 1 to {2**20 - 1}, "
                    "or None for the model's own limit"
                )
        if self.fewest and self.most and self.fewest > self.most:
            raise UnsupportedError(
                f"image_min_tokens={self.fewest} is above image_max_tokens={self.most}; lower one "
                "or raise the other"
            )


@dataclass(frozen=True)
class Measured:
    """Tokens of a small picture and of large ones, in one piece; is_cut: whether large ones are in
    several."""

    fewest: int
    most: int
    is_cut: bool

    @property
    def by_size(self) -> bool:
        """Whether a picture's size decides how many tokens it takes, all in one piece."""
        return self.most > self.fewest and not self.is_cut


def measured(projector: Projector) -> Measured:
    """What pictures take with this projector as it was opened. Nothing is computed."""
    small, *large = (
        [piece.n_tokens for piece in projector.pieces_of(*shape)] for shape in (SMALL, *LARGE)
    )
    most = max(max(pieces) for pieces in large)
    return Measured(max(small), most, any(len(pieces) > 1 for pieces in large))


def limited(make: Callable[[ImageTokens], Projector], asked: ImageTokens, share: int) -> Projector:
    """The projector with these limits.

    make: opens it. share: tokens that a picture may take where `asked.most` is None and its size
    decides; a model whose own limit is higher is opened anew. Raises UnsupportedError for a limit
    that the model does not heed.
    """
    projector = make(asked)
    found = measured(projector)
    try:
        _check_heeded(asked, found)
    except UnsupportedError:
        projector.close()
        raise
    share = max(share, asked.fewest or 1)
    if asked.most is None and found.by_size and found.fewest <= share < found.most:
        projector.close()
        projector = make(replace(asked, most=share))
    return projector


def _check_heeded(asked: ImageTokens, found: Measured) -> None:
    if asked.most is not None and found.most > asked.most * SLACK:
        raise UnsupportedError(
            f"image_max_tokens={asked.most} has no effect: a picture takes {found.most} tokens "
            "with this model; leave it out, or raise n_ctx where pictures do not fit"
        )
    if asked.fewest is not None and found.fewest < asked.fewest / SLACK:
        raise UnsupportedError(
            f"image_min_tokens={asked.fewest} has no effect: a picture takes {found.fewest} tokens "
            "with this model; leave it out"
        )
