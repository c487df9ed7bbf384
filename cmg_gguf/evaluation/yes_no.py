"""Yes and no as tokens: how far apart they are at the first token of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cmg_gguf.arrays import FloatArray, IntArray


class Vocabulary(Protocol):
    """The words of a model."""

    n_vocab: int

    def token_bytes(self, token: int) -> bytes: ...


@dataclass(frozen=True, eq=False)
class YesNoTokens:
    """Every token that spells yes, and every one that spells no, in any case, a space around it.

    yes, no: (n,) int32, ascending; empty where the vocabulary has no such token.
    """

    yes: IntArray
    no: IntArray

    @classmethod
    def of(cls, model: Vocabulary) -> YesNoTokens:
        """Those of a model's vocabulary."""
        words = [model.token_bytes(t).strip().lower() for t in range(model.n_vocab)]
        yes, no = (
            np.array([t for t, word in enumerate(words) if word == wanted], np.int32)
            for wanted in (b"yes", b"no")
        )
        return cls(yes, no)

    @property
    def complete(self) -> bool:
        """Whether there are both."""
        return len(self.yes) > 0 and len(self.no) > 0

    def margin(self, scores: FloatArray) -> float:
        """log p(yes) - log p(no) of scores (n_vocab,), each summed over its tokens."""
        return _log_sum_exp(scores[self.yes]) - _log_sum_exp(scores[self.no])

    def lead(self, scores: FloatArray) -> float:
        """The best score of a yes token minus the best of all others: above 0, greedy says yes."""
        rest = scores.astype(np.float64)
        rest[self.yes] = -np.inf
        return float(scores[self.yes].max()) - float(rest.max())


def _log_sum_exp(values: FloatArray) -> float:
    if not np.isfinite(values).any():
        return -np.inf
    wide: npt.NDArray[np.float64] = values.astype(np.float64)
    highest = float(wide.max())
    return highest + float(np.log(np.exp(wide - highest).sum()))
