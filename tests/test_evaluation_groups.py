"""Benchmarks that count several answers at once: MME's images, HallusionBench's figures."""

from __future__ import annotations

import math
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
    write_json,
)

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.answers import STRICT
from cmg_gguf.evaluation.statistics import bootstrap, table
from cmg_gguf.evaluation.task import CountsByCluster
from cmg_gguf.evaluation.tasks.hallusion import Hallusion
from cmg_gguf.evaluation.tasks.mme import Mme

ASK = "Is there a {} in this image? Please answer yes or no."


def write_questions(path: Path, lines: tuple[str, ...] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = lines or (f"{ASK.format('dog')}\tYes", f"{ASK.format('cat')}\tNo")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def mme(tmp_path: Path) -> Mme:
    """Images 1 and 2 in one layout, 3 in the other, 4 in the first; a folder without questions."""
    root = write_images(tmp_path / "MME", ["existence/1.jpg", "existence/2.png", "empty/x.jpg"])
    write_images(root, ["artwork/images/3.jpg"])
    for name in ("existence/1.txt", "existence/2.txt", "artwork/questions_answers_YN/3.txt"):
        write_questions(root / name)
    write_images(root, ["code_reasoning/4.png"])
    write_questions(root / "code_reasoning/4.txt")
    return Mme(root)


def test_both_layouts_of_mme_are_read(mme: Mme) -> None:
    items = good(mme)
    assert [item.part for item in items] == [
        *["artwork"] * 2,
        *["code_reasoning"] * 2,
        *["existence"] * 4,
    ]
    assert [item.id for item in items[4:6]] == ["existence/1/1", "existence/1/2"]
    assert items[4].prompt == ASK.format("dog")
    assert [item.truth["label"] for item in items[4:6]] == ["yes", "no"]
    assert items[4].cluster == items[5].cluster != items[6].cluster
    assert all(mme.load(item).is_file() for item in items)
    assert isinstance(mme, CountsByCluster)


def test_mme_true_answers_score_200_a_subtask(mme: Mme) -> None:
    found = figures(mme, labels(mme))
    assert (found["score"], found["perception"], found["cognition"]) == (600, 400, 200)
    assert (found["accuracy"], found["accuracy_plus"], found["yes_ratio"]) == (100, 100, 50)


def test_mme_by_hand(mme: Mme) -> None:
    """existence: 3 of 4 right and 1 of 2 images; artwork: 1 of 2, no image; code: none right."""
    answers = {
        **labels(mme),
        "existence/1/2": "yes, there is",
        "artwork/3/1": "I think so",
        "code_reasoning/4/1": "No.",
        "code_reasoning/4/2": "Yes.",
    }
    found = figures(mme, answers)
    assert found["perception"] == pytest.approx((75 + 50) + (50 + 0))
    assert found["cognition"] == 0
    assert found["score"] == pytest.approx(175)
    assert found["accuracy"] == pytest.approx(50)
    assert found["accuracy_plus"] == pytest.approx(25)
    assert found["unparsed"] == pytest.approx(12.5)
    one = figures(mme, answers, "existence")
    assert (one["score"], one["perception"]) == pytest.approx((125, 125))
    assert math.isnan(one["cognition"])


def test_mme_reads_the_first_four_characters_unless_told_otherwise(mme: Mme) -> None:
    answers = dict.fromkeys(labels(mme), "Nothing")
    assert figures(mme, answers)["accuracy"] == 50
    assert figures(Mme(mme.root, rule=STRICT), answers)["accuracy"] == 0


def test_one_answer_of_an_image_does_not_count_for_accuracy_plus(mme: Mme) -> None:
    items = [item for item in good(mme) if item.id == "existence/1/1"]
    counts = table(mme, items, ["Yes"])
    values = dict(zip(counts.names, counts.values[0], strict=True))
    assert (values["existence.right"], values["existence.images"]) == (1, 0)


def test_mme_subtasks_can_be_chosen_and_unknown_ones_count_for_the_score(mme: Mme) -> None:
    root = Path(mme.root)
    write_images(root, ["mine/5.jpg"])
    write_questions(root / "mine/5.txt")
    task = Mme(root, ["mine", "existence"])
    found = figures(task, labels(task))
    assert (found["score"], found["perception"]) == (400, 200)
    assert math.isnan(found["cognition"])


def test_mme_bootstrap_keeps_the_questions_of_an_image_together(mme: Mme) -> None:
    items = good(mme)
    truth = labels(mme)
    worse = {**truth, "existence/1/1": "No"}
    tables = {
        name: table(mme, items, [answers[i.id] for i in items])
        for name, answers in (("right", truth), ("wrong", worse))
    }
    found = bootstrap(mme.figures, tables, baseline="right", n=400)["wrong"]["accuracy_plus"]
    assert found.difference is not None
    assert found.difference.value == -25
    assert found.difference.low < -25 < found.difference.high == 0


def test_mme_figures_are_sound(mme: Mme) -> None:
    check_figures_are_sound(mme, labels(mme))


def test_mme_lines_and_folders_that_are_wrong_are_told(mme: Mme, tmp_path: Path) -> None:
    root = Path(mme.root)
    write_questions(root / "existence/2.txt", ("no tab here", f"{ASK.format('dog')}\tMaybe", ""))
    write_questions(root / "existence/9.txt", ("Is it?\tYes",))
    assert bad(mme) == {
        "existence/2.txt:1": "there is no tab between question and answer",
        "existence/2.txt:2": "'answer' is 'Maybe': yes or no is expected",
        "existence/9.txt:1": "image '9' (.jpg, .png, ...) is not in the folder",
    }
    with pytest.raises(EvaluationError, match=r"MME folder .* is no folder"):
        list(Mme(root / "none").items())
    with pytest.raises(EvaluationError, match="has no subtask folder with questions"):
        list(Mme(root / "empty").items())
    with pytest.raises(EvaluationError, match=r"MME subtask .*OCR' is no folder"):
        list(Mme(root, ["OCR"]).items())


def row(category: str, figure: str, question: str, gt: str, visual: str = "1") -> dict[str, Any]:
    return {
        "category": category,
        "subcategory": "chart",
        "visual_input": visual,
        "set_id": "0",
        "figure_id": figure,
        "question_id": question,
        "question": "Is it so?",
        "gt_answer": gt,
        "filename": None if visual == "0" else f"./hallusion_bench/{category}/chart/0_{figure}.png",
    }


ROWS = [
    *[row("VD", "0", "0", "1"), row("VD", "0", "1", "0")],
    *[row("VD", "1", "0", "0"), row("VD", "1", "1", "1")],
    *[row("VS", "0", "0", "1", "0"), row("VS", "1", "0", "1", "1"), row("VS", "2", "0", "0", "2")],
]


@pytest.fixture
def hallusion(tmp_path: Path) -> Hallusion:
    names = [f"hallusion_bench/{c}/chart/0_{f}.png" for c, f in (("VD", 0), ("VD", 1), ("VS", 1))]
    images = write_images(tmp_path / "root", [*names, "hallusion_bench/VS/chart/0_2.png"])
    return Hallusion(write_json(tmp_path / "HallusionBench.json", ROWS), images)


def test_hallusion_items_without_an_image_have_none(hallusion: Hallusion) -> None:
    items = good(hallusion)
    assert [item.image is None for item in items] == [False] * 4 + [True] + [False] * 2
    assert [item.part for item in items] == ["VD"] * 4 + ["VS"] * 3
    assert len({item.cluster for item in items}) == 2
    assert hallusion.load(items[0]).is_file()
    inner = Hallusion(hallusion.questions, Path(hallusion.images) / "hallusion_bench")
    assert [item.image for item in good(inner)] == [item.image for item in items]


def test_hallusion_true_answers_score_perfectly(hallusion: Hallusion) -> None:
    found = figures(hallusion, labels(hallusion))
    assert (found["a_acc"], found["f_acc"], found["q_acc"]) == (100, 100, 100)


def test_hallusion_by_hand(hallusion: Hallusion) -> None:
    """Wrong: VD figure 1 question 1, and VS figure 2."""
    answers = {**labels(hallusion), "VD/chart/0/1/1": "No.", "VS/chart/0/2/0": "Yes, it is."}
    found = figures(hallusion, answers)
    assert found["a_acc"] == pytest.approx(100 * 5 / 7)
    assert found["f_acc"] == pytest.approx(100 * 2 / 4)  # VS without an image is no figure
    assert found["q_acc"] == pytest.approx(100 * 1 / 3)
    assert figures(hallusion, answers, "VD")["q_acc"] == 50
    assert figures(hallusion, answers, "VS")["f_acc"] == 50


def test_an_unsure_answer_is_right_only_without_an_image(hallusion: Hallusion) -> None:
    answers = dict.fromkeys(labels(hallusion), "I cannot tell.")
    found = figures(hallusion, answers)
    assert found["a_acc"] == pytest.approx(100 / 7)
    assert (found["f_acc"], found["q_acc"], found["unparsed"]) == (0, 0, 100)
    assert figures(hallusion, dict.fromkeys(answers, " "))["a_acc"] == 0


def test_hallusion_figures_are_sound(hallusion: Hallusion) -> None:
    check_figures_are_sound(hallusion, labels(hallusion))


def test_hallusion_records_that_are_wrong_are_told(hallusion: Hallusion, tmp_path: Path) -> None:
    rows = [
        {**ROWS[0], "gt_answer": "2"},
        {k: v for k, v in ROWS[0].items() if k != "set_id"},
        {**ROWS[0], "filename": "./hallusion_bench/none.png"},
        "text",
        ROWS[0],
        ROWS[0],
    ]
    task = Hallusion(write_json(tmp_path / "h.json", rows), hallusion.images)
    expected = [
        *("'gt_answer' is '2': 0 or 1", "'set_id' is missing", "'none.png' is not in the image"),
        *("is no JSON object", "was there before"),
    ]
    problems = bad(task)
    assert list(problems) == [f"h.json[{i}]" for i in (0, 1, 2, 3, 5)]
    for problem, text in zip(problems.values(), expected, strict=True):
        assert text in problem
    with pytest.raises(EvaluationError, match="holds a dict: a list of records is expected"):
        list(Hallusion(write_json(tmp_path / "d.json", {}), hallusion.images).items())
