"""The drawn world as a benchmark: truth as in the scenes, the same items every time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from evaluated import check_figures_are_sound, figures, good, labels

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.task import Item
from cmg_gguf.evaluation.tasks.scenes import SceneCaptions, SceneColours, ScenePope
from cmg_gguf.tiny.scenes import Scene, SceneKind, draw, make_scene
from cmg_gguf.tiny.scenes.catalogue import KINDS, OBJECTS, PLACES
from cmg_gguf.tiny.scenes.texts import CAPTION_PROMPTS, caption, existence_question

KINDS_OF_SCENE: tuple[SceneKind, ...] = ("typical", "counter")
N = 60
PARTNER = dict(pair for place in PLACES.values() for pair in place.pairs)
PARTNER |= {partner: anchor for anchor, partner in PARTNER.items()}


def scene_of(item: Item) -> Scene:
    split, kind, index = item.cluster.split("/")
    return make_scene(split, int(index), kind)  # type: ignore[arg-type]


def asked(item: Item) -> str:
    return next(name for name in OBJECTS if item.prompt == existence_question(name))


@pytest.mark.parametrize("kind", KINDS_OF_SCENE)
def test_existence_is_as_in_the_scene_and_balanced(kind: SceneKind) -> None:
    items = good(ScenePope("test", kind, N))
    for item in items:
        assert (asked(item) in scene_of(item).names) == (item.truth["label"] == "yes")
    asked_of = Counter((item.part, item.cluster, item.truth["label"]) for item in items)
    for index in range(N):
        there = min(3, len(make_scene("test", index, kind).names))
        for part in ("random", "popular", "adversarial"):
            for label in ("yes", "no"):
                assert asked_of[part, f"test/{kind}/{index}", label] == there
    assert len({item.id for item in items}) == len(items)


def test_present_objects_are_the_same_in_all_parts() -> None:
    present: dict[tuple[str, str], set[str]] = {}
    for item in good(ScenePope("test", "typical", N)):
        if item.truth["label"] == "yes":
            present.setdefault((item.cluster, item.part), set()).add(asked(item))
    for (picture, _), names in present.items():
        assert names == present[picture, "random"]


def test_adversarial_objects_are_partners_of_what_is_there_first() -> None:
    absent: dict[str, set[str]] = {}
    for item in good(ScenePope("test", "counter", N)):
        if (item.part, item.truth["label"]) == ("adversarial", "no"):
            absent.setdefault(item.cluster, set()).add(asked(item))
    assert len(absent) == N
    for index in range(N):
        scene, names = make_scene("test", index, "counter"), absent[f"test/counter/{index}"]
        partners = {PARTNER[name] for name in scene.names} - scene.names
        assert len(names & partners) == min(len(names), len(partners))
        assert names <= partners | set(PLACES[scene.place].objects)


def test_popular_objects_are_those_most_frequent_in_training() -> None:
    counts = Counter(name for i in range(2000) for name in make_scene("train", i).names)
    frequent = {name for name, _ in counts.most_common(9)}  # three, and six that may be present
    items = [item for item in good(ScenePope("test", "typical", N)) if item.part == "popular"]
    absent = Counter(asked(item) for item in items if item.truth["label"] == "no")
    assert set(absent) <= frequent
    assert absent.most_common(1)[0][0] == counts.most_common(1)[0][0]


def test_random_objects_are_spread_and_depend_on_the_seed() -> None:
    def absent(seed: int) -> list[str]:
        items = good(ScenePope("test", "typical", N, seed=seed))
        return [asked(i) for i in items if (i.part, i.truth["label"]) == ("random", "no")]

    assert len(set(absent(0))) > 25
    assert absent(0) == absent(0)
    assert absent(0) != absent(1)


def test_true_answers_score_perfectly_and_figures_are_sound() -> None:
    pope = ScenePope("test", "typical", 12)
    found = figures(pope, labels(pope), "adversarial")
    assert (found["accuracy"], found["f1"], found["yes_ratio"]) == (100, 100, 50)
    check_figures_are_sound(pope, labels(pope))


@pytest.mark.parametrize("style", CAPTION_PROMPTS)
def test_true_captions_have_no_hallucination_and_full_recall(style: str) -> None:
    task = SceneCaptions("test", "typical", N, style)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    answers = {i.id: caption(scene_of(i), style, rng) for i in good(task)}  # type: ignore[arg-type]
    found = figures(task, answers)
    assert (found["chair_i"], found["chair_s"], found["recall"]) == (0, 0, 100)
    assert found["words"] > 4
    check_figures_are_sound(task, answers)


def test_a_caption_with_an_absent_object_is_hallucinated() -> None:
    task = SceneCaptions("test", "typical", 2)
    first, second = good(task)
    there, others = sorted(scene_of(first).names), scene_of(second).names
    absent = next(name for name in OBJECTS if name not in there)
    told = {
        first.id: f"There is a {there[0]}. There are {KINDS[absent].plural}, and a {absent}.",
        second.id: " ".join(sorted(others)),
    }
    found = figures(task, told)
    assert found["chair_i"] == pytest.approx(100 * 2 / (3 + len(others)))
    assert found["chair_s"] == 50
    assert found["recall"] == pytest.approx(100 * (1 + len(others)) / (len(there) + len(others)))


def test_the_plural_of_every_object_is_a_mention_of_it() -> None:
    task = SceneCaptions("test", "typical", 1)
    (item,) = good(task)
    for name in OBJECTS:
        for form in (name, KINDS[name].plural):
            counts = task.counts(item, f"Here: {form}.")
            assert counts["mentions"] == 1
            assert counts["named"] == (name in item.truth["objects"])


@pytest.mark.parametrize("kind", KINDS_OF_SCENE)
def test_colours_are_asked_of_single_objects_and_true(kind: SceneKind) -> None:
    items = good(SceneColours("test", kind, N))
    for item in items:
        name = item.id.rpartition("/")[2].replace("_", " ")
        thing = scene_of(item).only(name)
        assert thing is not None
        assert item.truth["colour"] == thing.colour
        assert item.prompt == f"What colour is the {name}?"
        assert (item.part == "usual") == (thing.colour == KINDS[name].colour)
    assert {item.part for item in items} == {"usual", "unusual"}
    single = sum(
        make_scene("test", i, kind).counts[name] == 1
        for i in range(N)
        for name in make_scene("test", i, kind).names
    )
    assert len(items) == single


def test_only_an_answer_with_the_one_true_colour_is_right() -> None:
    task = SceneColours("test", "typical", 1)
    item = Item("x", "test/typical/0", "?", {"colour": "red"})
    readings = {
        **{"It is red.": (1, 0), "Red": (1, 0), "It is blue.": (0, 0)},
        **{"red or blue": (0, 1), "": (0, 1), "reddish": (0, 1)},
    }
    for answer, (right, unparsed) in readings.items():
        counts = task.counts(item, answer)
        assert (counts["right"], counts["unparsed"]) == (right, unparsed), answer
    check_figures_are_sound(task, {i.id: "red" for i in good(task)})


def test_usual_colours_alone_score_perfectly_on_the_usual_part_and_0_on_the_other() -> None:
    task = SceneColours("test", "typical", N)
    names = {item.id: item.id.rpartition("/")[2].replace("_", " ") for item in good(task)}
    habit = {id_: KINDS[name].colour for id_, name in names.items()}
    assert figures(task, habit, "usual")["accuracy"] == 100
    assert figures(task, habit, "unusual")["accuracy"] == 0


def test_the_picture_is_that_of_the_scene() -> None:
    for task in (ScenePope("test", "counter", 9), SceneCaptions("tune", "typical", 9)):
        item = good(task)[-1]
        np.testing.assert_array_equal(task.load(item), draw(scene_of(item)))


def test_items_are_the_same_every_time_and_more_pictures_change_none() -> None:
    for make in (ScenePope, SceneCaptions, SceneColours):
        few, more = (good(make("test", "typical", n)) for n in (5, 9))
        assert few == good(make("test", "typical", 5)) == more[: len(few)]


@pytest.mark.parametrize(
    ("split", "kind", "n", "message"),
    [
        ("dev", "typical", 1, "'dev' is none of train, tune, test"),
        ("test", "odd", 1, "'odd' is none of typical, counter, strong"),
        ("test", "typical", 0, "n=0 pictures: give at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(split: str, kind: str, n: int, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        ScenePope(split, kind, n)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="style 'long' is none of"):
        SceneCaptions("test", "typical", 1, "long")  # type: ignore[arg-type]
