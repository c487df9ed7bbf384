"""MME: two yes/no questions an image, one of each answer, in 14 subtasks.

Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models",
arXiv 2306.13394. One folder a subtask, in either of its two layouts:

    existence/000000006040.jpg  existence/000000006040.txt
    artwork/images/10002.jpg    artwork/questions_answers_YN/10002.txt

Each line of a text is a question, a tab, and Yes or No:

    Is there a dining table in this image? Please answer yes or no.	Yes

score: 100 * accuracy + 100 * accuracy_plus, 0 to 200 a subtask, summed over the subtasks at hand.
perception and cognition: the same over the ten and the four subtasks of that kind. accuracy_plus:
images with all (two or more) questions right, of all images. The others as in `confusion`; accuracy
is over all questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cmg_gguf.errors import EvaluationError, shown
from cmg_gguf.evaluation import files
from cmg_gguf.evaluation.answers import MME, YesNoRule
from cmg_gguf.evaluation.confusion import confusion_counts, confusion_figures
from cmg_gguf.evaluation.statistics import Floats, add_counts, column, percent
from cmg_gguf.evaluation.task import BadItem, Item, Sums
from cmg_gguf.prompt.formats import image_suffixes

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark"),
    *("artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_COUNTED = ("questions", "right", "images", "images_right")


@dataclass(frozen=True)
class Mme:
    """The subtasks in a folder; one that is not MME's counts for the score alone.

    subtasks: their names; None = every folder with questions in it. rule: how answers are read.
    """

    root: str | Path
    subtasks: Sequence[str] | None = None
    rule: YesNoRule = MME

    name: ClassVar[str] = "mme"
    yes_no: ClassVar[bool] = True

    def items(self) -> Iterator[Item | BadItem]:
        """Raises EvaluationError if the folder or a subtask is missing, or there is no question."""
        root = files.folder(self.root, "MME folder")
        if self.subtasks is None:
            chosen = sorted(path for path in root.iterdir() if path.is_dir() and _texts(path))
        else:
            chosen = [files.folder(root / name, "MME subtask") for name in self.subtasks]
        if not chosen:
            raise EvaluationError(
                f"MME folder {shown(str(root))} has no subtask folder with questions: give the "
                "folder that holds existence, count, ..."
            )
        for path in chosen:
            yield from files.items_of(_records(path), _item)

    def load(self, item: Item) -> Path:
        return Path(str(item.image))

    def counts(self, item: Item, answer: str) -> dict[str, float]:
        return self.cluster_counts([(item, answer)])

    def cluster_counts(self, answered: Sequence[tuple[Item, str]]) -> dict[str, float]:
        total: dict[str, float] = {}
        images: dict[tuple[str, str], list[bool]] = {}
        for item, answer in answered:
            found = confusion_counts(item.truth["label"], self.rule(answer))
            add_counts(total, found)
            add_counts(
                total, {f"{item.part}.{name}": found[name] for name in ("questions", "right")}
            )
            images.setdefault((item.part, item.cluster), []).append(found["right"] == 1)
        for (part, _), rights in images.items():
            whole = len(rights) > 1  # one question alone cannot show that both are right
            counts = {"images": float(whole), "images_right": float(whole and all(rights))}
            add_counts(total, counts)
            add_counts(total, {f"{part}.{name}": count for name, count in counts.items()})
        return total

    def figures(self, sums: Sums) -> dict[str, Floats]:
        subtasks = sorted({name.rpartition(".")[0] for name in sums if "." in name})
        common = confusion_figures(sums)
        return {
            "score": _score(sums, subtasks),
            "perception": _score(sums, [s for s in subtasks if s in PERCEPTION]),
            "cognition": _score(sums, [s for s in subtasks if s in COGNITION]),
            "accuracy": common["accuracy"],
            "accuracy_plus": percent(column(sums, "images_right"), column(sums, "images")),
            "yes_ratio": common["yes_ratio"],
            "unparsed": common["unparsed"],
        }


def _score(sums: Sums, subtasks: Iterable[str]) -> Floats:
    """The scores summed; nan for none, and in samples that lack a subtask that others have."""
    present = [name for name in subtasks if np.any(column(sums, f"{name}.questions"))]
    total = np.full(np.shape(column(sums, "questions")), 0.0 if present else np.nan)
    for subtask in present:
        questions, right, images, images_right = (
            column(sums, f"{subtask}.{name}") for name in _COUNTED
        )
        total = total + percent(right, questions) + percent(images_right, images)
    return total


def _texts(subtask: Path) -> list[Path]:
    inner = subtask / "questions_answers_YN"
    return sorted((inner if inner.is_dir() else subtask).glob("*.txt"))


def _records(subtask: Path) -> Iterator[tuple[str, Any]]:
    inner = subtask / "images"
    suffixes = image_suffixes()
    images = {
        path.stem: path
        for path in sorted((inner if inner.is_dir() else subtask).iterdir())
        if path.suffix.lower() in suffixes
    }
    for path in _texts(subtask):
        for number, line in enumerate(files.text_lines(path), start=1):
            if line.strip():
                record = {"subtask": subtask.name, "stem": path.stem, "number": number}
                record |= {"line": line, "image": images.get(path.stem)}
                yield f"{subtask.name}/{path.name}:{number}", record


def _item(record: files.Record) -> Item:
    question, tab, label = record["line"].strip().rpartition("\t")
    if not tab:
        raise files.RecordError("there is no tab between question and answer")
    stem, subtask = record["stem"], record["subtask"]
    if record["image"] is None:
        raise files.RecordError(f"image {shown(stem)} (.jpg, .png, ...) is not in the folder")
    return Item(
        id=f"{subtask}/{stem}/{record['number']}",
        image=record["image"],
        prompt=question.strip(),
        truth={"label": files.yes_or_no(label, "answer")},
        part=subtask,
        cluster=f"{subtask}/{stem}",
    )
