"""From items to records on one loaded model: the part of a run that any process can do."""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from cmg_gguf.errors import BackendError, CMGError, ImageError, PromptError
from cmg_gguf.evaluation.grounding import words_told
from cmg_gguf.evaluation.items import seed_of
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.method import Method, Question
from cmg_gguf.evaluation.records import Record
from cmg_gguf.evaluation.task import Item, Task
from cmg_gguf.evaluation.yes_no import YesNoTokens
from cmg_gguf.evidence import EvidenceModel
from cmg_gguf.prompt.images import image_id, load_image
from cmg_gguf.request import Request

if TYPE_CHECKING:
    from cmg_gguf import Outcome
    from cmg_gguf.reply import Reply
    from cmg_gguf.vlm import GuidedVLM

Pixels = npt.NDArray[np.uint8]
SIZE_IF_UNKNOWN = 336
PROBLEMS = (ImageError, PromptError, BackendError)
"""Errors that are one item's; any other ends the run."""


@dataclass(frozen=True)
class Job:
    """What every process of a run is told; values only, so that it can be sent.

    evidence: of every answer about an image whose degraded branch has no prompt of its own.
    """

    task: Task
    model: ModelFiles
    methods: tuple[Method, ...]
    seed: int
    evidence: EvidenceModel | None = None


@dataclass(frozen=True)
class Work:
    """Items about one image, and the names of the methods that each still needs."""

    items: tuple[tuple[Item, frozenset[str]], ...]

    @property
    def n_answers(self) -> int:
        """Answers to give."""
        return sum(len(methods) for _, methods in self.items)


@dataclass(frozen=True)
class _Asked:
    """What is asked of the model for an item by a method. n_alike: how many of the same salt."""

    item: Item
    method: str
    request: Request
    n_alike: int


class Answerer:
    """Answers a job's questions with a model that is loaded, as many at once as it takes.

    The image of a piece of work is read once, and method goes before item: consecutive questions
    share their prompt up to the text behind the image. A method's questions about an image have a
    salt of their own: so each method pays for the image itself, and what is kept of it can go once
    all of them are answered. With a model that answers one at a time, every method begins with
    nothing kept at all: then answers to the bit do not depend on what came before.
    """

    def __init__(self, job: Job, vlm: GuidedVLM) -> None:
        self.n_parallel = len(vlm.engine.lanes)
        self._job = job
        self._vlm = vlm
        self._words = YesNoTokens.of(vlm.model)
        self._image_size = vlm.image_size or SIZE_IF_UNKNOWN

    def answers(self, works: Iterable[Work]) -> Iterator[Record]:
        """A record for each item and method of each piece of work, as they are there.

        works: no more are taken than are worked on. Why an item cannot be answered is in its
        records. Raises GuidanceError for settings that the model cannot follow.
        """
        asked = self._asked(works)
        if self.n_parallel > 1:
            yield from self._answered(asked)
            return
        salt = None
        for one in asked:
            if isinstance(one, _Asked) and one.request.salt != salt:
                self._vlm.forget()
                salt = one.request.salt
            yield from self._answered([one])

    def _answered(self, asked: Iterable[_Asked | Record]) -> Iterator[Record]:
        under_way: dict[int, _Asked] = {}
        unasked: deque[Record] = deque()
        n_asked, n_answered = itertools.count(), Counter[str | None]()

        def requests() -> Iterator[Request]:
            for one in asked:
                if isinstance(one, Record):
                    unasked.append(one)
                else:
                    under_way[next(n_asked)] = one
                    yield one.request

        outcomes = cast("Generator[Outcome, None, None]", self._vlm.generate_many(requests()))
        with closing(outcomes):
            for outcome in outcomes:
                while unasked:
                    yield unasked.popleft()
                one = under_way.pop(outcome.index)
                salt = one.request.salt
                n_answered[salt] += 1
                if n_answered[salt] == one.n_alike:
                    del n_answered[salt]
                    self._vlm.engine.forget(salt)
                yield self._record(one, outcome)
        yield from unasked

    def _asked(self, works: Iterable[Work]) -> Iterator[_Asked | Record]:
        for work in works:
            first, _ = work.items[0]
            try:
                image = self._image(first)
            except ImageError as exc:
                for item, names in work.items:
                    yield from (_problem(item, name, exc) for name in sorted(names))
                continue
            key = "" if image is None else image_id(image)
            for method in self._job.methods:
                items = [item for item, names in work.items if method.name in names]
                yield from self._asked_by(method, items, image, key)

    def _image(self, item: Item) -> Pixels | None:
        if item.image is None:
            return None
        return load_image(self._job.task.load(item), max_pixels=self._vlm.max_pixels)

    def _asked_by(
        self, method: Method, items: Sequence[Item], image: Pixels | None, key: str
    ) -> list[_Asked | Record]:
        requests: list[tuple[Item, Request]] = []
        problems: list[Record] = []
        for item in items:
            question = Question(
                item=item,
                image=image,
                seed=seed_of(self._job.seed, "item", item.id, method.name),
                image_seed=seed_of(self._job.seed, "image", key, method.name),
                image_size=self._image_size,
                words=self._words,
            )
            salt = f"{method.name} of {items[0].id}"
            try:
                request = replace(method.request(question), n_scores=1, salt=salt)
                if image is not None and request.contrast is None:
                    request = replace(request, evidence=self._job.evidence or False)
            except PROBLEMS as exc:
                problems.append(_problem(item, method.name, exc))
            else:
                requests.append((item, request))
        n = len(requests)
        return [*problems, *(_Asked(item, method.name, request, n) for item, request in requests)]

    def _record(self, asked: _Asked, outcome: Outcome) -> Record:
        if isinstance(outcome.error, PROBLEMS):
            return _problem(asked.item, asked.method, outcome.error)
        reply = outcome.unwrap()
        seconds = reply.seconds
        return Record(
            item=asked.item.id,
            method=asked.method,
            answer=reply.text,
            tokens=len(reply.tokens),
            changed=reply.n_changed,
            reasoning=reply.n_reasoning_tokens,
            finish=reply.finish_reason,
            seconds=seconds.encode + seconds.prefill + seconds.decode,
            parallel=self.n_parallel,
            words=words_told(reply),
            **(self._yes_no(reply) if "label" in asked.item.truth else {}),
        )

    def _yes_no(self, reply: Reply) -> dict[str, Any]:
        """The fields of a record about yes and no; {} where the vocabulary lacks the words, or the
        first token is reasoning."""
        if not self._words.complete or reply.n_reasoning_tokens:
            return {}
        (scores,) = reply.scores
        first = reply.tokens[0].id if reply.tokens else None
        return {
            "yes_margin": _finite(self._words.margin(scores)),
            "yes_lead": _finite(self._words.lead(scores)),
            "says_yes": first in self._words.yes.tolist(),
        }


def _problem(item: Item, method: str, error: CMGError) -> Record:
    return Record(item=item.id, method=method, problem=str(error))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
