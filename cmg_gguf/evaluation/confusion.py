"""Counts and figures of yes/no questions, as several tasks share them.

accuracy: right answers, of all. balanced_accuracy: the mean of right answers to items of either
class, of that class: 50 for who always says the same, however many items each has. precision:
right, of the answers that say the positive class. recall: found, of the items of the positive
class. f1: 2 * hits / (said + there), which is the harmonic mean of the two. yes_ratio: answers that
say yes, of all answers (not of the truth). unparsed: answers that say neither, of all; they are
wrong, and of no class. All in percent.
"""

from __future__ import annotations

from cmg_gguf.evaluation.answers import Label
from cmg_gguf.evaluation.statistics import Floats, column, percent
from cmg_gguf.evaluation.task import Sums


def confusion_counts(
    truth: Label, said: Label | None, *, positive: Label = "yes"
) -> dict[str, float]:
    """What one answer adds: names "questions", "right", "there", "said", "hits", ..."""
    return {
        "questions": 1.0,
        "right": float(said == truth),
        "there": float(truth == positive),
        "said": float(said == positive),
        "hits": float(said == truth == positive),
        "yes": float(said == "yes"),
        "unparsed": float(said is None),
    }


def confusion_figures(sums: Sums) -> dict[str, Floats]:
    """The figures above, from sums of `confusion_counts`; nan where nothing is to divide by."""
    questions, there = column(sums, "questions"), column(sums, "there")
    said, hits = column(sums, "said"), column(sums, "hits")
    right = column(sums, "right")
    found, rejected = percent(hits, there), percent(right - hits, questions - there)
    return {
        "accuracy": percent(right, questions),
        "balanced_accuracy": (found + rejected) / 2,
        "precision": percent(hits, said),
        "recall": found,
        "f1": percent(2 * hits, said + there),
        "yes_ratio": percent(column(sums, "yes"), questions),
        "unparsed": percent(column(sums, "unparsed"), questions),
    }
