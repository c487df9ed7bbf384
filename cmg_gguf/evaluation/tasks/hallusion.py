"""HallusionBench: yes/no questions on illusions, charts and edited images, some without an image.

Guan et al., "HallusionBench: An Advanced Diagnostic Suite for Entangled Language Hallucination and
Visual Illusion in Large Vision-Language Models", CVPR 2024; `HallusionBench.json`:

    {"category": "VD", "subcategory": "illusion", "visual_input": "1", "set_id": "0",
     "figure_id": "0", "question_id": "0", "filename": "./hallusion_bench/VD/illusion/0_0.png",
     "question": "Is the right orange circle the same size as ...?", "gt_answer": "1"}

a_acc: questions right, of all. f_acc: figures with all questions right. q_acc: questions right on
all the figures they are asked of. VD = visual dependent, VS = visual supplement: the latter are
also asked without an image (visual_input "0"), which is no figure.

Answers are read as yes or no instead of being judged by a language model, as the official scorer
does. Like that one, an unsure answer (here: one that says neither) is right where a VS question has
no image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from cmg_gguf.errors import shown
from cmg_gguf.evaluation import files
from cmg_gguf.evaluation.answers import NAMED, YesNoRule
from cmg_gguf.evaluation.confusion import confusion_counts, confusion_figures
from cmg_gguf.evaluation.statistics import Floats, add_counts, column, percent
from cmg_gguf.evaluation.task import BadItem, Item, Sums

_LABELS = {"0": "no", "1": "yes"}


@dataclass(frozen=True)
class Hallusion:
    """The questions of `HallusionBench.json`.

    images: the folder that holds `hallusion_bench`, or that folder itself. suffix: put behind every
    question. rule: how answers are read.
    """

    questions: str | Path
    images: str | Path
    rule: YesNoRule = NAMED
    suffix: str = " Please answer yes or no."

    name: ClassVar[str] = "hallusion"
    yes_no: ClassVar[bool] = True

    def items(self) -> Iterator[Item | BadItem]:
        """Raises EvaluationError if the file or the folder is missing or holds no list."""
        images = files.folder(self.images, "image folder")
        records = files.json_records(Path(self.questions))
        yield from files.items_of(records, partial(self._item, images))

    def _item(self, images: Path, record: files.Record) -> Item:
        names = ("category", "subcategory", "set_id", "figure_id", "question_id")
        category, subcategory, set_id, figure, question = (files.field(record, n) for n in names)
        answer = files.field(record, "gt_answer")
        if answer not in _LABELS:
            raise files.RecordError(f"'gt_answer' is {shown(answer)}: 0 or 1 is expected")
        has_image = files.field(record, "visual_input") != "0"
        return Item(
            id="/".join((category, subcategory, set_id, figure, question)),
            image=_image(images, files.field(record, "filename")) if has_image else None,
            prompt=files.field(record, "question") + self.suffix,
            truth={"label": _LABELS[answer], "figure": figure, "question": question},
            part=category,
            cluster=f"{category}/{subcategory}/{set_id}",
            max_tokens=32,
        )

    def load(self, item: Item) -> Path:
        return Path(str(item.image))

    def counts(self, item: Item, answer: str) -> dict[str, float]:
        return self.cluster_counts([(item, answer)])

    def cluster_counts(self, answered: Sequence[tuple[Item, str]]) -> dict[str, float]:
        total: dict[str, float] = {}
        figures: dict[tuple[str, str], list[bool]] = {}
        questions: dict[tuple[str, str], list[bool]] = {}
        for item, answer in answered:
            said = self.rule(answer)
            add_counts(total, confusion_counts(item.truth["label"], said))
            unsure = said is None and bool(answer.strip())
            right = said == item.truth["label"] or (unsure and _is_bare_supplement(item))
            total["right_or_unsure"] = total.get("right_or_unsure", 0.0) + right
            questions.setdefault((item.cluster, item.truth["question"]), []).append(right)
            if not _is_bare_supplement(item):
                figures.setdefault((item.cluster, item.truth["figure"]), []).append(right)
        for name, groups in (("figures", figures), ("groups", questions)):
            total[name] = float(len(groups))
            total[f"{name}_right"] = float(sum(map(all, groups.values())))
        return total

    def figures(self, sums: Sums) -> dict[str, Floats]:
        common = confusion_figures(sums)
        return {
            "a_acc": percent(column(sums, "right_or_unsure"), column(sums, "questions")),
            "f_acc": percent(column(sums, "figures_right"), column(sums, "figures")),
            "q_acc": percent(column(sums, "groups_right"), column(sums, "groups")),
            "yes_ratio": common["yes_ratio"],
            "unparsed": common["unparsed"],
        }


def _is_bare_supplement(item: Item) -> bool:
    return item.part == "VS" and item.truth["figure"] == "0"


def _image(images: Path, filename: str) -> Path:
    inner = filename.removeprefix("./")
    try:
        return files.image_in(images, inner)
    except files.RecordError:
        return files.image_in(images, inner.partition("/")[2] or inner)
