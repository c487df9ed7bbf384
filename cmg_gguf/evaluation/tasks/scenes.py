"""The drawn world of `cmg_gguf.tiny.scenes` as a benchmark: captions, POPE's questions, colours.

    ScenePope("test", "counter", n=200)  # 200 pictures, up to 6 questions a picture and part
    SceneCaptions("test", "counter", n=200, style="plain")
    SceneColours("test", "typical", n=200)

Truth is known for every picture, and so is the habit that a model trained on "typical" scenes has:
pairs of objects that come together, and the usual colour of each. All is a function of split, kind,
picture number and seed; pictures are drawn when they are loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, get_args

import numpy as np

from cmg_gguf.errors import EvaluationError, shown
from cmg_gguf.evaluation.answers import POPE, YesNoRule
from cmg_gguf.evaluation.confusion import confusion_counts, confusion_figures
from cmg_gguf.evaluation.mentions import caption_counts, caption_figures
from cmg_gguf.evaluation.statistics import Floats, column, percent
from cmg_gguf.evaluation.task import Item, Sums
from cmg_gguf.evaluation.words import Lexicon
from cmg_gguf.tiny.scenes import Pixels, Scene, SceneKind, Split, draw, make_scene
from cmg_gguf.tiny.scenes.catalogue import COLOURS, KINDS, OBJECTS, PLACES
from cmg_gguf.tiny.scenes.texts import (
    CAPTION_PROMPTS,
    CaptionStyle,
    colour_question,
    existence_question,
)

_NAMES = Lexicon({form: name for name in OBJECTS for form in (name, KINDS[name].plural)})
_COLOURS = Lexicon({colour: colour for colour in COLOURS})
_TRAINING_SCENES = 2000
_PER_PICTURE = 3  # questions about something present, and as many about something absent


@dataclass(frozen=True)
class _Pictures:
    """Pictures 0 to n - 1 of a split and kind. Raises EvaluationError if there are none such."""

    split: Split
    kind: SceneKind
    n: int

    def __post_init__(self) -> None:
        for value, allowed in ((self.split, Split), (self.kind, SceneKind)):
            if value not in get_args(allowed):
                raise EvaluationError(
                    f"{shown(value)} is none of {', '.join(get_args(allowed))}: give one of them"
                )
        if self.n < 1:
            raise EvaluationError(f"n={self.n} pictures: give at least 1")

    def load(self, item: Item) -> Pixels:
        return draw(make_scene(self.split, int(str(item.image).rpartition("/")[2]), self.kind))

    def _scenes(self) -> Iterator[tuple[str, Scene]]:
        """Each picture's name and scene."""
        for index in range(self.n):
            yield f"{self.split}/{self.kind}/{index}", make_scene(self.split, index, self.kind)


@dataclass(frozen=True)
class SceneCaptions(_Pictures):
    """A caption of each picture; figures as in `mentions`.

    Every name of an object, singular or plural, is a mention; it is hallucinated when nothing of
    that name is in the picture, however faint.
    """

    style: CaptionStyle = "plain"

    name: ClassVar[str] = "scene-captions"
    yes_no: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.style not in CAPTION_PROMPTS:
            raise EvaluationError(
                f"style {shown(self.style)} is none of {', '.join(CAPTION_PROMPTS)}: give one"
            )

    def items(self) -> Iterator[Item]:
        for picture, scene in self._scenes():
            truth = {"objects": sorted(scene.names)}
            prompt = CAPTION_PROMPTS[self.style]
            yield Item(picture, picture, prompt, truth, cluster=picture, max_tokens=192)

    def counts(self, item: Item, answer: str) -> dict[str, float]:
        return caption_counts(answer, _NAMES.find(answer), item.truth["objects"])

    def located(self, answer: str) -> list[tuple[str, int]]:
        return _NAMES.located(answer)

    def figures(self, sums: Sums) -> dict[str, Floats]:
        return caption_figures(sums)


