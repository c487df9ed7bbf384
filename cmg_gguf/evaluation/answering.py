"""From items to records on one loaded model: the part of a run that any process can do."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from cmg_gguf.errors import BackendError, CMGError, ImageError, PromptError
from cmg_gguf.evaluation.changed import changes_of
from cmg_gguf.evaluation.grounding import words_told
from cmg_gguf.evaluation.items import seed_of
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.method import Method, Question
from cmg_gguf.evaluation.records import Record
from cmg_gguf.evaluation.task import Item, Task
from cmg_gguf.evaluation.yes_no import YesNoTokens
from cmg_gguf.evidence import EvidenceModel
from cmg_gguf.guidance import PLAIN
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
    """What is asked of the model for an item by a method. is_first: of this method about this
    image. encode: as in `Record`."""

    item: Item
    method: str
    request: Request
    is_first: bool
    encode: float


class Answerer:
    """Answers a job's questions with a model that is loaded, as many at once as it takes.

    The image of a piece of work is read once, and method goes before item: consecutive questions
    share their prompt up to the text behind the image. What is kept of an image is found by the
    questions about it alone, and goes once all of them are answered.

    With a model that answers one at a time, the image is encoded ahead of all methods and its
    seconds are told apart, so that no method pays for another; and every method begins with no
    prompt kept: then neither answers, to the bit, nor costs depend on what came before.
    """

    def __init__(self, job: Job, vlm: GuidedVLM) -> None:
        self.n_parallel = len(vlm.engine.lanes)
        self._job = job
        self._vlm = vlm
        self._words = YesNoTokens.of(vlm.model)
        self._image_size = vlm.image_size or SIZE_IF_UNKNOWN
        self._n_left = Counter[str | None]()  # questions of each salt

    def answers(self, works: Iterable[Work]) -> Iterator[Record]:
        """A record for each item and method of each piece of work, as they are there.

        works: no more are taken than are worked on. Why an item cannot be answered is in its
        records. Raises GuidanceError for settings that the model cannot follow.
        """
        asked = self._asked(works)
        if self.n_parallel > 1:
            yield from self._answered(asked)
            return
        warm = False
        for one in asked:
            if isinstance(one, _Asked) and one.is_first:
                if not warm:
                    self._warm_up(one.request)
                    warm = True
                self._vlm.engine.forget()
            yield from self._answered([one])

    def _warm_up(self, request: Request) -> None:
        """What the first answer of a loaded model takes longer is nobody's cost."""
        plain = replace(request, guidance=PLAIN, contrast=None, logits_processors=(), max_tokens=1)
        with suppress(*PROBLEMS):
            self._vlm.generate(plain)

    def _answered(self, asked: Iterable[_Asked | Record]) -> Iterator[Record]:
        under_way: dict[int, _Asked] = {}
        unasked: deque[Record] = deque()
        n_asked = itertools.count()

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
                self._n_left[salt] -= 1
                if not self._n_left[salt]:
                    del self._n_left[salt]
                    self._vlm.engine.forget(salt)
                yield self._record(one, outcome)
        yield from unasked

    def _asked(self, works: Iterable[Work]) -> Iterator[_Asked | Record]:
        for work in works:
            first, _ = work.items[0]
            salt = f"image of {first.id}"
            try:
                image = self._image(first)
                encode = self._encoded(image, salt) / len(work.items)
            except PROBLEMS as exc:
                for item, names in work.items:
                    yield from (_problem(item, name, exc) for name in sorted(names))
                continue
            found = list(self._asked_about(work, image, salt, encode))
            self._n_left[salt] = sum(isinstance(one, _Asked) for one in found)
            yield from found

    def _asked_about(
        self, work: Work, image: Pixels | None, salt: str, encode: float
    ) -> Iterator[_Asked | Record]:
        key = "" if image is None else image_id(image)
        for method in self._job.methods:
            image_seed = seed_of(self._job.seed, "image", key, method.name)
            is_first = True
            for item, names in work.items:
                if method.name not in names:
                    continue
                request = self._request(method, item, image, image_seed)
                if isinstance(request, Record):
                    yield request
                    continue
                request = replace(request, n_scores=1, salt=salt)
                yield _Asked(item, method.name, request, is_first, encode)
                is_first = False

    def _image(self, item: Item) -> Pixels | None:
        if item.image is None:
            return None
        return load_image(self._job.task.load(item), max_pixels=self._vlm.max_pixels)

    def _encoded(self, image: Pixels | None, salt: str) -> float:
        """Seconds in which the image was encoded, now for all that is asked about it.

        0 where they would tell nothing: answers are made several at once, or nothing is kept of an
        encoded image, so that each method encodes it for itself.
        """
        if image is None or self.n_parallel > 1:
            return 0.0
        self._vlm.forget()
        prompt = self._vlm.tokenize("", [image], salt=salt)
        started = time.perf_counter()
        self._vlm.projector.encode(prompt)
        seconds = time.perf_counter() - started
        return seconds if self._vlm.projector.embeddings.n_bytes else 0.0

    def _request(
        self, method: Method, item: Item, image: Pixels | None, image_seed: int
    ) -> Request | Record:
        question = Question(
            item=item,
            image=image,
            seed=seed_of(self._job.seed, "item", item.id, method.name),
            image_seed=image_seed,
            image_size=self._image_size,
            words=self._words,
        )
        try:
            request = method.request(question)
            if image is not None and request.contrast is None:
                weights = self._job.evidence
                request = replace(request, evidence=weights or False, heat=weights is not None)
        except PROBLEMS as exc:
            return _problem(item, method.name, exc)
        return request

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
            changes=changes_of(reply, self._vlm.model),
            encode=asked.encode,
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
