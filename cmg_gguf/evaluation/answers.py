"""What an answer says, yes or no, by one of five rules.

    POPE("There is no dog, and the cat sleeps.")  # "no"
    STRICT("Yes, there is.")  # None: not a bare yes or no

`None` is an answer that says neither; tasks count it as "unparsed", and as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Label = Literal["yes", "no"]

_EDGES = re.compile(r"^[\W_]+|[\W_]+$")
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class YesNoRule:
    """A way to read answers, and its name in reports."""

    name: str
    read: Callable[[str], Label | None]

    def __call__(self, answer: str) -> Label | None:
        return self.read(answer)


def _pope(answer: str) -> Label:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


def _strict(answer: str) -> Label | None:
    bare = _EDGES.sub("", answer).lower()
    return "yes" if bare == "yes" else "no" if bare == "no" else None


def _mme(answer: str) -> Label | None:
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def _dash_b(answer: str) -> Label | None:
    said = answer.lower()
    return "yes" if "yes" in said else "no" if "no" in said else None


def _named(answer: str) -> Label | None:
    words = set(_WORD.findall(answer.lower()))
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


POPE = YesNoRule("pope", _pope)
"""POPE's: no where the text up to the first '.' has one of the words No, not, no; yes otherwise.

Words are what stands between spaces once commas are dropped, so "no!" and "NO" say yes, and so does
an empty answer: never None. Source: `evaluate.py` of RUCAIBox/POPE.
"""

STRICT = YesNoRule("strict", _strict)
"""Exactly yes or no, in any case, but for signs and spaces around it."""

MME = YesNoRule("mme", _mme)
"""MME's: yes where the first four characters, lower-cased, contain "yes"; else no for "no".

So "Know" says no. Source: `calculation.py` of MME's evaluation tool.
"""

DASH_B = YesNoRule("dash-b", _dash_b)
"""DASH-B's: yes where the answer contains "yes", in any case; else no for "no".

So "I do not know" says no. Source: `eval_utils.py` of YanNeu/DASH-B.
"""

NAMED = YesNoRule("named", _named)
"""The one of the words yes and no that the answer contains, in any case; None for both or none."""

RULES: dict[str, YesNoRule] = {rule.name: rule for rule in (POPE, STRICT, MME, DASH_B, NAMED)}
"""Every rule by its name."""
