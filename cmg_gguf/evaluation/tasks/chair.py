"""CHAIR on COCO: captions whose objects are compared with the annotations of the image.

Files: `instances_*.json` and, better, `captions_*.json` of a COCO release, for example

    {"images": [{"id": 9, "file_name": "000000000009.jpg"}],
     "annotations": [{"image_id": 9, "category_id": 51}],   # captions: "caption": "a plate of ..."
     "categories": [{"id": 51, "name": "bowl"}]}

What is there: the categories of the image's instances, and the objects that its reference captions
name. An id may be a text in one file and a number in the other. Figures: see `mentions`.

What differs from the official scorer (Maxlinn/CHAIR-metric-standalone, LisaAnne/Hallucination): the
words for a category are our own table (`coco_words`); instead of singulars of all words of a
caption (nltk, pattern), the plurals of the words of the table are looked up; hyphens part words;
recall is of distinct objects, pooled. As there, "orange" is an object even where it is a colour. So
compare figures between methods of one run, and not with published ones to the last digit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cmg_gguf.errors import EvaluationError, shown
from cmg_gguf.evaluation import files
from cmg_gguf.evaluation.mentions import caption_counts, caption_figures
from cmg_gguf.evaluation.statistics import Floats
from cmg_gguf.evaluation.task import BadItem, Item, Sums
from cmg_gguf.evaluation.tasks.coco_words import CATEGORIES, lexicon
from cmg_gguf.evaluation.words import Lexicon

PROMPT = "Please describe this image in detail."


@dataclass(frozen=True)
class Chair:
    """Captions of the images of a COCO annotation file.

    captions: reference captions; None = instances alone, which takes true mentions of unannotated
    objects for hallucinations. n: so many images drawn at random by `seed`; None = all. Categories
    that are not COCO's are looked up by their own name.
    """

    instances: str | Path
    images: str | Path
    captions: str | Path | None = None
    n: int | None = None
    seed: int = 0
    prompt: str = PROMPT
    max_tokens: int = 512

    name: ClassVar[str] = "chair"
    yes_no: ClassVar[bool] = False

    def items(self) -> Iterator[Item | BadItem]:
        """Raises EvaluationError if a file or the folder is missing, or is no COCO annotation."""
        images = files.folder(self.images, "image folder")
        source = Path(self.instances)
        present = self._present()
        records = list(enumerate(_list(self._annotations, "images", source)))
        if self.n is not None and self.n < len(records):
            if self.n < 1:
                raise EvaluationError(f"n={self.n} images: give at least 1, or None for all")
            drawn = np.random.default_rng(self.seed).permutation(len(records))[: self.n]
            records = [records[i] for i in sorted(drawn)]

        def item(record: files.Record) -> Item:
            image, id_ = files.field(record, "file_name"), files.field(record, "id")
            if id_ not in present and self.captions is not None:
                raise files.RecordError(
                    f"image {shown(image)} of id {shown(id_)} has neither instances nor captions"
                )
            return Item(
                id=id_,
                image=files.image_in(images, image),
                prompt=self.prompt,
                truth={"objects": sorted(present.get(id_, ()))},
                cluster=image,
                max_tokens=self.max_tokens,
            )

        named = ((f"{source.name} images[{index}]", record) for index, record in records)
        yield from files.items_of(named, item)

    def load(self, item: Item) -> Path:
        return Path(str(item.image))

    def counts(self, item: Item, answer: str) -> dict[str, float]:
        return caption_counts(answer, self._lexicon.find(answer), item.truth["objects"])

    def located(self, answer: str) -> list[tuple[str, int]]:
        return self._lexicon.located(answer)

    def figures(self, sums: Sums) -> dict[str, Floats]:
        return caption_figures(sums)

    @cached_property
    def _annotations(self) -> dict[str, Any]:
        return _annotations(Path(self.instances))

    @cached_property
    def _categories(self) -> dict[str, str]:
        rows = _list(self._annotations, "categories", Path(self.instances))
        return {
            str(_get(row, "id", self.instances)): _get(row, "name", self.instances) for row in rows
        }

    @cached_property
    def _lexicon(self) -> Lexicon:
        return lexicon(name for name in self._categories.values() if name not in CATEGORIES)

    def _present(self) -> dict[str, set[str]]:
        """The objects of each image by its id. Raises EvaluationError also for files that are about
        no image of these."""
        source = Path(self.instances)
        found: dict[str, set[str]] = {}
        for row in _list(self._annotations, "annotations", source):
            category = self._categories.get(str(_get(row, "category_id", source)))
            if category is None:
                raise EvaluationError(
                    f"{shown(str(source))} has category_id {shown(row['category_id'])}, which is "
                    "not among its categories: download it anew"
                )
            found.setdefault(str(_get(row, "image_id", source)), set()).add(category)
        self._check_about(found, source)
        if self.captions is not None:
            source, named = Path(self.captions), dict[str, set[str]]()
            for row in _list(_annotations(source), "annotations", source):
                objects = self._lexicon.find(str(_get(row, "caption", source)))
                named.setdefault(str(_get(row, "image_id", source)), set()).update(objects)
            self._check_about(named, source)
            for id_, objects_of in named.items():
                found.setdefault(id_, set()).update(objects_of)
        return found

    def _check_about(self, found: Mapping[str, object], source: Path) -> None:
        """Raises EvaluationError where none of what a file says is about one of the images."""
        records = _list(self._annotations, "images", Path(self.instances))
        ids = {
            str(record["id"]) for record in records if isinstance(record, dict) and "id" in record
        }
        if not ids or ids & set(found):
            return
        about = f"image_id {shown(next(iter(found)))}, ..." if found else "none at all"
        raise EvaluationError(
            f"{shown(str(source))} is not about these images: it has annotations of {about} and "
            f"{shown(str(self.instances))} lists id {shown(min(ids))}, ...; give files of one "
            "release"
        )


def _annotations(path: Path) -> dict[str, Any]:
    found = files.json_file(path)
    if not isinstance(found, dict):
        raise EvaluationError(f"{shown(str(path))} is no COCO annotation file: give one")
    return found


def _list(annotations: dict[str, Any], key: str, source: Path) -> list[Any]:
    found = annotations.get(key)
    if not isinstance(found, list):
        raise EvaluationError(
            f"{shown(str(source))} has no list of {key}: give a COCO instances_*.json, and "
            "captions_*.json for the captions"
        )
    return found


def _get(row: Any, key: str, source: str | Path) -> Any:
    if not isinstance(row, dict) or key not in row:
        raise EvaluationError(
            f"{shown(str(source))} has a record without {shown(key)}: {shown(row)}"
        )
    return row[key]
