"""AMBER: descriptions whose objects are annotated, and yes/no questions on what is there.

Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation",
arXiv 2311.07397. Files of junyangwang0410/AMBER, folder `data`:

    query/query_all.json  [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}, ...]
    annotations.json      [{"id": 1, "type": "generative", "truth": ["sky", ...], "hallu": [...]},
                           {"id": 1005, "type": "discriminative-hallucination", "truth": "no"}, ...]
    relation.json         {"grass": ["ground"], ...}  words that stand for an object as well
    safe_words.txt        words that are never hallucinations, one a line

Of descriptions: chair, hallucinated mentions of all mentions; cover, annotated objects that are
named; hal, descriptions with a hallucination; cog, objects people tend to expect ("hallu") that are
named; all pooled, of distinct objects. Of questions: as in `confusion`, but No is the positive
class. amber_score = (100 - chair + f1) / 2. Parts: generative, existence, attribute, relation.

What differs from the official scorer: a mention is any word of the vocabulary in the singular or
plural, not a noun by a tagger (so that words like "can" count only behind an article); words stand
for an object by relation.json alone, without the similarity of word vectors, which makes chair
higher and cover lower than there; a word covers the object of that name before one it is only
related to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from cmg_gguf.errors import EvaluationError, shown
from cmg_gguf.evaluation import files
from cmg_gguf.evaluation.answers import STRICT, YesNoRule
from cmg_gguf.evaluation.confusion import confusion_counts, confusion_figures
from cmg_gguf.evaluation.statistics import Floats, column, percent, ratio
from cmg_gguf.evaluation.task import BadItem, Item, Sums
from cmg_gguf.evaluation.words import Lexicon, with_plurals

GUARDED = (
    *("can", "watch", "drink", "sound", "support", "hot", "file", "leave", "sailing", "drawing"),
    *("spray", "ring", "core", "stage", "lock", "switch", "tape", "skate", "ski", "note", "pack"),
)
"""Words of AMBER's lists that are often verbs or adjectives, in the singular."""


@dataclass(frozen=True)
class Amber:
    """The queries of AMBER's files.

    data: the folder with annotations.json, relation.json and safe_words.txt. images: of the images.
    queries: query files; None = all of them. max_tokens: of descriptions. suffix: put behind every
    yes/no question. rule: how answers are read; the official scorer takes bare Yes or No.
    """

    data: str | Path
    images: str | Path
    queries: Sequence[str | Path] | None = None
    rule: YesNoRule = STRICT
    suffix: str = " Please answer yes or no."
    max_tokens: int = 512

    name: ClassVar[str] = "amber"

    @cached_property
    def yes_no(self) -> bool:
        annotations = self._annotations
        records = chain.from_iterable(files.json_records(path) for path in self._query_files)
        ids = [str(r["id"]) for _, r in records if isinstance(r, dict) and "id" in r]
        return all(annotations.get(i, {}).get("type") != "generative" for i in ids)

    def items(self) -> Iterator[Item | BadItem]:
        """Raises EvaluationError if a file or folder is missing or not as the official one."""
        images = files.folder(self.images, "image folder")
        self._related  # noqa: B018  a bad file is told before the first item
        records = chain.from_iterable(files.json_records(path) for path in self._query_files)
        yield from files.items_of(records, partial(self._item, images))

    def _item(self, images: Path, record: files.Record) -> Item:
        id_, image = files.field(record, "id"), files.field(record, "image")
        annotation = self._annotations.get(id_)
        if annotation is None:
            raise files.RecordError(f"id {shown(id_)} is not in annotations.json")
        part = _part(files.field(annotation, "type"))
        query = files.field(record, "query")
        path = files.image_in(images, image)
        if part == "generative":
            truth = {key: files.words_under(annotation, key) for key in ("truth", "hallu")}
            return Item(id_, path, query, truth, part, image, self.max_tokens)
        label = files.yes_or_no(files.field(annotation, "truth"), "truth")
        return Item(id_, path, query + self.suffix, {"label": label}, part, image)

    def load(self, item: Item) -> Path:
        return Path(str(item.image))

    def counts(self, item: Item, answer: str) -> dict[str, float]:
        if item.part != "generative":
            return confusion_counts(item.truth["label"], self.rule(answer), positive="no")
        mentions = self._lexicon.find(answer)
        covered, expected, hallucinated = set(), set(), 0
        for word in mentions:
            if word in self._safe:
                continue
            covers = self._object(word, item.truth["truth"])
            if covers is not None:
                covered.add(covers)
                continue
            hallucinated += 1
            expected.add(self._object(word, item.truth["hallu"]))
        return {
            "captions": 1.0,
            "captions_hallucinated": float(hallucinated > 0),
            "mentions": float(len(mentions)),
            "hallucinated": float(hallucinated),
            "covered": float(len(covered)),
            "objects": float(len(set(item.truth["truth"]))),
            "expected_named": float(len(expected - {None})),
            "expected": float(len(set(item.truth["hallu"]))),
            "words": float(len(answer.split())),
        }

    def figures(self, sums: Sums) -> dict[str, Floats]:
        captions = column(sums, "captions")
        chair = percent(column(sums, "hallucinated"), column(sums, "mentions"))
        asked = confusion_figures(sums)
        return {
            "amber_score": (100 - chair + asked["f1"]) / 2,
            "chair": chair,
            "cover": percent(column(sums, "covered"), column(sums, "objects")),
            "hal": percent(column(sums, "captions_hallucinated"), captions),
            "cog": percent(column(sums, "expected_named"), column(sums, "expected")),
            "words": ratio(column(sums, "words"), captions),
            **asked,
        }

    def _object(self, word: str, objects: Sequence[str]) -> str | None:
        """The object that a word names, or else stands for by relation."""
        if word in objects:
            return word
        return next((name for name in objects if word in self._related.get(name, ())), None)

    @property
    def _query_files(self) -> list[Path]:
        if self.queries is None:
            return [Path(self.data) / "query" / "query_all.json"]
        return [Path(path) for path in self.queries]

    @cached_property
    def _annotations(self) -> dict[str, dict[str, Any]]:
        records = files.json_records(Path(self.data) / "annotations.json")
        return {str(r["id"]): r for _, r in records if isinstance(r, dict) and "id" in r}

    @cached_property
    def _related(self) -> Mapping[str, Sequence[str]]:
        path = Path(self.data) / "relation.json"
        found = files.json_file(path)
        if not isinstance(found, dict) or not all(isinstance(v, list) for v in found.values()):
            raise EvaluationError(
                f"{shown(str(path))} is no object of word lists: give AMBER's relation.json"
            )
        return {str(name): [str(word).lower() for word in words] for name, words in found.items()}

    @cached_property
    def _safe(self) -> frozenset[str]:
        lines = files.text_lines(Path(self.data) / "safe_words.txt")
        return frozenset(line.strip().lower() for line in lines if line.strip())

    @cached_property
    def _lexicon(self) -> Lexicon:
        words = [*self._related, *chain.from_iterable(self._related.values())]
        return Lexicon(with_plurals({word: word for word in words}), GUARDED)


def _part(type_: str) -> str:
    if type_ == "generative":
        return type_
    if type_ == "discriminative-hallucination":
        return "existence"
    for part in ("attribute", "relation"):
        if part in type_:
            return part
    raise files.RecordError(
        f"type {shown(type_)} is unknown: generative, discriminative-... or relation is expected"
    )
