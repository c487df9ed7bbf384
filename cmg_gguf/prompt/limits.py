"""How many pixels a picture may have."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from cmg_gguf.errors import ImageError, shown

MAX_PIXELS = 64_000_000
"""Default limit of the pixels that are decoded."""


def checked_max_pixels(max_pixels: Any) -> int | None:
    """The limit as it is given. Raises ImageError for what is none."""
    whole = isinstance(max_pixels, Integral) and not isinstance(max_pixels, bool)
    if max_pixels is not None and not (whole and max_pixels >= 1):
        raise ImageError(
            f"max_pixels={shown(max_pixels)} is out of range: whole numbers from 1 up, or None for "
            f"{MAX_PIXELS}"
        )
    return None if max_pixels is None else int(max_pixels)


def check_size(width: int, height: int, name: str, limits: dict[str, int], share: int = 1) -> None:
    """Raise if there are no pixels, or more than one of `limits`, which has a setting's name.

    share: of so many pixels one counts.
    """
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height}): each side must be at least 1")
    for setting, limit in limits.items():
        if width * height > limit * share:
            flag = " (--max-pixels)" if setting == "max_pixels" else ""
            raise ImageError(
                f"{name} has {width} x {height} = {width * height} pixels and the limit is "
                f"{limit * share}: scale it down or raise {setting}{flag}, now {limit}"
            )