@dataclass(frozen=True)
class ScenePope(_Pictures):
    """POPE's questions: of each picture up to three present and as many absent objects a part.

    The present ones are the same in all parts. Absent ones are drawn at random; or those most
    frequent in training ("popular"); or those that go with what is there ("adversarial"): partners
    of present objects, then objects of the place, then frequent ones. Figures as in `confusion`.
    """

    seed: int = 0
    rule: YesNoRule = POPE

    name: ClassVar[str] = "scene-pope"
    yes_no: ClassVar[bool] = True

    def items(self) -> Iterator[Item]:
        for picture, scene in self._scenes():
            rng = np.random.default_rng((*scene.seed, self.seed))
            names = [str(name) for name in rng.permutation(sorted(scene.names))[:_PER_PICTURE]]
            for part, ranked in _absent(scene, rng).items():
                for name in (*names, *ranked[: len(names)]):
                    yield Item(
                        id=f"{part}/{picture}/{name.replace(' ', '_')}",
                        image=picture,
                        prompt=existence_question(name),
                        truth={"label": "yes" if name in scene.names else "no"},
                        part=part,
                        cluster=picture,
                    )

    def counts(self, item: Item, answer: str) -> dict[str, float]:
        return confusion_counts(item.truth["label"], self.rule(answer))

    def figures(self, sums: Sums) -> dict[str, Floats]:
        return confusion_figures(sums)


@dataclass(frozen=True)
class SceneColours(_Pictures):
    """What colour is the ...? Of every object that is alone of its class in its picture.

    Parts: "usual", where it has the colour that objects of its class mostly have, and "unusual",
    where habit misleads. accuracy: answers that name the true colour and no other, in percent;
    unparsed: answers that name no colour or several.
    """

    name: ClassVar[str] = "scene-colours"
    yes_no: ClassVar[bool] = False

    def items(self) -> Iterator[Item]:
        for picture, scene in self._scenes():
            for name in sorted(scene.names):
                thing = scene.only(name)
                if thing is None:
                    continue
                yield Item(
                    id=f"{picture}/{name.replace(' ', '_')}",
                    image=picture,
                    prompt=colour_question(name),
                    truth={"colour": thing.colour},
                    part="usual" if thing.colour == KINDS[name].colour else "unusual",
                    cluster=picture,
                )

    def counts(self, item: Item, answer: str) -> dict[str, float]:
        named = set(_COLOURS.find(answer))
        return {
            "questions": 1.0,
            "right": float(named == {item.truth["colour"]}),
            "unparsed": float(len(named) != 1),
        }

    def figures(self, sums: Sums) -> dict[str, Floats]:
        questions = column(sums, "questions")
        return {
            "accuracy": percent(column(sums, "right"), questions),
            "unparsed": percent(column(sums, "unparsed"), questions),
        }


def _absent(scene: Scene, rng: np.random.Generator) -> dict[str, list[str]]:
    """Objects that are not in the scene, by part, the first ones to be asked about first."""
    absent = [name for name in OBJECTS if name not in scene.names]
    popular = [name for name in _by_frequency() if name not in scene.names]
    pairs = [pair for place in PLACES.values() for pair in place.pairs]
    partner_of = dict(pairs) | {partner: anchor for anchor, partner in pairs}
    partners = [partner_of[name] for name in sorted(scene.names)]
    partners = [name for name in partners if name not in scene.names]
    own = [name for name in PLACES[scene.place].objects if name not in scene.names]
    likely = [*_shuffled(partners, rng), *_shuffled(own, rng), *popular]
    return {
        "random": _shuffled(absent, rng),
        "popular": popular,
        "adversarial": list(dict.fromkeys(likely)),
    }


def _shuffled(names: Sequence[str], rng: np.random.Generator) -> list[str]:
    return [names[i] for i in rng.permutation(len(names))]


@lru_cache(maxsize=1)
def _by_frequency() -> tuple[str, ...]:
    """All objects, the most frequent one of the first training scenes first."""
    counts = Counter(
        name for index in range(_TRAINING_SCENES) for name in make_scene("train", index).names
    )
    return tuple(sorted(OBJECTS, key=lambda name: (-counts[name], name)))
