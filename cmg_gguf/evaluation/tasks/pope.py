"""POPE: is there such an object in the image? And files in its format, such as RePOPE's.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023; files from
RUCAIBox/POPE, JSON lines:

    {"question_id": 1, "image": "COCO_val2014_000000016631.jpg",
     "text": "Is there a person in the image?", "label": "yes"}

A list of such records in one JSON file is read as well; a label may be true or false, 1 or 0, an
image may lack its suffix, and without a question_id image and question tell records apart. Where a
record has a "category", that is its part, and ids need differ within it alone.

Nothing is assumed of how many questions there are, of an image or in all, or of how many are about
absent objects: POPE asks six of each of 500 images, half of them about absent ones; RePOPE
(arXiv 2504.15707; YanNeu/RePOPE) leaves out what is ambiguous and corrects labels, so its files
are neither complete nor balanced.

In POPE, absent objects are drawn at random, from the most frequent ones ("popular"), or from those
that often come with what is there ("adversarial"). Figures: see `confusion`; the positive class is
yes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from cmg_gguf.errors import EvaluationError, shown
from cmg_gguf.evaluation.answers import POPE, YesNoRule
from cmg_gguf.evaluation.confusion import confusion_counts, confusion_figures
from cmg_gguf.evaluation.files import (
    Record,
    field,
    folder,
    image_in,
    items_of,
    json_lines_or_records,
    label_under,
)
from cmg_gguf.evaluation.statistics import Floats
from cmg_gguf.evaluation.task import BadItem, Item, Sums

_PART = re.compile("random|popular|adversarial")


@dataclass(frozen=True)
class Pope:
    """POPE's question files over one folder of images.

    files: of different names; a part is called as its records' "category" says; else random,
    popular or adversarial if the file's name, and no other's, says so; else like the file. suffix:
    put behind every question. rule: how answers are read.
    """

    files: Sequence[str | Path]
    images: str | Path
    rule: YesNoRule = POPE
    suffix: str = ""

    name: ClassVar[str] = "pope"
    yes_no: ClassVar[bool] = True

    def items(self) -> Iterator[Item | BadItem]:
        """Raises EvaluationError if a file or the folder is missing, or two files share a name."""
        paths = [Path(file) for file in self.files]
        stems = [path.stem for path in paths]
        if len(set(stems)) < len(stems):
            raise EvaluationError(
                f"question files {shown(stems)} share a name: rename one, so that ids differ"
            )
        images = folder(self.images, "image folder")
        named = [found[0] if (found := _PART.search(s.lower())) else s for s in stems]
        for path, part in zip(paths, named, strict=True):
            # POPE's and RePOPE's figures are not one, if both are asked about in one run.
            part = part if named.count(part) == 1 else path.stem
            make = partial(self._item, path, part, images)
            yield from items_of(json_lines_or_records(path), make)

    def _item(self, path: Path, part: str, images: Path, record: Record) -> Item:
        image, text = field(record, "image"), field(record, "text")
        number = field(record, "question_id") if "question_id" in record else f"{image}: {text}"
        place = path.stem
        if "category" in record:
            part = field(record, "category")
            place = f"{place}/{part}"
        return Item(
            id=f"{place}/{number}",
            image=image_in(images, image),
            prompt=text + self.suffix,
            truth={"label": label_under(record, "label")},
            part=part,
            cluster=image,
        )

    def load(self, item: Item) -> Path:
        return Path(str(item.image))

    def counts(self, item: Item, answer: str) -> dict[str, float]:
        return confusion_counts(item.truth["label"], self.rule(answer))

    def figures(self, sums: Sums) -> dict[str, Floats]:
        return confusion_figures(sums)
