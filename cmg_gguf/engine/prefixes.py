"""Which prompts are kept, and how far a new one begins like them. Bookkeeping only.

    items = items_of(prompt)             # its text tokens, and each image as one item
    n_common(items, kept.items)          # how many they begin with alike
    store.add(Prefix(...))               # newest, until others are used
    store.n_cells()                      # KV cells that all of them hold, shared ones once

A false hit is impossible: two items are equal if they are the same token, or images of the same
key, which stands for all that enters the image's rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cmg_gguf.prompt.segments import ImageSegment, Prompt


@dataclass(frozen=True)
class ImageItem:
    """An image among the items of a prompt: what it is, its rows and its positions."""

    key: Hashable
    n_rows: int
    n_pos: int


Item: TypeAlias = int | ImageItem
Cells: TypeAlias = npt.NDArray[np.int64]
"""(n_rows,): a name for the KV cell of each row. Rows that share a cell have the same name."""

NO_CELLS: Cells = np.empty(0, np.int64)


def items_of(prompt: Prompt) -> tuple[Item, ...]:
    """The prompt's items. An image without a key is like no other, not even itself. A salt is an
    item in front that takes no row."""
    items: list[Item] = [] if prompt.salt is None else [salt_item(prompt.salt)]
    for segment in prompt.segments:
        if isinstance(segment, ImageSegment):
            key = object() if segment.key is None else segment.key
            items.append(ImageItem(key, segment.n_tokens, segment.n_pos))
        else:
            items += segment.tokens.tolist()
    return tuple(items)


def salt_item(salt: str) -> ImageItem:
    """What stands in front of the items of a prompt with this salt."""
    return ImageItem(("salt", salt), 0, 0)


def n_common(a: Sequence[Item], b: Sequence[Item]) -> int:
    """How many items two prompts begin with alike."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


def n_rows(items: Sequence[Item]) -> int:
    """Rows that the items take."""
    return sum(item.n_rows if isinstance(item, ImageItem) else 1 for item in items)


def n_positions(items: Sequence[Item]) -> int:
    """Positions that the items take."""
    return sum(item.n_pos if isinstance(item, ImageItem) else 1 for item in items)


def n_image_rows(items: Sequence[Item]) -> int:
    """Rows of the images among the items."""
    return sum(item.n_rows for item in items if isinstance(item, ImageItem))


def head(items: Sequence[Item], most_rows: int) -> tuple[Item, ...]:
    """The most items from the start that take at most `most_rows` rows."""
    rows = 0
    for i, item in enumerate(items):
        rows += item.n_rows if isinstance(item, ImageItem) else 1
        if rows > most_rows:
            return tuple(items[:i])
    return tuple(items)


@dataclass(frozen=True, eq=False)
class Prefix:
    """A kept prompt, with as much of its answer as was decoded.

    slot: where it lies. original, degraded: the cells of each branch's rows; the degraded branch's
    are all kept or none. variant: what the degraded rows depend on besides the items.
    """

    slot: int
    items: tuple[Item, ...]
    original: Cells
    degraded: Cells
    variant: Hashable

    @property
    def cells(self) -> Cells:
        """Cells of both branches; shared ones appear twice."""
        return np.concatenate([self.original, self.degraded])


class PrefixStore:
    """Kept prefixes in the order of their last use, at most one in each slot."""

    def __init__(self, n_slots: int) -> None:
        self._n_slots = n_slots
        self._prefixes: list[Prefix] = []  # oldest first

    def __iter__(self) -> Iterator[Prefix]:
        """Newest first. The store may be changed meanwhile."""
        return iter(self._prefixes[::-1])

    def __len__(self) -> int:
        return len(self._prefixes)

    @property
    def oldest(self) -> Prefix | None:
        """The one whose last use is longest ago."""
        return self._prefixes[0] if self._prefixes else None

    @property
    def free_slot(self) -> int | None:
        """A slot without a prefix."""
        taken = {prefix.slot for prefix in self._prefixes}
        return next((slot for slot in range(self._n_slots) if slot not in taken), None)

    def add(self, prefix: Prefix) -> None:
        """Puts in a prefix as the newest."""
        self._prefixes.append(prefix)

    def touch(self, prefix: Prefix) -> None:
        """Makes a prefix the newest."""
        self._prefixes.remove(prefix)
        self._prefixes.append(prefix)

    def remove(self, prefix: Prefix) -> None:
        """Takes a prefix out."""
        self._prefixes.remove(prefix)

    @property
    def cells(self) -> Cells:
        """Cells that the prefixes hold; shared ones appear several times."""
        return np.concatenate([NO_CELLS, *(prefix.cells for prefix in self._prefixes)])

    def n_cells(self, *, beside: Cells = NO_CELLS) -> int:
        """KV cells that the prefixes hold and that are not among `beside`; shared ones once."""
        return len(np.setdiff1d(self.cells, beside))

    def superseded(self, items: Sequence[Item], *, whole: bool = False) -> list[Prefix]:
        """Prefixes that begin like `items` and have all their images in that part. whole: they are
        reused as a whole, so that one that ends in a picture is superseded by its like alone."""
        begun = [
            prefix
            for prefix in self._prefixes
            if (n := n_common(prefix.items, items)) and not n_image_rows(prefix.items[n:])
        ]
        if not whole:
            return begun
        contained = [p for p in begun if n_common(p.items, items) == len(p.items)]
        return [p for p in contained if len(p.items) == len(items) or isinstance(p.items[-1], int)]
