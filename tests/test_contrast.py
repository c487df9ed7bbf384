"""A degraded branch with another prompt: its logits are those of that prompt alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fakes import Rig, prompt
from guided import QUESTION, forced, ids, is_empty, open_vlm
from prompts import picture
from stepped import ContrastEngine
from tiny_llava import TinyPair

from cmg_gguf import ContextLengthError, Contrast, Guidance, GuidedVLM, Reply
from cmg_gguf.answer.logits import combine
from cmg_gguf.arrays import FloatArray
from cmg_gguf.engine.contrast import shared_rows
from cmg_gguf.errors import BackendError
from cmg_gguf.guidance import PLAIN

N = 8
OTHER = "Describe the picture."


@pytest.fixture(scope="module", params=["pair", "contexts"])
def vlm(pair: TinyPair, request: pytest.FixtureRequest) -> Iterator[GuidedVLM]:
    with open_vlm(pair, pairing=request.param) as opened:
        yield opened


def scores(vlm: GuidedVLM, *asked: Any, **settings: Any) -> tuple[Reply, list[FloatArray]]:
    """An answer, and the scores that were drawn from."""
    reply = vlm.generate(*asked, max_tokens=N, n_scores=N, **settings)
    return reply, list(reply.scores)


@pytest.mark.parametrize(
    "contrast",
    [
        Contrast(QUESTION, [picture(1)]),
        Contrast(QUESTION),
        Contrast(f"Answer in one word. {OTHER}", [picture(0)]),
        Contrast(QUESTION, [picture(1)], strength=lambda n: 0.5 * n),
    ],
    ids=["other image", "no image", "other text", "strength by step"],
)
def test_scores_combine_the_two_prompts_own_logits(vlm: GuidedVLM, contrast: Contrast) -> None:
    guidance = Guidance(alpha=2.0, beta=0.1)
    reply, seen = scores(vlm, QUESTION, [picture(0)], guidance=guidance, contrast=contrast)
    original = forced(vlm, ids(reply), QUESTION, [picture(0)])
    degraded = forced(vlm, ids(reply), contrast.prompt, list(contrast.images))
    for n, (l_o, l_d, score) in enumerate(zip(original, degraded, seen, strict=True)):
        alpha = 2.0 if contrast.strength is None else contrast.strength(n)
        expected = combine(l_o, l_d, alpha=alpha, beta=0.0)
        assert np.abs(score - expected).max() < 1e-3
        assert reply.tokens[n].id == combine(l_o, l_d, alpha=alpha, beta=0.1).argmax()
        assert reply.tokens[n].plain == l_o.argmax()
    assert reply.n_changed > 0
    assert reply.layers == ()
    assert is_empty(vlm)


def test_the_same_prompt_changes_nothing(vlm: GuidedVLM) -> None:
    same = Contrast(QUESTION, [picture(0)])
    guidance = Guidance(alpha=3.0, beta=0.0)
    reply = vlm.generate(QUESTION, [picture(0)], guidance=guidance, contrast=same, max_tokens=N)
    plain = vlm.generate(QUESTION, [picture(0)], guidance=PLAIN, max_tokens=N)
    assert ids(reply) == ids(plain)


def test_masked_guidance_has_scores_too(vlm: GuidedVLM) -> None:
    guidance = Guidance(alpha=2.0, beta=0.0)
    reply, seen = scores(vlm, QUESTION, [picture(0)], guidance=guidance)
    assert ids(reply) == [int(score.argmax()) for score in seen]
    assert reply.n_changed > 0


def test_log_probabilities_follow_the_strength(vlm: GuidedVLM) -> None:
    contrast = Contrast(QUESTION, strength=lambda n: float(n))
    reply = vlm.generate(QUESTION, [picture(0)], contrast=contrast, max_tokens=N, top_logprobs=1)
    assert [token.top[0][0] for token in reply.tokens] == ids(reply)


def test_two_prompts_that_do_not_fit_are_refused_before_computing(vlm: GuidedVLM) -> None:
    long = "there " * 120
    with pytest.raises(ContextLengthError, match="raise n_ctx"):
        vlm.stream(long, [picture(0)], contrast=Contrast("there " * 300))
    if vlm.engine.lanes[0].paired:
        with pytest.raises(ContextLengthError, match="the two prompts need"):
            vlm.stream(long, [picture(0)], contrast=Contrast(long))


# --- Without a model ---


def test_rows_in_common_are_computed_once() -> None:
    rig = Rig()
    engine = ContrastEngine(rig.engine)
    rig.forget()
    engine.prefill(prompt(3, -4, 2), prompt(5))
    assert [call for call in rig.calls if call[0] != "truncate"] == [
        ("decode", [0, 1, 2], [0, 1, 2], [0, 0, 0]),
        ("share", 0, 1, 3),
        ("decode_image", 4, 3, 0),
        ("decode", [3, 4], [7, 8], [0, 0]),
        ("decode", [3, 4], [3, 4], [1, 1]),
    ]
    rig.forget()
    engine.step(5)
    assert rig.calls == [("decode", [5, 5], [9, 5], [0, 1])]


def test_the_last_row_is_never_shared() -> None:
    assert shared_rows(prompt(4), prompt(4)) == 3
    assert shared_rows(prompt(4), prompt(3)) == 2
    assert shared_rows(prompt(3, -2, 2), prompt(3, -2, 2)) == 3


def test_cells_are_counted_to_the_last() -> None:
    rig = Rig(n_ctx=16)
    engine = ContrastEngine(rig.engine)
    engine.prefill(prompt(6), prompt(1, -1, 1))
    steps = 0
    while engine.has_room:
        engine.step(0)
        steps += 1
    assert rig.contexts[0].n_used in (15, 16)
    assert steps == 4
    with pytest.raises(ContextLengthError):
        engine.step(0)


def test_a_failed_prefill_leaves_nothing() -> None:
    rig = Rig()
    engine = ContrastEngine(rig.engine)
    with pytest.raises(BackendError, match="call prefill"):
        engine.step(0)
    with pytest.raises(BackendError, match="call prefill"):
        _ = engine.original_logits
    rig.fuse.left = 2
    with pytest.raises(BackendError):
        engine.prefill(prompt(3, -4, 2), prompt(5))
    rig.fuse.left = None
    assert rig.contexts[0].n_used == 0
