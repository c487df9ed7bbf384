"""Evidence: what it is made of, against the judge; that asking for it changes no token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from guided import N_IMAGE_TOKENS, QUESTION, ids, is_empty, open_vlm
from judge import Verdict
from numpy.typing import NDArray
from prompts import ONE_IMAGE, PICTURE, picture
from reference import F64, softmax
from support import EXACT, TOLERANCE, Pairing, Rig, Tiny
from tiny_llava import TinyConfig, TinyPair

from cmg_gguf import (
    Contrast,
    Guidance,
    GuidanceError,
    GuidedVLM,
    PromptError,
    Reply,
    Request,
    Sampling,
    TopRatio,
)
from cmg_gguf.answer.logits import divergence, entropy
from cmg_gguf.evidence import UNFITTED, EvidenceModel
from cmg_gguf.guidance import BLIND, PLAIN, LayerRange
from cmg_gguf.reply import Evidence

EVERYTHING = Guidance(tokens=TopRatio(1.0), layers=LayerRange(0.0, 1.0), scope="text", beta=0.0)
"""What a replay hides, said as guidance: each row chooses anew, and chooses all."""
FITTED = EvidenceModel(
    intercept=0.3,
    log_p_o=0.5,
    difference=0.25,
    divergence=2.0,
    entropy_o=-0.5,
    entropy_d=0.4,
    p_o_entropy_o=0.7,
    p_o_p_d=-0.6,
)


@pytest.fixture(params=["pair", "contexts"])
def vlm(request: pytest.FixtureRequest, pair: TinyPair) -> Iterator[GuidedVLM]:
    with open_vlm(pair, pairing=request.param, strategy="exact") as opened:
        yield opened


def judged(original: F64, degraded: F64, token: int) -> tuple[float, float, float, float, float]:
    """log p_o, log p_d, JSD and both entropies in nats, by their definitions in float64."""
    p, q = softmax(original), softmax(degraded)
    both = (p + q) / 2
    jsd = sum((own * np.log(own / both)).sum() for own in (p, q)) / 2
    return (
        float(np.log(p[token])),
        float(np.log(q[token])),
        float(jsd),
        float(-(p * np.log(p)).sum()),
        float(-(q * np.log(q)).sum()),
    )


def measured(evidence: Evidence | None) -> tuple[float, float, float, float, float]:
    assert evidence is not None
    return (
        evidence.log_p_o,
        evidence.log_p_d,
        evidence.divergence,
        evidence.entropy_o,
        evidence.entropy_d,
    )


# --- against the judge ---------------------------------------------------------------------------


def replayed(rig: Rig, tiny: Tiny, guidance: Guidance, tokens: list[int]) -> list[NDArray[Any]]:
    """l_d of each token, by a replay behind an answer that was made under `guidance`."""
    engine, prompt = rig.engine.whole, tiny.prompt(ONE_IMAGE, PICTURE)
    session = engine.open(prompt, guidance, replays=True)
    engine.prefill(session, prompt)
    for token in tokens[:-1]:
        engine.step(session, token)
        engine.degraded(session)
    found: list[NDArray[Any]] = []
    engine.finish(engine.replaying(session, tokens, found.append))
    engine.drop(session)
    return found


@pytest.mark.parametrize("pairing", ["pair", "contexts"])
@pytest.mark.parametrize(
    "guidance",
    [
        PLAIN,
        Guidance(),
        Guidance(scope="all"),
        Guidance(scope="decode"),
        Guidance(refresh="prompt"),
    ],
    ids=["plain", "guided", "all", "decode", "prompt"],
)
@pytest.mark.parametrize("n_ubatch", [64, 8])
def test_a_replay_is_the_judges_blind_branch(
    tiny: Tiny, guidance: Guidance, pairing: Pairing, n_ubatch: int
) -> None:
    verdict: Verdict = tiny.verdict(tiny.prompt(ONE_IMAGE, PICTURE), EVERYTHING)
    rig = Rig(tiny, replace(EXACT, n_ubatch=n_ubatch), pairing=pairing)
    found = replayed(rig, tiny, guidance, verdict.tokens)
    assert len(found) == len(verdict.steps)
    assert verdict.gaps.min() > 1.0
    for l_d, step in zip(found, verdict.steps, strict=True):
        np.testing.assert_allclose(l_d, step.degraded, rtol=0, atol=TOLERANCE)


def test_measures_are_their_definitions() -> None:
    draw = np.random.default_rng(3)
    for scale in (0.1, 3.0, 30.0):
        p, q = (draw.normal(0, scale, 500).astype(np.float32) for _ in range(2))
        _, _, jsd, bits, _ = judged(p.astype(np.float64), q.astype(np.float64), 0)
        assert divergence(p, q) == pytest.approx(jsd, abs=1e-6)
        assert entropy(p) == pytest.approx(bits, abs=1e-9)
    certain = np.full(4, -np.inf, np.float32)
    certain[2] = 0
    assert entropy(certain) == 0


@pytest.mark.parametrize(
    "guidance", [PLAIN, Guidance(alpha=2.0), EVERYTHING], ids=["plain", "guided", "blind"]
)
def test_evidence_is_what_two_branches_say(vlm: GuidedVLM, llama: Tiny, guidance: Guidance) -> None:
    raw = f"USER: <__media__>\n{QUESTION} ASSISTANT:"
    reply = vlm.generate(
        raw, [picture(0)], raw=True, guidance=guidance, max_tokens=8, evidence=FITTED
    )
    rig, prompt = Rig(llama, pairing="contexts"), llama.prompt(raw, 0)
    rig.engine.prefill(prompt, EVERYTHING)
    for token in reply.tokens:
        original = rig.engine.original_logits.astype(np.float64)
        assert rig.engine.degraded_logits is not None
        degraded = rig.engine.degraded_logits.astype(np.float64)
        expected = judged(original, degraded, token.id)
        assert measured(token.evidence) == pytest.approx(expected, abs=2e-4)
        log_p_o, log_p_d, jsd, h_o, h_d = expected
        p_o, p_d = np.exp([log_p_o, log_p_d])
        terms = (log_p_o, log_p_o - log_p_d, jsd, h_o, h_d, p_o * h_o, p_o * p_d)
        z = 0.3 + np.dot((0.5, 0.25, 2.0, -0.5, 0.4, 0.7, -0.6), terms)
        assert token.evidence is not None
        assert token.evidence.score == pytest.approx(1 / (1 + np.exp(-z)), abs=2e-4)
        rig.engine.step(token.id)


@pytest.mark.parametrize("strategy", ["exact", "auto"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_where_guidance_hides_the_picture_pieces_have_the_evidence(
    pair: TinyPair, strategy: Any, beta: float
) -> None:
    asked: dict[str, Any] = {"guidance": replace(EVERYTHING, beta=beta), "max_tokens": 20}
    with open_vlm(pair, strategy=strategy) as vlm:
        stream = vlm.stream(QUESTION, [picture(0)], evidence=FITTED, **asked)
        streamed = [token for piece in stream for token in piece.tokens]
        assert streamed == list(stream.reply.tokens)
        assert all(word.evidence is not None for word in stream.reply.words)
        told = vlm.generate(
            QUESTION, [picture(0)], evidence=FITTED, guidance=PLAIN, max_tokens=1
        ).tokens[0]
    assert streamed[0].evidence is not None
    assert told.evidence is not None
    if told.id == streamed[0].id:
        assert measured(streamed[0].evidence) == pytest.approx(measured(told.evidence), abs=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        {"tokens": TopRatio(0.9)},
        {"layers": LayerRange(0.4, 1.0)},
        {"scope": "decode"},
        {"alpha": 0.0},
    ],
)
def test_where_it_hides_less_pieces_have_none(pair: TinyPair, other: dict[str, Any]) -> None:
    with open_vlm(pair) as vlm:
        asked: dict[str, Any] = {"guidance": replace(EVERYTHING, **other), "max_tokens": 4}
        stream = vlm.stream(QUESTION, [picture(0)], evidence=True, **asked)
        assert all(token.evidence is None for piece in stream for token in piece.tokens)
        assert all(token.evidence is not None for token in stream.reply.tokens)


# --- tokens and cost -----------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [PLAIN, Guidance(), Guidance(scope="all", refresh="prompt")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_evidence_changes_no_token(vlm: GuidedVLM, guidance: Guidance, temperature: float) -> None:
    def reply(evidence: bool) -> Reply:
        vlm.forget()
        return vlm.generate(
            QUESTION,
            [picture(0)],
            guidance=guidance,
            sampling=Sampling(temperature=temperature, seed=3),
            max_tokens=30,
            top_logprobs=3,
            evidence=evidence,
        )

    without, with_evidence = reply(False), reply(True)
    assert [replace(t, evidence=None) for t in with_evidence.tokens] == list(without.tokens)
    assert all(t.evidence is not None for t in with_evidence.tokens)
    assert all(t.evidence is None for t in without.tokens)
    assert with_evidence.text == without.text
    assert is_empty(vlm)


@pytest.mark.parametrize("strategy", ["auto", "exact", "approximate"])
def test_no_strategy_changes_the_evidence(pair: TinyPair, strategy: Any) -> None:
    with open_vlm(pair) as one, open_vlm(pair, strategy=strategy) as other:
        first = one.generate(QUESTION, [picture(0)], max_tokens=20, evidence=True)
        second = other.generate(QUESTION, [picture(0)], max_tokens=20, evidence=True)
    same = [a.id == b.id for a, b in zip(first.tokens, second.tokens, strict=True)]
    n = same.index(False) if False in same else len(same)
    assert n > 3
    for a, b in zip(first.tokens[:n], second.tokens[:n], strict=True):
        assert measured(a.evidence) == pytest.approx(measured(b.evidence), abs=1e-4)


@pytest.mark.parametrize("n_tokens", [1, 2, 30])
def test_plain_evidence_costs_a_few_decodes_at_the_end(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, n_tokens: int
) -> None:
    with open_vlm(pair) as vlm:
        rows: list[int] = []
        decode = vlm.engine.lanes[0].original.context.decode

        def counted(tokens: Any, *arguments: Any, **more: Any) -> None:
            rows.append(len(tokens))
            decode(tokens, *arguments, **more)

        context: Any = vlm.engine.lanes[0].original.context
        monkeypatch.setattr(context, "decode", counted)

        def decodes(evidence: bool) -> list[int]:
            rows.clear()
            vlm.forget()
            reply = vlm.generate(
                QUESTION, [picture(0)], guidance=PLAIN, max_tokens=n_tokens, evidence=evidence
            )
            assert len(reply.tokens) == n_tokens
            return list(rows)

        plain, with_evidence = decodes(False), decodes(True)
    n_question = plain[1]  # the text behind the picture
    n_more = n_question + n_tokens - 1
    assert with_evidence[: len(plain)] == plain
    assert sum(with_evidence[len(plain) :]) == n_more
    assert len(with_evidence) - len(plain) == -(-n_more // vlm.n_ubatch)


def test_logits_beyond_memory_are_as_good(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    def reply() -> Reply:
        with open_vlm(pair) as vlm:
            return vlm.generate(QUESTION, [picture(0)], max_tokens=20, evidence=True)

    usual = reply()
    monkeypatch.setattr("cmg_gguf.answer.weighing.IN_MEMORY", 5000)
    monkeypatch.setattr("cmg_gguf.engine.replay.LOGITS_BYTES", 5000)
    for a, b in zip(usual.tokens, reply().tokens, strict=True):
        assert measured(a.evidence) == pytest.approx(measured(b.evidence), abs=1e-5)


# --- beside others, and what is kept -------------------------------------------------------------


def test_beside_other_answers_evidence_is_the_same(pair: TinyPair) -> None:
    def asked(i: int) -> Request:
        guidance = PLAIN if i % 2 else Guidance()
        return Request(QUESTION, [picture(i)], guidance=guidance, max_tokens=20, evidence=i % 3 < 2)

    with open_vlm(pair, n_ctx=1024, n_parallel=4) as vlm:
        alone = [vlm.generate(asked(i)) for i in range(6)]
        vlm.forget()
        outcomes = {o.index: o.unwrap() for o in vlm.generate_many(map(asked, range(6)))}
        assert is_empty(vlm)
    for i, one in enumerate(alone):
        assert ids(outcomes[i]) == ids(one)
        for a, b in zip(one.tokens, outcomes[i].tokens, strict=True):
            assert (a.evidence is None) == (b.evidence is None) == (i % 3 == 2)
            if a.evidence is not None:
                assert measured(a.evidence) == pytest.approx(measured(b.evidence), abs=1e-4)


def test_little_room_makes_answers_wait_and_changes_nothing(pair: TinyPair) -> None:
    def asked(i: int) -> Request:
        return Request(QUESTION, [picture(i)], guidance=PLAIN, max_tokens=40, evidence=True)

    with open_vlm(pair, n_ctx=256, n_parallel=4) as vlm:
        alone = [vlm.generate(asked(i)) for i in range(4)]
        vlm.forget()
        outcomes = {o.index: o.unwrap() for o in vlm.generate_many(map(asked, range(4)))}
        assert is_empty(vlm)
    for i, one in enumerate(alone):
        assert ids(outcomes[i]) == ids(one)
        for a, b in zip(one.tokens, outcomes[i].tokens, strict=True):
            assert measured(a.evidence) == pytest.approx(measured(b.evidence), abs=1e-4)


@pytest.mark.parametrize("guidance", [PLAIN, Guidance()], ids=["plain", "guided"])
def test_a_prompt_goes_on_behind_evidence_and_evidence_behind_a_prompt(
    pair: TinyPair, guidance: Guidance
) -> None:
    settings: dict[str, Any] = {"guidance": guidance, "max_tokens": 12}
    with open_vlm(pair, n_ctx=1024) as vlm:
        first = vlm.generate(QUESTION, [picture(0)], evidence=True, **settings)
        again = vlm.generate(QUESTION, [picture(0)], evidence=True, **settings)
        without = vlm.generate(QUESTION, [picture(0)], **settings)
    assert first.n_reused_tokens == 0
    assert again.n_reused_tokens > N_IMAGE_TOKENS
    assert without.n_reused_tokens >= again.n_reused_tokens
    assert ids(first) == ids(again) == ids(without)
    for a, b in zip(first.tokens, again.tokens, strict=True):
        assert measured(a.evidence) == pytest.approx(measured(b.evidence), abs=1e-4)


def test_evidence_of_two_pictures_hides_both(pair: TinyPair, llama: Tiny) -> None:
    raw = "USER: <__media__>\nand <__media__>\nso ASSISTANT:"
    verdict = llama.verdict(llama.prompt(raw, 0, 1), EVERYTHING)
    with open_vlm(pair, n_ctx=512) as vlm:
        for _ in range(2):  # the second goes on from what is kept
            reply = vlm.generate(
                raw, [picture(0), picture(1)], raw=True, guidance=PLAIN, max_tokens=1, evidence=True
            )
            step = verdict.steps[0]
            expected = judged(step.original, step.degraded, reply.tokens[0].id)
            assert measured(reply.tokens[0].evidence) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("arch", ["gemma4", "lfm2"])
def test_models_of_other_kinds_have_evidence(written: Any, open_tiny: Any, arch: Any) -> None:
    config = TinyConfig(arch=arch)
    tiny = open_tiny(config)
    raw = f"USER: <__media__>\n{QUESTION} ASSISTANT:"
    verdict = tiny.verdict(tiny.prompt(raw, 0), EVERYTHING)
    with open_vlm(written(config)) as vlm:
        reply = vlm.generate(
            raw, [picture(0)], raw=True, guidance=PLAIN, max_tokens=1, evidence=True
        )
    step = verdict.steps[0]
    expected = judged(step.original, step.degraded, reply.tokens[0].id)
    assert measured(reply.tokens[0].evidence) == pytest.approx(expected, abs=2e-4)


# --- what is asked -------------------------------------------------------------------------------


def test_without_a_picture_there_is_no_evidence(vlm: GuidedVLM) -> None:
    with pytest.raises(PromptError, match="the request has none: add one"):
        vlm.generate(QUESTION, evidence=True)
    assert vlm.generate(QUESTION, max_tokens=2, evidence=False).tokens[0].evidence is None


def test_evidence_and_contrast_cannot_be_asked_for_at_once() -> None:
    with pytest.raises(PromptError, match="ask for one of them"):
        Request(QUESTION, [picture(0)], contrast=Contrast(QUESTION), evidence=True)


@pytest.mark.parametrize("value", [1, "yes", 0.5, {}])
def test_what_is_no_evidence_is_refused(value: Any) -> None:
    with pytest.raises(GuidanceError, match="write evidence=True"):
        Request(QUESTION, [picture(0)], evidence=value)


def test_weights_are_finite_numbers() -> None:
    for value in (float("nan"), float("inf"), "1", True):
        with pytest.raises(GuidanceError, match="no finite number"):
            EvidenceModel(difference=value)  # type: ignore[arg-type]


def test_the_score_of_weights_that_are_not_fitted() -> None:
    """As the docstring of UNFITTED has it."""

    def score(log_p_o: float, log_p_d: float) -> float:
        return UNFITTED.score(
            log_p_o=log_p_o, log_p_d=log_p_d, divergence=0.1, entropy_o=0.1, entropy_d=0.2
        )

    assert score(0.0, 0.0) == pytest.approx(0.731, abs=1e-3)
    assert score(-1.0, -3.0) == pytest.approx(1 / (1 + np.exp(-2.0)))
    assert 0 <= score(-1e9, -1e9) < 1e-9
    assert score(0.0, -1e9) > 1 - 1e-9
    assert not UNFITTED.is_fitted
    assert replace(UNFITTED, fitted_on="scenes").is_fitted


def test_a_replay_hides_what_the_definition_says() -> None:
    assert (BLIND.tokens, BLIND.layers, BLIND.scope) == (
        EVERYTHING.tokens,
        EVERYTHING.layers,
        "text",
    )
