"""Evidence of an answer's tokens, from the logits of both branches.

weighing = Weighing(model)
weighing.note(token, l_o)       # as the tokens are drawn
weighing.weigh(l_d)             # later, of each token in the same order
weighing.found                  # (n,) Evidence
"""

from __future__ import annotations

import tempfile
from typing import IO

import numpy as np

from cmg_gguf.answer.logits import divergence, entropy, log_softmax
from cmg_gguf.arrays import FloatArray
from cmg_gguf.evidence import EvidenceModel
from cmg_gguf.reply import Evidence

IN_MEMORY = 64 * 2**20
"""Bytes of logits that are kept in memory; more are in a temporary file."""


class Weighing:
    """Keeps l_o until l_d is there. found: what came of the tokens weighed so far."""

    def __init__(self, model: EvidenceModel) -> None:
        self.found: list[Evidence] = []
        self._model = model
        self._tokens: list[int] = []
        self._rows: IO[bytes] = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115

    def note(self, token: int, l_o: FloatArray) -> None:
        """A token that was drawn, and the logits (n_vocab,) float32 of the original branch."""
        self._rows.seek(len(self._tokens) * l_o.nbytes)
        self._rows.write(l_o.tobytes())
        self._tokens.append(token)

    def restart(self) -> None:
        """What was weighed will be weighed again."""
        self.found.clear()

    def weigh(self, l_d: FloatArray) -> None:
        """The degraded branch's logits (n_vocab,) float32 of the next token."""
        n = len(self.found)
        self._rows.seek(n * l_d.nbytes)
        l_o = np.frombuffer(self._rows.read(l_d.nbytes), np.float32)
        self.found.append(self._evidence(self._tokens[n], l_o, l_d))

    def close(self) -> None:
        """Frees what was kept."""
        self._rows.close()

    def _evidence(self, token: int, l_o: FloatArray, l_d: FloatArray) -> Evidence:
        measured = {
            "log_p_o": float(log_softmax(l_o)[token]),
            "log_p_d": float(log_softmax(l_d)[token]),
            "divergence": divergence(l_o, l_d),
            "entropy_o": entropy(l_o),
            "entropy_d": entropy(l_d),
        }
        return Evidence(**measured, score=self._model.score(**measured))
