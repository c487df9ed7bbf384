"""The drawn world: a pure function of its seed, and everything said about it is true."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from cmg_gguf.tiny.scenes import IMAGE_SIZE, Scene, SceneKind, Split, draw, make_scene
from cmg_gguf.tiny.scenes.catalogue import COLOURS, KINDS, OBJECTS, PLACES, SIDES
from cmg_gguf.tiny.scenes.icons import ICONS, draw_icon
from cmg_gguf.tiny.scenes.texts import (
    CAPTION_PROMPTS,
    NUMBERS,
    ask_colour,
    ask_count,
    ask_existence,
    ask_side,
    caption,
    conversations,
)

SPLITS: tuple[Split, ...] = ("train", "tune", "test")
SCENES = [
    make_scene(split, i, kind)
    for split in SPLITS
    for kind in ("typical", "counter", "strong")
    for i in range(40)
]
SENTENCE = re.compile(
    r"There is (?:an?|another) (.+?) (on the left|in the middle|on the right)"
    r"(?:, and it is (\w+))?\."
)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def partner_rate(kind: SceneKind, n: int = 1500) -> float:
    """How often the partner is there where its anchor is."""
    scenes = [make_scene("tune", i, kind) for i in range(n)]
    pairs = [
        (anchor in scene.names, partner in scene.names)
        for scene in scenes
        for anchor, partner in PLACES[scene.place].pairs
    ]
    return float(np.mean([partner for anchor, partner in pairs if anchor]))


def test_the_catalogue_is_closed() -> None:
    assert len(OBJECTS) >= 30
    assert set(ICONS) == set(OBJECTS)
    assert sorted(name for place in PLACES.values() for name in place.objects) == sorted(OBJECTS)
    assert all(kind.colour in COLOURS for kind in KINDS.values())


def test_the_same_seed_gives_the_same_scene_and_pixels() -> None:
    first, second = (make_scene("test", 3, "counter") for _ in range(2))
    assert first == second
    np.testing.assert_array_equal(draw(first), draw(second))


def test_no_two_splits_or_kinds_share_a_picture() -> None:
    drawn = [draw(scene).tobytes() for scene in SCENES]
    assert len(set(drawn)) == len(drawn)


def test_pixels_are_a_native_size_rgb_image() -> None:
    pixels = draw(SCENES[0])
    assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert pixels.dtype == np.uint8


def test_things_lie_inside_the_picture_and_clear_of_the_borders_between_sides() -> None:
    for thing in itertools.chain.from_iterable(scene.things for scene in SCENES):
        assert 0 <= thing.x <= IMAGE_SIZE - thing.size
        assert 0 <= thing.y <= IMAGE_SIZE - thing.size
        assert min(abs(thing.centre[0] - IMAGE_SIZE * k / 3) for k in (1, 2)) >= 4
        assert thing.side == SIDES[int(thing.centre[0] // (IMAGE_SIZE / 3))]


def test_sights_range_from_clear_to_barely_visible() -> None:
    things = list(itertools.chain.from_iterable(scene.things for scene in SCENES))
    assert {thing.sight for thing in things} == {"clear", "faint", "tiny"}
    assert all(thing.opacity < 0.3 for thing in things if thing.sight == "faint")


def test_colours_are_mostly_but_not_always_the_usual_ones() -> None:
    things = list(itertools.chain.from_iterable(scene.things for scene in SCENES))
    usual = np.mean([thing.colour == KINDS[thing.name].colour for thing in things])
    assert 0.6 < usual < 0.8


@pytest.mark.parametrize("name", OBJECTS)
def test_the_colour_of_an_object_is_seen_in_its_icon(name: str) -> None:
    red, blue = (np.asarray(draw_icon(name, COLOURS[c])).astype(int) for c in ("red", "blue"))
    assert np.mean(np.any(red != blue, axis=-1)) > 0.05


def test_pairs_stay_together_in_typical_scenes_and_fall_apart_in_counter_scenes() -> None:
    assert 0.8 < partner_rate("typical") < 0.9
    assert partner_rate("strong") > 0.95
    assert partner_rate("counter") < 0.2


def test_counter_objects_are_independent_of_the_place() -> None:
    scenes = [make_scene("tune", i, "counter") for i in range(1500)]
    own = np.mean([name in PLACES[s.place].objects for s in scenes for name in s.names])
    expected = 4 / len(OBJECTS)
    assert abs(own - expected) < 0.02


@pytest.mark.parametrize("style", CAPTION_PROMPTS)
def test_captions_name_all_that_is_there_and_nothing_else(style: str) -> None:
    for scene in SCENES:
        text = caption(scene, style, rng())  # type: ignore[arg-type]
        named = {name for name in OBJECTS if re.search(rf"\b{name}\b", text)}
        assert named == scene.names
        assert re.search(rf"\b{scene.place}\b", text)


@pytest.mark.parametrize("style", ["plain", "detailed"])
def test_every_sentence_but_the_first_is_true_of_one_thing(style: str) -> None:
    for scene in SCENES:
        text = caption(scene, style, rng())  # type: ignore[arg-type]
        told = SENTENCE.findall(text)
        assert len(told) == len(scene.things) == text.count(".") - 1
        colours = [t.colour if style == "detailed" else "" for t in scene.things]
        true = [(t.name, t.side, c) for t, c in zip(scene.things, colours, strict=True)]
        assert sorted(told) == sorted(true)


def test_answers_are_true_and_questions_have_one() -> None:
    random = rng()
    for scene in SCENES:
        check_existence(scene, random)
        check_attributes(scene, random)
        question, answer = ask_count(scene, random)
        name = next(n for n in OBJECTS if f" {KINDS[n].plural} are there?" in question)
        assert answer.split()[-1] == f"{NUMBERS[scene.counts[name]]}."


def check_existence(scene: Scene, random: np.random.Generator) -> None:
    question, answer = ask_existence(scene, random)
    found = re.fullmatch(r"Is there an? (.+) in the (.+)\?", question)
    assert found is not None
    assert found[2] in ("image", scene.place)
    assert (answer == "Yes") == (found[1] in scene.names)


def check_attributes(scene: Scene, random: np.random.Generator) -> None:
    for turn, pattern in (
        (ask_colour(scene, random), r"What colour is the (.+)\?"),
        (ask_side(scene, random), r"Where is the (.+)\?"),
    ):
        if turn is None:
            assert all(scene.only(name) is None for name in scene.names)
            continue
        found = re.fullmatch(pattern, turn.question)
        assert found is not None
        thing = scene.only(found[1])
        assert thing is not None
        assert turn.answer in (f"It is {thing.colour}.", f"It is {thing.side}.")


def test_conversations_have_one_or_two_turns_and_depend_on_the_generator_alone() -> None:
    talks = conversations(SCENES[0], rng(), 50)
    assert len(talks) == 51
    assert {len(talk) for talk in talks} == {1, 2}
    assert talks == conversations(SCENES[0], rng(), 50)
    assert talks[0][0].question in CAPTION_PROMPTS.values()
