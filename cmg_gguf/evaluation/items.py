"""The items of a task: read, identified, grouped by image, and cut into parts.

Whatever is drawn here depends on the item alone, never on its place: order, shards and processes
do not change a run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.task import BadItem, Item, Task
from cmg_gguf.sampling import MAX_SEED

Group = tuple[Item, ...]
"""Items about the same image, in file order."""


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 1: every count-th image group.

    Raises EvaluationError.
    """

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise EvaluationError(
                f"shard {self.index}/{self.count} is out of range: 1/{max(self.count, 1)} to "
                f"{max(self.count, 1)}/{max(self.count, 1)}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard of "2/3". Raises EvaluationError."""
        index, slash, count = text.partition("/")
        if not (slash and index.strip().isdecimal() and count.strip().isdecimal()):
            raise EvaluationError(f"shard {text!r} is none: write 2/3 for the second of three")
        return cls(int(index), int(count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, groups: Sequence[Group]) -> list[Group]:
        """The groups of this part."""
        return list(groups[self.index - 1 :: self.count])


WHOLE = Shard()
"""Not cut at all."""


@dataclass(frozen=True)
class Read:
    """What a task's files held: items in file order, and what was no item."""

    items: tuple[Item, ...]
    bad: tuple[BadItem, ...]


def read_items(
    task: Task, *, limit: int | None = None, leave_out: frozenset[str] = frozenset()
) -> Read:
    """The first `limit` items and what was no item among them.

    leave_out: hashes of items to pass over; they do not count. An id that was there before makes a
    BadItem. Raises EvaluationError for a limit below 1, for no items, and what the task raises.
    """
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit={limit} is out of range: 1 and up, or none")
    items: dict[str, Item] = {}
    bad: list[BadItem] = []
    for found in task.items():
        if isinstance(found, BadItem):
            bad.append(found)
        elif found.id in items:
            bad.append(BadItem(found.id, "an item of this id was there before"))
        elif item_hash(task.name, found) not in leave_out:
            items[found.id] = found
            if len(items) == limit:
                break
    if not items:
        broken = f" ({first_reason(bad)})" if bad else ""
        raise EvaluationError(f"{task.name} has no items to ask about{broken}; check its files")
    return Read(tuple(items.values()), tuple(bad))


def first_reason(bad: Sequence[BadItem]) -> str:
    """How many there are, why the first is broken, and how many are so for the same reason.

    9,000 broken: the first, pope.json:1: image 'a.jpg' is not in the image folder; 8,999 more alike
    """
    first = bad[0]
    text = f"{len(bad):,} broken: the first, {first.where}: {first.problem}"
    alike = sum(_kind(other.problem) == _kind(first.problem) for other in bad) - 1
    return f"{text}; {alike:,} more alike" if alike else text


_NAMED = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


def _kind(problem: str) -> str:
    """A reason without the names and numbers in it."""
    return _NAMED.sub("…", problem)


def groups(items: Iterable[Item]) -> list[Group]:
    """The items by image, groups and items by first appearance. Without an image: each its own."""
    found: dict[str, list[Item]] = {}
    for item in items:
        key = f"image {item.image}" if item.image is not None else f"item {item.id}"
        found.setdefault(key, []).append(item)
    return [tuple(group) for group in found.values()]


def item_hash(task: str, item: Item) -> str:
    """16 hex digits: the task's name, id, image file name and prompt of an item."""
    image = None if item.image is None else Path(item.image).name
    return _digest(task, item.id, image, item.prompt)[:16]


def items_digest(items: Iterable[Item]) -> str:
    """64 hex digits of all there is to the items, in order; folders of images do not enter."""
    digest = hashlib.sha256()
    for item in items:
        image = None if item.image is None else Path(item.image).name
        digest.update(_digest(*{**asdict(item), "image": image}.values()).encode())
    return digest.hexdigest()


def seed_of(seed: int, *names: str) -> int:
    """A seed for one draw, 0 to 2**32 - 2: of the run's seed and what names the draw."""
    return int(_digest(seed, *names)[:16], 16) % (MAX_SEED + 1)


def in_part(seed: int, item: Item, share: float) -> bool:
    """Whether an item falls into a random part of about `share` of all images.

    Items of one cluster fall on the same side.
    """
    return seed_of(seed, "part", _cluster(item)) / (MAX_SEED + 1) < share


def balanced_parts(seed: int, items: Sequence[Item]) -> dict[str, int]:
    """0 or 1 for each item by id: two random halves of the clusters, equal in number up to one."""
    clusters = {_cluster(item) for item in items}
    order = sorted(clusters, key=lambda cluster: (seed_of(seed, "half", cluster), cluster))
    half = {cluster: i % 2 for i, cluster in enumerate(order)}
    return {item.id: half[_cluster(item)] for item in items}


def _cluster(item: Item) -> str:
    return item.cluster or (item.id if item.image is None else Path(item.image).name)


def _digest(*values: Any) -> str:
    text = json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
