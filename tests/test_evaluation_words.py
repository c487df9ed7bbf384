"""Which objects a text names: plurals, phrases, guarded words, COCO's categories."""

from __future__ import annotations

import pytest

from cmg_gguf.evaluation.tasks.coco_words import CATEGORIES, SYNONYMS, lexicon
from cmg_gguf.evaluation.words import Lexicon, plurals, tokens, with_plurals

COCO = lexicon()


@pytest.mark.parametrize(
    ("word", "plural"),
    [
        *[("dog", "dogs"), ("bus", "buses"), ("glass", "glasses"), ("box", "boxes")],
        *[("bench", "benches"), ("brush", "brushes"), ("knife", "knives"), ("leaf", "leaves")],
        *[("scarf", "scarves"), ("puppy", "puppies"), ("key", "keys"), ("potato", "potatoes")],
        *[("photo", "photos"), ("person", "people"), ("woman", "women"), ("mouse", "mice")],
        *[("child", "children"), ("sheep", "sheep"), ("goose", "geese"), ("giraffe", "giraffes")],
        *[
            ("human", "humans"),
            ("wolf", "wolves"),
            ("roof", "roofs"),
            ("wine glass", "wine glasses"),
        ],
        *[("police officer", "police officers"), ("fireman", "firemen"), ("tv", "tvs")],
    ],
)
def test_plurals_of_english_nouns(word: str, plural: str) -> None:
    assert plural in plurals(word)


def test_words_are_parted_by_hyphens_and_apostrophes_and_lower_cased() -> None:
    assert tokens("The dog's T-shirt, 2 cups!") == ["the", "dog", "s", "t", "shirt", "2", "cups"]


def test_the_longest_phrase_wins_and_words_are_whole() -> None:
    words = Lexicon(with_plurals({"dog": "dog", "hot dog": "hot dog", "hot dog stand": None}))
    assert words.find("A dog eats hot dogs at the hot dog stand. Dogged dogma.") == [
        "dog",
        "hot dog",
    ]


def test_every_mention_counts_in_order() -> None:
    words = Lexicon(with_plurals({"cat": "cat", "dog": "dog"}))
    assert words.find("cats, a dog and a CAT") == ["cat", "dog", "cat"]


def test_a_guarded_word_counts_only_behind_a_determiner() -> None:
    words = Lexicon(with_plurals({"can": "can"}), guarded=("can",))
    assert words.find("It can be seen. Can you?") == []
    assert words.find("There is a can next to two cans.") == ["can", "can"]


def test_a_phrase_of_its_own_is_not_taken_for_a_plural() -> None:
    assert with_plurals({"glass": "drink", "glasses": "eyes"})["glasses"] == "eyes"


def test_an_empty_lexicon_and_an_empty_text_name_nothing() -> None:
    assert Lexicon({}).find("a dog") == []
    assert COCO.find("") == []


def test_there_are_80_categories_and_no_word_stands_for_two() -> None:
    assert len(CATEGORIES) == 80
    words = [word for row in SYNONYMS.values() for word in row]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_word_of_a_category_is_found_in_singular_and_plural(category: str) -> None:
    for word in SYNONYMS[category]:
        assert COCO.find(f"There is a {word} here.") == [category], word
        assert COCO.find(f"Some {plurals(word)[0]} here.") == [category], word


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two puppies and a kitten on a couch", ["dog", "cat", "couch"]),
        ("A man eats a hot dog next to teddy bears", ["person", "hot dog", "teddy bear"]),
        ("a baby elephant near a passenger train", ["elephant", "train"]),
        ("an adult giraffe on the train tracks", ["giraffe"]),
        ("a toilet seat and a home plate", ["toilet"]),
        ("a baseball bat, a bow tie and a stop-sign", ["baseball bat", "tie", "stop sign"]),
        ("wine glasses and a glass of water", ["wine glass"]),
        ("people wearing skis", ["person", "skis"]),
        ("the sky over a quiet field", []),
    ],
)
def test_objects_of_captions(caption: str, objects: list[str]) -> None:
    assert COCO.find(caption) == objects


def test_categories_that_are_not_cocos_stand_for_themselves() -> None:
    words = lexicon(["Palm Tree", "robot"])
    assert words.find("two robots under palm trees, and a dog") == ["robot", "Palm Tree", "dog"]
