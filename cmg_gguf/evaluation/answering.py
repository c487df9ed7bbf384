"""From items to records on one loaded model: the part of a run that any process can do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cmg_gguf.errors import BackendError, ImageError, PromptError
from cmg_gguf.evaluation.items import seed_of
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.method import Method, Question
from cmg_gguf.evaluation.records import Record
from cmg_gguf.evaluation.task import Item, Task
from cmg_gguf.evaluation.yes_no import YesNoTokens
from cmg_gguf.prompt.images import image_id, load_image

if TYPE_CHECKING:
    from cmg_gguf.reply import Reply
    from cmg_gguf.vlm import GuidedVLM

Pixels = npt.NDArray[np.uint8]
SIZE_IF_UNKNOWN = 336


@dataclass(frozen=True)
class Job:
    """What every process of a run is told; values only, so that it can be sent."""

    task: Task
    model: ModelFiles
    methods: tuple[Method, ...]
    seed: int


@dataclass(frozen=True)
class Work:
    """Items about one image, and the names of the methods that each still needs."""

    items: tuple[tuple[Item, frozenset[str]], ...]

    @property
    def n_answers(self) -> int:
        """Answers to give."""
        return sum(len(methods) for _, methods in self.items)


class Answerer:
    """Answers a job's questions with a model that is loaded.

    The image of a piece of work is read once, and method goes before item: consecutive questions
    share their prompt up to the text behind the image. Every method begins with nothing kept: so
    each pays for the image itself, and its answers to the bit do not depend on what came before.
    """

    def __init__(self, job: Job, vlm: GuidedVLM) -> None:
        self._job = job
        self._vlm = vlm
        self._words = YesNoTokens.of(vlm.model)
        self._image_size = vlm.image_size or SIZE_IF_UNKNOWN

    def answers(self, work: Work) -> Iterator[Record]:
        """A record for each item and method of the work.

        Why an item cannot be answered is in its records. Raises GuidanceError for settings that the
        model cannot follow.
        """
        items = [item for item, _ in work.items]
        try:
            image = self._image(items[0])
        except ImageError as exc:
            for item, names in work.items:
                for name in sorted(names):
                    yield Record(item=item.id, method=name, problem=str(exc))
            return
        key = "" if image is None else image_id(image)
        for method in self._job.methods:
            self._vlm.forget()
            for item, names in work.items:
                if method.name in names:
                    yield self._answer(item, image, key, method)

    def _image(self, item: Item) -> Pixels | None:
        return None if item.image is None else load_image(self._job.task.load(item))

    def _answer(self, item: Item, image: Pixels | None, key: str, method: Method) -> Record:
        question = Question(
            item=item,
            image=image,
            seed=seed_of(self._job.seed, "item", item.id, method.name),
            image_seed=seed_of(self._job.seed, "image", key, method.name),
            image_size=self._image_size,
            words=self._words,
        )
        try:
            reply = self._vlm.generate(replace(method.request(question), n_scores=1))
        except (ImageError, PromptError, BackendError) as exc:
            return Record(item=item.id, method=method.name, problem=str(exc))
        return Record(
            item=item.id,
            method=method.name,
            answer=reply.text,
            tokens=len(reply.tokens),
            changed=reply.n_changed,
            finish=reply.finish_reason,
            seconds=reply.seconds.encode + reply.seconds.prefill + reply.seconds.decode,
            **(self._yes_no(reply) if "label" in item.truth else {}),
        )

    def _yes_no(self, reply: Reply) -> dict[str, Any]:
        """The fields of a record about yes and no; {} where the vocabulary lacks the words."""
        if not self._words.complete:
            return {}
        (scores,) = reply.scores
        first = reply.tokens[0].id if reply.tokens else None
        return {
            "yes_margin": _finite(self._words.margin(scores)),
            "yes_lead": _finite(self._words.lead(scores)),
            "says_yes": first in self._words.yes.tolist(),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
