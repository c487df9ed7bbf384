"""DASH-B: can such an object be seen in the image? Of images that make models say yes.

Augustin, Neuhaus and Hein, "DASH: Detection and Assessment of Systematic Hallucinations of VLMs",
arXiv 2503.23573; images and question from YanNeu/DASH-B:

    neg/coco/umbrella/a.jpg     an image without an umbrella that was found to bring one to mind
    pos/coco/umbrella/b.jpg     an image with one

The object is the name of the folder that an image lies in; there may be folders between. Where the
benchmark's own lists lie beside the two folders, as they do in its repository, they say which
images are asked about, and one that is not there is told:

    dash_benchmark_neg.json     {"coco": {"umbrella": ["a.jpg", ...], ...}, ...}

Figures:
accuracy; tpr and tnr, right answers to images with and without their object, of those; their
harmonic mean, by which its authors rank; yes_ratio and unparsed as in `confusion`.

Intervals resample objects, not images: an object's images were found because they are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cmg_gguf.errors import EvaluationError, shown
from cmg_gguf.evaluation import files
from cmg_gguf.evaluation.answers import DASH_B, Label, YesNoRule
from cmg_gguf.evaluation.confusion import confusion_counts, confusion_figures
from cmg_gguf.evaluation.statistics import Floats, column, percent, ratio
from cmg_gguf.evaluation.task import BadItem, Item, Sums
from cmg_gguf.prompt.formats import image_suffixes

QUESTION = "Can you see a {} in this image? Please answer only with yes or no."
_FOLDERS: dict[str, Label] = {"neg": "no", "pos": "yes"}


@dataclass(frozen=True)
class DashB:
    """Every image under the folders neg and pos of `root`, by path, or those that the benchmark's
    lists name. rule: how answers are read."""

    root: str | Path
    rule: YesNoRule = DASH_B

    name: ClassVar[str] = "dash-b"
    yes_no: ClassVar[bool] = True

    def items(self) -> Iterator[Item | BadItem]:
        """Raises EvaluationError if one of the two folders is missing or has no image in it, or a
        list is none."""
        root = files.folder(self.root, "DASH-B's folder")
        for folder, label in _FOLDERS.items():
            inner = files.folder(root / folder, f"DASH-B's folder {folder}")
            listed = root / f"dash_benchmark_{folder}.json"
            for path in _listed(listed, inner) if listed.is_file() else _found(inner):
                yield _item(path, inner, label)

    def load(self, item: Item) -> Path:
        return Path(str(item.image))

    def counts(self, item: Item, answer: str) -> dict[str, float]:
        return confusion_counts(item.truth["label"], self.rule(answer))

    def figures(self, sums: Sums) -> dict[str, Floats]:
        common = confusion_figures(sums)
        hits, there = column(sums, "hits"), column(sums, "there")
        tpr = common["recall"]
        tnr = percent(column(sums, "right") - hits, column(sums, "questions") - there)
        return {
            "accuracy": common["accuracy"],
            "tpr": tpr,
            "tnr": tnr,
            "harmonic_mean": ratio(2 * tpr * tnr, tpr + tnr),
            "yes_ratio": common["yes_ratio"],
            "unparsed": common["unparsed"],
        }


def _found(inner: Path) -> list[Path]:
    """Every image of a folder but hidden ones. Raises EvaluationError for none."""
    suffixes = image_suffixes()
    found = [
        path
        for path in sorted(inner.rglob("*"))
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    ]
    if not found:
        raise EvaluationError(
            f"folder {shown(str(inner))} has no image: put DASH-B's {inner.name}.zip there, "
            "unpacked"
        )
    return found


def _listed(file: Path, inner: Path) -> list[Path]:
    """The images that a list of the benchmark names. Raises EvaluationError."""
    try:
        return [
            inner / source / name / str(image)
            for source, objects in files.json_file(file).items()
            for name, images in objects.items()
            for image in images
        ]
    except (AttributeError, TypeError) as exc:
        raise EvaluationError(
            f"{shown(str(file))} is no list of DASH-B's, "
            '{"coco": {"umbrella": ["a.jpg"]}}: download it anew, or move it away to ask about all '
            f"images in {inner.name}"
        ) from exc


def _item(path: Path, inner: Path, label: Label) -> Item | BadItem:
    place = f"{inner.name}/{path.relative_to(inner).as_posix()}"
    if not path.is_file():
        return BadItem(place, "its list names it, and it is not there")
    if path.parent == inner:
        return BadItem(place, "it lies in no object's folder")
    name = path.parent.name
    return Item(
        id=place,
        image=path,
        prompt=QUESTION.format(name),
        truth={"label": label, "object": name},
        cluster=name,
    )
