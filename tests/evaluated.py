"""What tests of benchmarks share: files on the spot, and figures as plain numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmg_gguf.evaluation.statistics import sums, table
from cmg_gguf.evaluation.task import BadItem, Item, Task


def write_images(folder: Path, names: Iterable[str]) -> Path:
    """A folder with a small picture under each name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (200, 30, 60)).save(path)
    return folder


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """JSON lines; a record that is a str is written as it is."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def good(task: Task) -> list[Item]:
    """The task's items; a bad one fails the test."""
    found = list(task.items())
    bad = [item for item in found if isinstance(item, BadItem)]
    assert not bad
    return [item for item in found if isinstance(item, Item)]


def bad(task: Task) -> dict[str, str]:
    """The problems of the task's bad items by their places."""
    return {item.where: item.problem for item in task.items() if isinstance(item, BadItem)}


def figures(task: Task, answers: Mapping[str, str], part: str | None = None) -> dict[str, float]:
    """The figures of a part, or of all, from answers by item id."""
    items = [item for item in good(task) if part in (None, item.part)]
    totals = sums(table(task, items, [answers[item.id] for item in items]))
    return {name: float(value) for name, value in task.figures(totals).items()}


def labels(task: Task) -> dict[str, str]:
    """The true answers of yes/no items by id."""
    return {item.id: str(item.truth["label"]).capitalize() for item in good(task)}


def check_figures_are_sound(task: Task, answers: Mapping[str, str]) -> None:
    """What holds for every task: no figure depends on the order of items, none divides by zero."""
    items = good(task)
    first = task.figures(sums(table(task, items, [answers[i.id] for i in items])))
    turned = items[::-1]
    second = task.figures(sums(table(task, turned, [answers[i.id] for i in turned])))
    assert {k: str(v) for k, v in first.items()} == {k: str(v) for k, v in second.items()}
    totals = sums(table(task, items, [answers[i.id] for i in items]))
    stacked = {name: np.array([value, 0.0]) for name, value in totals.items()}
    for name, values in task.figures(stacked).items():
        assert values.shape == (2,), name
        np.testing.assert_array_equal(values[0], first[name])
        assert np.isnan(values[1]), name
    for value in task.figures({}).values():
        assert np.isnan(value)
