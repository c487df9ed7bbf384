"""CHAIR on COCO files, AMBER, and folders: figures computed by hand, and files that are wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from evaluated import bad, check_figures_are_sound, figures, good, write_images, write_json

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation import files
from cmg_gguf.evaluation.mentions import caption_counts
from cmg_gguf.evaluation.task import CountsByCluster
from cmg_gguf.evaluation.tasks.amber import Amber
from cmg_gguf.evaluation.tasks.chair import Chair
from cmg_gguf.evaluation.tasks.folder import FolderPrompt
from cmg_gguf.prompt.formats import image_suffixes

INSTANCES: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "one.jpg"}, {"id": 2, "file_name": "two.jpg"}],
    "annotations": [
        {"image_id": 1, "category_id": 18},
        {"image_id": 1, "category_id": 18},
        {"image_id": 1, "category_id": 1},
        {"image_id": 2, "category_id": 3},
    ],
    "categories": [
        {"id": 1, "name": "person"},
        {"id": 3, "name": "car"},
        {"id": 18, "name": "dog"},
    ],
}
CAPTIONS = {"annotations": [{"image_id": 1, "caption": "A puppy with a frisbee and two men."}]}
ANSWERS = {
    "1": "A man throws a frisbee to his dog. The dog jumps over a bench.",
    "2": "A quiet street.",
}


@pytest.fixture
def chair(tmp_path: Path) -> Chair:
    return Chair(
        write_json(tmp_path / "instances.json", INSTANCES),
        write_images(tmp_path / "images", ["one.jpg", "two.jpg"]),
        write_json(tmp_path / "captions.json", CAPTIONS),
    )


def test_what_is_there_is_annotated_or_named_in_a_reference_caption(chair: Chair) -> None:
    assert [item.truth["objects"] for item in good(chair)] == [
        ["dog", "frisbee", "person"],
        ["car"],
    ]
    alone = Chair(chair.instances, chair.images)
    assert [item.truth["objects"] for item in good(alone)] == [["dog", "person"], ["car"]]


def test_chair_by_hand(chair: Chair) -> None:
    """Mentions: person, frisbee, dog, dog, bench; one of five is not there."""
    assert figures(chair, ANSWERS) == pytest.approx(
        {
            "chair_i": 20,
            "chair_s": 50,
            "recall": 75,
            "distinct_1": 100 * 14 / 17,
            "words": 8.5,
            "mentions": 2.5,
        }
    )


def test_without_reference_captions_more_is_hallucinated(chair: Chair) -> None:
    found = figures(Chair(chair.instances, chair.images), ANSWERS)
    assert (found["chair_i"], found["recall"]) == pytest.approx((40, 200 / 3))


def test_a_caption_of_what_is_there_is_perfect(chair: Chair) -> None:
    found = figures(chair, {"1": "people, dogs, frisbees", "2": "a car"})
    assert (found["chair_i"], found["chair_s"], found["recall"]) == (0, 0, 100)


def test_empty_captions_have_no_chair_i(chair: Chair) -> None:
    found = figures(chair, {"1": "", "2": ""})
    assert math.isnan(found["chair_i"])
    assert (found["chair_s"], found["recall"], found["words"]) == (0, 0, 0)


def test_chair_figures_are_sound(chair: Chair) -> None:
    check_figures_are_sound(chair, ANSWERS)


def test_repeated_mentions_count_each_but_are_recalled_once() -> None:
    counts = caption_counts("a b c", ["dog", "dog", "cat"], ["dog", "car"])
    assert counts["mentions"] == 3
    assert (counts["hallucinated"], counts["named"], counts["present"]) == (1, 1, 2)


def test_images_can_be_drawn_by_a_seed(tmp_path: Path) -> None:
    names = [f"{k}.jpg" for k in range(30)]
    source = {**INSTANCES, "images": [{"id": k, "file_name": n} for k, n in enumerate(names)]}
    path = write_json(tmp_path / "i.json", source)
    images = write_images(tmp_path / "images", names)
    drawn = [[i.id for i in good(Chair(path, images, n=10, seed=s))] for s in (0, 0, 1)]
    assert len(set(drawn[0])) == 10
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(good(Chair(path, images, n=99))) == 30
    with pytest.raises(EvaluationError, match="n=0 images"):
        list(Chair(path, images, n=0).items())


def test_categories_of_ones_own_are_found_by_their_names(tmp_path: Path) -> None:
    source = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 7}],
        "categories": [{"id": 7, "name": "Solar Panel"}, {"id": 8, "name": "drone"}],
    }
    images = write_images(tmp_path / "images", ["a.jpg"])
    task = Chair(write_json(tmp_path / "i.json", source), images)
    found = figures(task, {"1": "two solar panels and a drone"})
    assert (found["chair_i"], found["recall"]) == (50, 100)


def _with(rows: list[dict[str, Any]], key: str, make: Any) -> list[dict[str, Any]]:
    return [{**row, key: make(row[key])} if key in row else row for row in rows]


def test_ids_may_be_texts_in_one_file_and_numbers_in_another(chair: Chair, tmp_path: Path) -> None:
    texts = {
        "images": _with(INSTANCES["images"], "id", str),
        "annotations": _with(INSTANCES["annotations"], "category_id", str),
        "categories": INSTANCES["categories"],
    }
    captions = {"annotations": _with(CAPTIONS["annotations"], "image_id", str)}
    for instances, beside in ((texts, CAPTIONS), (INSTANCES, captions), (texts, captions)):
        mixed = Chair(
            write_json(tmp_path / "i.json", instances),
            chair.images,
            write_json(tmp_path / "c.json", beside),
        )
        assert good(mixed) == good(chair)


def test_files_about_other_images_are_refused(chair: Chair, tmp_path: Path) -> None:
    others = {"annotations": _with(CAPTIONS["annotations"], "image_id", lambda i: i + 100)}
    for captions, says in ((others, "image_id '101'"), ({"annotations": []}, "none at all")):
        path = write_json(tmp_path / "c.json", captions)
        with pytest.raises(EvaluationError, match=r"c\.json' is not about these images") as info:
            good(Chair(chair.instances, chair.images, path))
        assert says in str(info.value)
    rows = _with(INSTANCES["annotations"], "image_id", lambda i: i + 100)
    path = write_json(tmp_path / "i.json", {**INSTANCES, "annotations": rows})
    with pytest.raises(EvaluationError, match=r"i\.json' is not about these images"):
        good(Chair(path, chair.images))


def test_an_image_that_neither_file_is_about_is_told(chair: Chair, tmp_path: Path) -> None:
    rows = [row for row in INSTANCES["annotations"] if row["image_id"] == 1]
    path = write_json(tmp_path / "i.json", {**INSTANCES, "annotations": rows})
    assert bad(Chair(path, chair.images, chair.captions)) == {
        "i.json images[1]": "image 'two.jpg' of id '2' has neither instances nor captions"
    }


def test_an_image_that_is_not_there_is_a_bad_item(chair: Chair) -> None:
    (Path(chair.images) / "two.jpg").unlink()
    assert bad(chair) == {"instances.json images[1]": "image 'two.jpg' is not in the image folder"}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], "is no COCO annotation file"),
        ({**INSTANCES, "categories": None}, "has no list of categories"),
        ({**INSTANCES, "annotations": [{"image_id": 1}]}, "a record without 'category_id'"),
        (
            {**INSTANCES, "annotations": [{"image_id": 1, "category_id": 99}]},
            "category_id 99, which is not among its categories",
        ),
    ],
)
def test_a_broken_annotation_file_is_one_clear_error(
    chair: Chair, tmp_path: Path, broken: Any, message: str
) -> None:
    path = write_json(tmp_path / "broken.json", broken)
    with pytest.raises(EvaluationError, match=message):
        list(Chair(path, chair.images).items())


def test_an_annotation_file_that_is_no_json_is_told(chair: Chair, tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text('{"images": [')
    with pytest.raises(EvaluationError, match=r"cut.json' is no JSON \(.*\): download"):
        list(Chair(path, chair.images).items())


ANNOTATIONS = [
    {"id": 1, "type": "generative", "truth": ["sky", "man", "forest"], "hallu": ["dog", "sun"]},
    {"id": 2, "type": "generative", "truth": ["beach"], "hallu": ["sea"]},
    {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 4, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 5, "type": "discriminative-attribute-number", "truth": "no"},
    {"id": 6, "type": "relation", "truth": "no"},
    {"id": 7, "type": "discriminative-relation", "truth": "yes"},
]
RELATION = {
    "sky": [],
    "man": ["person", "boy"],
    "forest": ["tree", "bush"],
    "beach": ["sand"],
    "dog": [],
    "sun": [],
    "sea": ["water"],
    "sign": [],
    "can": [],
}
AMBER_ANSWERS = {
    "1": "A boy and his dogs walk under the trees. A sign can be seen.",
    "2": "Sand, and the water of the sea.",
    "3": "No",
    "4": "Yes",
    "5": "Yes.",
    "6": "no",
    "7": "There is contact.",
}


@pytest.fixture
def amber(tmp_path: Path) -> Amber:
    data = tmp_path / "data"
    queries = [
        {"id": a["id"], "image": f"AMBER_{1 + (a['id'] == 2)}.jpg", "query": "Describe."}
        for a in ANNOTATIONS
        if isinstance(a["id"], int)
    ]
    write_json(data / "query" / "query_all.json", queries)
    write_json(data / "annotations.json", ANNOTATIONS)
    write_json(data / "relation.json", RELATION)
    (data / "safe_words.txt").write_text("sign\nlight\n")
    return Amber(data, write_images(tmp_path / "images", ["AMBER_1.jpg", "AMBER_2.jpg"]))


def test_amber_items_have_their_type_as_part(amber: Amber) -> None:
    items = good(amber)
    parts = ["generative"] * 2 + ["existence", "attribute", "attribute", "relation", "relation"]
    assert [item.part for item in items] == parts
    assert [item.cluster for item in items[:3]] == ["AMBER_1.jpg", "AMBER_2.jpg", "AMBER_1.jpg"]
    assert items[0].prompt == "Describe."
    assert items[2].prompt == "Describe. Please answer yes or no."
    assert ["label" in item.truth for item in items] == [False, False, *[True] * 5]


def test_amber_descriptions_by_hand(amber: Amber) -> None:
    """1: boy (man), dog wrong, tree (forest), sign safe; 2: sand (beach), water, sea wrong."""
    found = figures(amber, AMBER_ANSWERS, "generative")
    assert found["chair"] == pytest.approx(100 * 3 / 7)
    assert found["cover"] == pytest.approx(100 * 3 / 4)
    assert found["hal"] == 100
    assert found["cog"] == pytest.approx(100 * 2 / 3)
    assert math.isnan(found["f1"])
    assert math.isnan(found["amber_score"])


def test_amber_questions_by_hand_with_no_as_the_positive_class(amber: Amber) -> None:
    """Truth no yes no no yes; said no yes yes no -."""
    found = figures(amber, AMBER_ANSWERS)
    assert found["accuracy"] == pytest.approx(60)
    assert found["precision"] == pytest.approx(100)
    assert found["recall"] == pytest.approx(200 / 3)
    assert found["f1"] == pytest.approx(80)
    assert (found["yes_ratio"], found["unparsed"]) == pytest.approx((40, 20))
    assert found["amber_score"] == pytest.approx((100 - 300 / 7 + 80) / 2)
    assert figures(amber, AMBER_ANSWERS, "existence")["f1"] == 100
    assert figures(amber, AMBER_ANSWERS, "attribute")["accuracy"] == 50


def test_amber_perfect_answers_score_100(amber: Amber) -> None:
    perfect = {"1": "a man, forests and the sky", "2": "a beach", "3": "No", "5": "no", "6": "No"}
    found = figures(amber, {**perfect, "4": "Yes", "7": "Yes"})
    assert (found["amber_score"], found["chair"], found["hal"], found["cog"]) == (100, 0, 0, 0)
    assert (found["cover"], found["accuracy"]) == (100, 100)


def test_a_word_covers_the_object_of_its_name_before_a_related_one(
    tmp_path: Path, amber: Amber
) -> None:
    truth = [{"id": 1, "type": "generative", "truth": ["wall", "building"], "hallu": []}]
    data = Path(amber.data)
    write_json(data / "annotations.json", truth)
    write_json(data / "relation.json", {"wall": ["building"], "building": []})
    query = write_json(
        tmp_path / "q.json", [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe."}]
    )
    task = Amber(data, amber.images, [query])
    assert figures(task, {"1": "a building with walls"})["cover"] == 100
    assert figures(task, {"1": "buildings"})["cover"] == 50


def test_amber_is_a_yes_no_task_where_no_query_is_generative(tmp_path: Path, amber: Amber) -> None:
    rows = [{"id": 3, "image": "AMBER_1.jpg", "query": "Is there a dog in this image?"}]
    asked = Amber(amber.data, amber.images, [write_json(tmp_path / "d.json", rows)])
    assert (amber.yes_no, asked.yes_no) == (False, True)


def test_amber_figures_are_sound(amber: Amber) -> None:
    check_figures_are_sound(amber, AMBER_ANSWERS)


def test_amber_records_that_are_wrong_are_told(amber: Amber, tmp_path: Path) -> None:
    annotations = [
        *ANNOTATIONS,
        {"id": 8, "type": "odd", "truth": "no"},
        {"id": 9, "type": "generative", "truth": "sky", "hallu": []},
        {"id": 10, "type": "relation", "truth": "perhaps"},
    ]
    write_json(Path(amber.data) / "annotations.json", annotations)
    rows = [{"id": i, "image": "AMBER_1.jpg", "query": "?"} for i in (8, 9, 10, 11)]
    task = Amber(amber.data, amber.images, [write_json(tmp_path / "q.json", [*rows, {"id": 1}])])
    expected = [
        *("type 'odd' is unknown", "'truth' is 'sky': a list of words"),
        *("'truth' is 'perhaps': yes or no", "id '11' is not in annotations.json"),
        "'image' is missing",
    ]
    for problem, text in zip(bad(task).values(), expected, strict=True):
        assert text in problem


def test_amber_files_that_are_missing_or_wrong_are_one_clear_error(amber: Amber) -> None:
    write_json(Path(amber.data) / "relation.json", ["sky"])
    with pytest.raises(EvaluationError, match="is no object of word lists"):
        list(Amber(amber.data, amber.images).items())
    (Path(amber.data) / "relation.json").unlink()
    with pytest.raises(EvaluationError, match=r"relation\.json' cannot be read"):
        list(Amber(amber.data, amber.images).items())


def test_a_folder_gives_one_item_an_image_and_no_figures(tmp_path: Path) -> None:
    write_images(tmp_path, ["b.PNG", "a.jpg", "inner/c.png"])
    (tmp_path / "notes.txt").write_text("x")
    task = FolderPrompt(tmp_path, "Describe the image.")
    items = good(task)
    assert [item.id for item in items] == ["a.jpg", "b.PNG"]
    assert {item.prompt for item in items} == {"Describe the image."}
    assert task.load(items[0]) == tmp_path / "a.jpg"
    assert figures(task, {"a.jpg": "A beach.", "b.PNG": ""}) == {}


def test_a_folders_images_are_those_of_every_format_that_is_read(tmp_path: Path) -> None:
    names = [f"{i}{suffix}" for i, suffix in enumerate(sorted(image_suffixes()))]
    assert {".heic", ".avif", ".jp2", ".webp", ".jpg"} <= {Path(name).suffix for name in names}
    for name in names:
        (tmp_path / name).touch()
    assert sorted(item.id for item in good(FolderPrompt(tmp_path, "?"))) == sorted(names)
    assert files.image_in(tmp_path, names[0].partition(".")[0]) == tmp_path / names[0]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="has no image"):
        list(FolderPrompt(tmp_path, "?").items())
    with pytest.raises(EvaluationError, match="is no folder"):
        list(FolderPrompt(tmp_path / "none", "?").items())


def test_captions_are_counted_one_by_one(chair: Chair, amber: Amber) -> None:
    assert not any(isinstance(task, CountsByCluster) for task in (chair, amber))
