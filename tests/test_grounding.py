"""What tells invented objects from real ones: areas, calibration, risk and coverage, weights."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from cmg_gguf.errors import EvaluationError
from cmg_gguf.evaluation.grounding import (
    Attention,
    ScoredMention,
    areas,
    calibration,
    fitted,
    left,
    rescored,
    with_evidence,
    words_told,
)
from cmg_gguf.evaluation.mentions import mentions_in
from cmg_gguf.evaluation.words import Lexicon
from cmg_gguf.evidence import TERMS, EvidenceModel
from cmg_gguf.guidance import Guidance
from cmg_gguf.heat.maps import Heat
from cmg_gguf.reply import Evidence, Reply, Seconds, Token, Word

LOOKED = Attention(0.3, 0.8)


def mention(
    present: bool,
    score: float,
    *,
    cluster: str = "",
    log_p_o: float = -0.5,
    log_p_d: float = -1.0,
    divergence: float = 0.1,
    entropy_o: float = 0.7,
    entropy_d: float = 0.9,
    attention: Attention = LOOKED,
) -> ScoredMention:
    evidence = Evidence(log_p_o, log_p_d, divergence, entropy_o, entropy_d, score)
    return ScoredMention("fork", present, cluster or f"{score}", evidence, attention)


def drawn(n: int, model: EvidenceModel, seed: int = 0) -> list[ScoredMention]:
    """Mentions that are there as often as `model` says."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(n):
        terms = {
            "log_p_o": -float(draw.exponential(1.0)),
            "log_p_d": -float(draw.exponential(2.0)),
            "divergence": float(draw.uniform(0, 0.6)),
            "entropy_o": float(draw.uniform(0, 3)),
            "entropy_d": float(draw.uniform(0, 3)),
        }
        score = model.score(**terms)
        evidence = Evidence(**terms, score=score)
        found.append(ScoredMention("fork", bool(draw.random() < score), str(i), evidence, LOOKED))
    return found


MODEL = EvidenceModel(
    intercept=0.5,
    log_p_o=0.8,
    difference=0.6,
    divergence=2.0,
    entropy_o=-0.4,
    entropy_d=0.3,
    p_o_entropy_o=1.5,
    p_o_p_d=-2.0,
    fitted_on="a draw",
)


def test_the_area_is_how_often_the_real_one_has_the_higher_score() -> None:
    draw = np.random.default_rng(1)
    found = [
        mention(bool(draw.random() < 0.6), round(draw.random(), 1), cluster=str(i))
        for i in range(60)
    ]
    real = [m.evidence.score for m in found if m.present]
    invented = [m.evidence.score for m in found if not m.present]
    won = [(a > b) + (a == b) / 2 for a, b in product(real, invented)]
    result = areas(found, n_samples=50)["evidence"]
    assert result.own.value == pytest.approx(100 * np.mean(won))
    assert result.own.low <= result.own.value <= result.own.high
    assert areas(found, n_samples=50)["probability"].own.value == 50  # all alike
    assert areas([m for m in found if m.present]) == areas([]) == {}


def test_higher_entropy_speaks_against_an_object() -> None:
    found = [
        mention(True, 0.5, entropy_o=0.1, cluster="a"),
        mention(False, 0.5, entropy_o=2, cluster="b"),
    ]
    assert areas(found, n_samples=5)["entropy"].own.value == 100


def test_attention_on_the_image_speaks_for_an_object_and_on_text_against_it() -> None:
    found = [
        mention(True, 0.5, attention=Attention(0.4, 0.9), cluster="a"),
        mention(False, 0.5, attention=Attention(0.1, 0.7), cluster="b"),
    ]
    told = areas(found, n_samples=5)
    assert told["image attention"].own.value == 100
    assert told["text attention"].own.value == 0


def test_calibration_is_the_mean_gap_between_score_and_share() -> None:
    found = [mention(True, 0.9)] * 3 + [mention(False, 0.9)] + [mention(False, 0.25)] * 4
    assert calibration(found) == pytest.approx(100 * (4 * 0.15 + 4 * 0.25) / 8)
    assert calibration([mention(True, 1.0)]) == 0
    assert math.isnan(calibration([]))
    assert calibration(drawn(20000, MODEL)) < 2


def test_what_is_left_when_the_least_supported_are_dropped() -> None:
    found = [mention(i % 2 == 0 or i >= 6, i / 10) for i in range(10)]
    assert left(found, 0.0) == pytest.approx(30)
    assert left(found, 0.5) == pytest.approx(20)  # 5 of 5 to 9
    assert left(found, 0.6) == 0
    assert math.isnan(left(found, 1.0))


def test_weights_come_back_from_what_they_have_drawn() -> None:
    model = fitted(drawn(100000, MODEL), "a draw")
    for name in ("intercept", *TERMS):
        assert getattr(model, name) == pytest.approx(getattr(MODEL, name), abs=0.25), name
    assert model.fitted_on == "a draw"


def test_fitted_weights_have_the_right_mean() -> None:
    """As a maximum of the likelihood must have it."""
    found = drawn(500, MODEL, seed=5)
    scores = [m.evidence.score for m in rescored(found, fitted(found, "x"))]
    assert np.mean(scores) == pytest.approx(np.mean([m.present for m in found]), abs=1e-4)


def test_nothing_is_fitted_to_objects_that_are_all_there() -> None:
    with pytest.raises(EvaluationError, match="weights need both"):
        fitted([mention(True, 0.5), mention(True, 0.6)], "x")


def test_a_mention_is_measured_where_its_first_word_begins() -> None:
    text = "Two Hot dogs, a cat."
    lexicon = Lexicon({"hot dogs": "hot dog", "cat": "cat"})
    tokens = tuple(
        Token(i, piece, i, evidence=Evidence(0, 0, 0, 0, 0, i / 10))
        for i, piece in enumerate(["Two", " Hot", " dog", "s", ", a", " cat", "."])
    )
    places = (
        ("Two", 0, 0, 0),
        ("Hot", 4, 1, 1),
        ("dogs", 8, 2, 3),
        ("a", 14, 4, 4),
        ("cat", 16, 5, 5),
    )
    words = tuple(Word(w, at, at + len(w), first, last) for w, at, first, last in places)
    # (7 tokens, 2 layers, 2 image tokens): token t gives t / 100 and 3 t / 100, then t / 50 each.
    weights = np.float32(0.01) * np.array(
        [[[t, 3 * t], [2 * t, 2 * t]] for t in range(7)], np.float32
    )
    heat = Heat(weights, (1, 3), (), ())
    made = {"evidence": EvidenceModel(), "words": words, "heat": heat}
    reply = Reply(text, tokens, "stop", 1, 1, Guidance(), (), 0, Seconds(), **made)  # type: ignore[arg-type]
    told = words_told(reply)
    assert told is not None
    assert told[2] == pytest.approx([8, 12, 0, 0, 0, 0, 0, 0.2, 0.08, 0.92])
    found = with_evidence(told, mentions_in(text, lexicon, ["cat"]), "p")
    assert [(m.name, m.present, m.evidence.score) for m in found] == [
        ("hot dog", False, 0.1),
        ("cat", True, 0.5),
    ]
    with pytest.raises(EvaluationError, match="7 numbers of a word, not 10"):
        with_evidence([one[:7] for one in told], mentions_in(text, lexicon, ["cat"]), "p")
    assert words_told(Reply(text, tokens, "stop", 1, 1, Guidance(), (), 0, Seconds())) is None
