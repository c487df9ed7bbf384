"""The tuning of the built-in model: margins that are reckoned from one run are those of the engine,
and a setting that cannot be chosen any more is one that would not have been."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from embedded.tune import Measures, is_allowed

from cmg_gguf import Disagreement, Guidance, GuidedVLM, LayerRange, TopRatio
from cmg_gguf.evaluation.yes_no import YesNoTokens
from cmg_gguf.guidance import PLAIN
from cmg_gguf.tiny.pair import embedded_pair

N = 2


@pytest.mark.parametrize(
    ("alpha", "gate", "beta"), [(0.5, None, 0.05), (2.0, Disagreement(3.0), 0.2), (0.0, None, 0.0)]
)
def test_margins_are_those_of_the_engine(
    tmp_path: Path, alpha: float, gate: Disagreement | None, beta: float
) -> None:
    llm, mmproj = embedded_pair()
    guidance = Guidance(
        alpha=alpha, beta=beta, gate=gate, tokens=TopRatio(1.0), layers=LayerRange(0, 1)
    )
    measures = Measures(llm.parent, N, tmp_path)
    with GuidedVLM(llm, mmproj, n_ctx=512, n_threads=1) as vlm:
        words = YesNoTokens.of(vlm.model)
    found = measures.margins(guidance)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert len(kept) == 1 + (alpha > 0)
    np.testing.assert_array_equal(measures.margins(guidance), found)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    # Weights of 8 bits: rounding depends on what shares a decode, and strength makes it larger.
    expected = np.array([words.margin(row) for row in measures.logits(guidance)])
    np.testing.assert_allclose(found, expected, rtol=0.03, atol=0.05)
    if alpha > 0:
        assert np.abs(found - measures.margins(PLAIN)).max() > 0.5
        other = dataclasses.replace(guidance, alpha=alpha + 1)
        assert np.abs(found - measures.margins(other)).max() > 0.5


def test_what_is_not_measured_to_the_end_is_not_allowed() -> None:
    plain = {"counter_recall": 55.0, "typical_chair_i": 16.0, "typical_recall": 85.0}
    whole = {**plain, "auc_low": 0.1, "counter_chair_i": 20.0}
    assert is_allowed(whole, plain)
    assert not is_allowed({**whole, "auc_low": 0.0}, plain)
    assert not is_allowed({**whole, "counter_recall": 54.9}, plain)
    assert not is_allowed({**whole, "typical_recall": 82.9}, plain)
    assert not is_allowed({**whole, "typical_chair_i": 18.1}, plain)
    for key in ("typical_recall", "counter_recall"):
        assert not is_allowed({k: v for k, v in whole.items() if k != key}, plain)
