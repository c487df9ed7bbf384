"""What a benchmark is: items, and counts that add up to its figures.

An item is one question about one image. A task turns an answer to it into counts (true positives,
hallucinated mentions, ...), and sums of counts over any set of items into figures in percent. So a
figure of a part, of a bootstrap sample, or of a merged run is the same function of other sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cmg_gguf.prompt.images import ImageSource

Counts = Mapping[str, float]
Sums = Mapping[str, npt.NDArray[np.float64]]
"""Sums of counts by name, of one shape: () for one set of items, (n,) for n bootstrap samples."""


@dataclass(frozen=True)
class Item:
    """One question about one image.

    id: unique within the task's files, stable between runs. image: where the image is, for
    `Task.load`; None = a question about no image. part: the subset that is reported apart
    ("random", "adversarial", ...). cluster: items with the same cluster are resampled together (the
    image, as a rule). truth: whatever `Task.counts` needs; plain JSON values. Of a yes/no item
    `truth["label"]` is "yes" or "no", and no other item has a label.
    """

    id: str
    image: str | Path | None
    prompt: str
    truth: Mapping[str, Any] = field(default_factory=dict)
    part: str = "all"
    cluster: str = ""
    max_tokens: int = 16


@dataclass(frozen=True)
class BadItem:
    """A line or record that is no item: where it stands and what is wrong with it."""

    where: str
    problem: str


class Task(Protocol):
    """A benchmark. Pure but for reading its files."""

    @property
    def name(self) -> str: ...

    @property
    def yes_no(self) -> bool:
        """Whether every item is a yes/no question: then the yes-bias method applies to all."""
        ...

    def items(self) -> Iterable[Item | BadItem]:
        """Every item in file order; what cannot be read comes as a BadItem, never silently."""
        ...

    def load(self, item: Item) -> ImageSource:
        """What `load_image` takes of an item that has an image. Raises ImageError."""
        ...

    def counts(self, item: Item, answer: str) -> Counts:
        """What one answer adds to the sums. The names do not depend on the answer."""
        ...

    def figures(self, sums: Sums) -> dict[str, npt.NDArray[np.float64]]:
        """Figures by name (snake_case), in percent unless the task says otherwise; nan = undefined.

        Shapes as in `sums`. Never divides by zero.
        """
        ...


@dataclass(frozen=True)
class Mention:
    """An object that an answer names: characters `start` to `end` - 1 of it. present: whether it is
    in the image."""

    name: str
    start: int
    end: int
    present: bool


@runtime_checkable
class NamesObjects(Protocol):
    """A task whose answers are captions, of which reports tell more than its figures: hallucination
    in captions of equal length, and what kinds of words a method changes."""

    def mentions(self, item: Item, answer: str) -> Sequence[Mention]:
        """The objects that the answer names, in order, each as often as it is named."""
        ...


@runtime_checkable
class CountsByCluster(Protocol):
    """A task some of whose counts are about several answers: both questions of an image right.

    `statistics.table` calls `cluster_counts` instead of `counts` where there is one; nobody else
    needs to know of it.
    """

    def cluster_counts(self, answered: Sequence[tuple[Item, str]]) -> Counts:
        """What the answers to the items of one cluster add to the sums, in any order."""
        ...
