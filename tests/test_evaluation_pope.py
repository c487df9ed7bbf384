"""POPE's question files: parts, figures, and lines that are no question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluated import (
    bad,
    check_figures_are_sound,
    figures,
    good,
    labels,
    write_images,
    write_lines,
)

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.answers import STRICT
from cmg_gguf.evaluation.items import read_items
from cmg_gguf.evaluation.tasks.pope import Pope

NAMES = ("dog", "cat", "car", "bus")


def question(number: int, image: str, name: str, label: str) -> dict[str, object]:
    text = f"Is there a {name} in the image?"
    return {"question_id": number, "image": image, "text": text, "label": label}


@pytest.fixture
def pope(tmp_path: Path) -> Pope:
    images = write_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    rows = [
        question(2 * i + j + 1, image, NAMES[2 * i + j], ("yes", "no")[j])
        for i, image in enumerate(["a.jpg", "b.jpg"])
        for j in range(2)
    ]
    files = [
        write_lines(tmp_path / f"coco_pope_{part}.json", rows) for part in ("random", "adversarial")
    ]
    return Pope([*files, write_lines(tmp_path / "mine.jsonl", rows[:2])], images)


def test_items_are_the_lines_with_their_part_and_image(pope: Pope) -> None:
    items = good(pope)
    assert [item.part for item in items] == [*["random"] * 4, *["adversarial"] * 4, *["mine"] * 2]
    first = items[0]
    assert first.id == "coco_pope_random/1"
    assert first.prompt == "Is there a dog in the image?"
    assert (first.truth, first.cluster) == ({"label": "yes"}, "a.jpg")
    assert pope.load(first).is_file()
    assert len({item.id for item in items}) == 10


def test_a_suffix_stands_behind_every_question(pope: Pope) -> None:
    asked = good(Pope(pope.files, pope.images, suffix=" One word."))
    assert asked[0].prompt == "Is there a dog in the image? One word."


def test_true_answers_score_perfectly(pope: Pope) -> None:
    found = figures(pope, labels(pope))
    assert found == {
        **dict.fromkeys(("accuracy", "balanced_accuracy", "precision", "recall", "f1"), 100),
        "yes_ratio": 50,
        "unparsed": 0,
    }


def test_figures_of_a_part_are_of_that_part_alone(pope: Pope) -> None:
    answers = {**labels(pope), "coco_pope_random/1": "No."}
    assert figures(pope, answers, "random")["accuracy"] == 75
    assert figures(pope, answers, "random")["recall"] == 50
    assert figures(pope, answers, "random")["yes_ratio"] == 25
    assert figures(pope, answers, "adversarial")["accuracy"] == 100


def test_the_rule_decides_what_an_answer_says(pope: Pope) -> None:
    answers = dict.fromkeys(labels(pope), "There is one")
    official = figures(pope, answers)
    strict = figures(Pope(pope.files, pope.images, rule=STRICT), answers)
    assert (official["yes_ratio"], official["unparsed"], official["accuracy"]) == (100, 0, 50)
    assert (strict["yes_ratio"], strict["unparsed"], strict["accuracy"]) == (0, 100, 0)


def test_a_category_is_a_records_part_and_ids_differ_within_it(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["a.jpg"])
    rows: list[dict[str, object]] = [
        {**question(1, "a.jpg", "dog", label), "category": category}
        for category, label in (("random", "yes"), ("popular", "yes"), ("adversarial", "no"))
    ]
    path = write_lines(tmp_path / "pope_adversarial.json", [*rows, question(1, "a.jpg", "x", "no")])
    items = good(Pope([path], images))
    assert [item.part for item in items] == ["random", "popular", "adversarial", "adversarial"]
    assert len({item.id for item in items}) == 4
    broken = write_lines(tmp_path / "b.json", [{**rows[0], "category": None}, rows[0], rows[0]])
    problems = bad(Pope([broken], images))
    assert [where.partition(":")[2] for where in problems] == ["1", "3"]
    assert "'category' is None" in problems["b.json:1"]


def test_files_need_neither_be_complete_nor_balanced(tmp_path: Path) -> None:
    """RePOPE's: POPE's lines without those that are ambiguous."""
    names = [f"{k}.jpg" for k in range(3)]
    images = write_images(tmp_path / "images", names)
    rows = [
        question(number, names[number % 3], NAMES[number % 4], "yes" if number in (3, 11) else "no")
        for number in (1, 3, 4, 8, 11, 13, 2999)
    ]
    task = Pope([write_lines(tmp_path / "coco_repope_popular.json", rows)], images)
    assert {item.part for item in good(task)} == {"popular"}
    found = figures(task, dict.fromkeys(labels(task), "No"))
    assert found["accuracy"] == pytest.approx(100 * 5 / 7)
    assert (found["balanced_accuracy"], found["yes_ratio"]) == (50, 0)
    check_figures_are_sound(task, labels(task))


def test_repopes_three_files_are_parts_and_beside_popes_own_they_are_not_mixed(
    tmp_path: Path,
) -> None:
    """Lines as POPE publishes them, and RePOPE says it has no others: a space behind each comma and
    colon, no further field."""
    image = "COCO_val2014_000000310196.jpg"
    images = write_images(tmp_path / "val2014", [image])
    line = (
        '{"question_id": 1, "image": "%s", "text": "Is there a snowboard in the image?", '
        '"label": "%s"}\n'
    )
    parts = ("random", "popular", "adversarial")
    repope, pope = (
        [tmp_path / f"coco_{kind}_{part}.json" for part in parts] for kind in ("repope", "pope")
    )
    for path, label in (*((path, "no") for path in repope), *((path, "yes") for path in pope)):
        path.write_text(line % (image, label))
    alone = good(Pope(repope, images))
    assert [(item.part, item.truth["label"]) for item in alone] == [(p, "no") for p in parts]
    assert alone[0].prompt == "Is there a snowboard in the image?"
    both = Pope([*pope, *repope], images)
    assert [item.part for item in good(both)] == [
        *(f"coco_pope_{part}" for part in parts),
        *(f"coco_repope_{part}" for part in parts),
    ]
    said = dict.fromkeys(labels(both), "No.")
    assert figures(both, said, "coco_repope_random")["accuracy"] == 100
    assert figures(both, said, "coco_pope_random")["accuracy"] == 0


def test_figures_are_sound(pope: Pope) -> None:
    check_figures_are_sound(pope, labels(pope))


def test_a_line_that_is_no_question_is_told_with_its_place(tmp_path: Path) -> None:
    whole = question(1, "a.jpg", "dog", "yes")
    rows = [
        whole,
        '{"question_id": 2, "image": ',
        {k: v for k, v in whole.items() if k != "label"},
        {**whole, "question_id": 4, "label": "maybe"},
        {**whole, "question_id": 5, "image": "gone.jpg"},
        "",
        [1, 2],
        {**whole, "question_id": None},
        whole,
        {**whole, "question_id": 9, "label": "No"},
        {**whole, "question_id": 10, "image": "x" * 5000},
    ]
    task = Pope(
        [write_lines(tmp_path / "q.json", rows)], write_images(tmp_path / "images", ["a.jpg"])
    )
    problems = bad(task)
    assert [where.partition(":")[2] for where in problems] == [
        "2",
        "3",
        "4",
        "5",
        "7",
        "8",
        "9",
        "11",
    ]
    expected = [
        *("no JSON", "'label' is missing", "'label' is 'maybe': yes or no", "'gone.jpg' is not in"),
        *("is no JSON object", "'question_id' is None", "id 'q/1' was there before", "is not in"),
    ]
    for problem, text in zip(problems.values(), expected, strict=True):
        assert text in problem
    assert len(list(task.items())) == len(rows) - 1  # nothing is skipped but the blank line


def test_a_file_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_bytes(b'{"question_id": 1, "text": "\xff\xfe"}\n')
    assert "no JSON" in bad(Pope([path], tmp_path))["q.json:1"]


def test_missing_files_and_folders_are_one_clear_error(tmp_path: Path) -> None:
    there = write_lines(tmp_path / "q.json", [])
    with pytest.raises(EvaluationError, match=r"image folder '.*none' is no folder: give one"):
        list(Pope([there], tmp_path / "none").items())
    with pytest.raises(EvaluationError, match="cannot be read"):
        list(Pope([tmp_path / "gone.json"], tmp_path).items())


def test_files_that_share_a_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [write_lines(folder / "q.json", []) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(EvaluationError, match="share a name: rename one"):
        list(Pope(paths, tmp_path).items())


# --- files as they come ---------------------------------------------------------------------------


def test_a_list_in_one_json_file_is_read_as_lines_are(pope: Pope, tmp_path: Path) -> None:
    first = Path(pope.files[0])
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    folder = tmp_path / "as a list"
    folder.mkdir()
    for text in (json.dumps(rows), "\ufeff \n" + json.dumps(rows, indent=2)):
        path = folder / first.name
        path.write_text(text, encoding="utf-8")
        assert good(Pope([path], pope.images)) == good(Pope([first], pope.images))
    path.write_text(json.dumps([*rows, {**rows[0], "label": 2}]))
    assert bad(Pope([path], pope.images)) == {
        f"{first.name}[4]": "'label' is '2': yes or no is expected"
    }


@pytest.mark.parametrize(
    ("label", "meant"),
    [
        *((value, "yes") for value in (1, True, "1", "True", " YES ")),
        *((value, "no") for value in (0, False, "0", "false", "No")),
    ],
)
def test_labels_are_read_as_they_are_written(label: Any, meant: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["a.jpg"])
    row = {**question(1, "a.jpg", "dog", "yes"), "label": label}
    (item,) = good(Pope([write_lines(tmp_path / "q.json", [row])], images))
    assert item.truth == {"label": meant}


@pytest.mark.parametrize("label", [2, -1, "maybe", "", None, 1.0, [1]])
def test_a_label_that_is_none_is_told(label: Any, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["a.jpg"])
    row = {**question(1, "a.jpg", "dog", "yes"), "label": label}
    (problem,) = bad(Pope([write_lines(tmp_path / "q.json", [row])], images)).values()
    assert problem.startswith("'label' is")


def test_without_numbers_image_and_question_tell_records_apart(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    rows = [
        {k: v for k, v in question(0, image, name, "yes").items() if k != "question_id"}
        for image in ("a.jpg", "b.jpg")
        for name in NAMES
    ]
    path = write_lines(tmp_path / "q.json", [*rows, rows[0]])
    items = read_items(Pope([path], images)).items
    assert len({item.id for item in items}) == len(rows)
    assert items[0].id == "q/a.jpg: Is there a dog in the image?"
    (again,) = bad(Pope([path], images)).values()
    assert "was there before" in again


def test_a_name_without_its_suffix_is_the_one_file_that_has_it(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", ["a.jpg", "b.PNG", "c.d.jpg", "e.jpg", "e.png"])
    (images / "f.txt").write_text("no image")
    rows = [question(i, name, "dog", "yes") for i, name in enumerate(["a", "b", "c.d", "e", "f"])]
    task = Pope([write_lines(tmp_path / "q.json", rows)], images)
    items = read_items(task).items
    assert [Path(str(item.image)).name for item in items] == ["a.jpg", "b.PNG", "c.d.jpg"]
    assert bad(task) == {
        "q.json:4": "image 'e' may be any of e.jpg, e.png in the image folder; write its suffix",
        "q.json:5": "image 'f' is not in the image folder",
    }


def test_where_nothing_is_left_the_first_reason_and_how_many_share_it_are_told(
    tmp_path: Path,
) -> None:
    images = write_images(tmp_path / "images", ["other.jpg"])
    rows = [question(i, f"{i}.jpg", "dog", "yes") for i in range(1200)]
    path = write_lines(tmp_path / "q.json", [*rows, {"question_id": 1}])
    with pytest.raises(EvaluationError) as info:
        read_items(Pope([path], images))
    assert str(info.value) == (
        "pope has no items to ask about (1,201 broken: the first, q.json:1: image '0.jpg' is not "
        "in the image folder; 1,199 more alike); check its files"
    )
