"""Yes or no: what each rule reads in an answer, and the figures of yes/no questions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cmg_gguf.evaluation.answers import DASH_B, MME, NAMED, POPE, RULES, STRICT, Label
from cmg_gguf.evaluation.confusion import confusion_counts, confusion_figures

# answer: what pope, strict, mme and named make of it
READINGS: dict[str, tuple[Label | None, Label | None, Label | None, Label | None]] = {
    "Yes": ("yes", "yes", "yes", "yes"),
    "No": ("no", "no", "no", "no"),
    "No.": ("no", "no", "no", "no"),
    "yes.": ("yes", "yes", "yes", "yes"),
    " **Yes**\n": ("yes", "yes", None, "yes"),
    "NO": ("yes", "no", "no", "no"),
    "No!": ("yes", "no", "no", "no"),
    "No, there is no dog.": ("no", None, "no", "no"),
    "No, it is a cat.": ("no", None, "no", "no"),
    "Yes, but not a big one.": ("no", None, "yes", "yes"),
    "Yes. There is no dog.": ("yes", None, "yes", None),
    "There is no dog, I think": ("no", None, None, "no"),
    "There is a dog": ("yes", None, None, None),
    "I do not know": ("no", None, None, None),
    "Know": ("yes", None, "no", None),
    "Noted, yes": ("yes", None, "no", "yes"),
    "yes and no": ("no", None, "yes", None),
    "Yesterday": ("yes", None, "yes", None),
    "Not at all": ("yes", None, "no", None),
    "": ("yes", None, None, None),
    "...": ("yes", None, None, None),
}


@pytest.mark.parametrize("answer", READINGS)
def test_each_rule_reads_an_answer_by_its_definition(answer: str) -> None:
    assert (POPE(answer), STRICT(answer), MME(answer), NAMED(answer)) == READINGS[answer]


def test_dash_bs_rule_looks_for_yes_and_then_for_no_anywhere() -> None:
    said = {"No, yes": "yes", "YES!": "yes", "Yesterday": "yes", "I do not know": "no", "NO": "no"}
    assert {answer: DASH_B(answer) for answer in said} == said
    assert DASH_B("There is one") is DASH_B("") is None


def test_rules_are_found_by_their_names() -> None:
    assert {name: rule.name for name, rule in RULES.items()} == {
        name: name for name in ("pope", "strict", "mme", "dash-b", "named")
    }


def figures(rows: list[tuple[Label, Label | None]], positive: Label = "yes") -> dict[str, float]:
    counts = [confusion_counts(truth, said, positive=positive) for truth, said in rows]
    sums = {name: np.asarray(sum(c[name] for c in counts)) for name in counts[0]}
    return {name: float(value) for name, value in confusion_figures(sums).items()}


def test_figures_of_hand_made_answers() -> None:
    present: list[Label | None] = ["yes", "yes", "yes", "no", None]
    absent: list[Label | None] = ["yes", "yes", "no", "no", "no"]
    rows: list[tuple[Label, Label | None]] = [("yes", said) for said in present]
    rows += [("no", said) for said in absent]
    found = figures(rows)
    assert found == pytest.approx(
        {
            "accuracy": 60,
            "balanced_accuracy": 60,
            "precision": 60,
            "recall": 60,
            "f1": 60,
            "yes_ratio": 50,
            "unparsed": 10,
        }
    )


@pytest.mark.parametrize("positive", ["yes", "no"])
def test_balanced_accuracy_does_not_depend_on_how_many_items_each_class_has(
    positive: Label,
) -> None:
    always: list[tuple[Label, Label | None]] = [("no", "no") for _ in range(9)]
    always.append(("yes", "no"))
    assert figures(always, positive)["balanced_accuracy"] == 50
    assert figures(always, positive)["accuracy"] == 90
    better: list[tuple[Label, Label | None]] = [*always[:6]]
    better += [("no", "yes"), ("no", "yes"), ("no", "yes"), ("yes", "yes")]
    assert figures(better, positive)["balanced_accuracy"] == pytest.approx((100 * 6 / 9 + 100) / 2)
    assert math.isnan(figures([("no", "no")], positive)["balanced_accuracy"])


def test_the_positive_class_can_be_no() -> None:
    rows: list[tuple[Label, Label | None]] = [("no", "no"), ("no", "yes"), ("yes", "yes")]
    found = figures(rows, positive="no")
    assert found["precision"] == pytest.approx(100)
    assert found["recall"] == pytest.approx(50)
    assert found["f1"] == pytest.approx(200 / 3)
    assert found["yes_ratio"] == pytest.approx(200 / 3)


def test_the_yes_ratio_is_of_the_answers_and_not_of_the_truth() -> None:
    assert figures([("yes", "no"), ("yes", "no"), ("no", "no")])["yes_ratio"] == 0
    assert figures([("no", "yes"), ("no", "yes"), ("no", "no")])["yes_ratio"] == pytest.approx(
        200 / 3
    )


def test_an_unparsed_answer_is_wrong_and_of_no_class() -> None:
    found = figures([("no", None), ("no", "no")])
    assert found["accuracy"] == 50
    assert found["yes_ratio"] == 0
    assert math.isnan(found["precision"])


def test_never_saying_yes_has_no_precision_but_an_f1_of_0() -> None:
    found = figures([("yes", "no"), ("no", "no")])
    assert math.isnan(found["precision"])
    assert (found["recall"], found["f1"]) == (0, 0)


def test_nothing_counted_gives_nan_and_no_warning() -> None:
    assert all(np.isnan(value) for value in confusion_figures({}).values())
    empty = dict.fromkeys(confusion_counts("yes", "yes"), np.zeros(3))
    for value in confusion_figures(empty).values():
        assert value.shape == (3,)
        assert np.isnan(value).all()
