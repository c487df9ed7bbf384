"""Layers with a state, in one context: its second branch, and prompts that go on from a state.

The judge is the same engine with a context for each branch and nothing kept, where every row of
either branch is decoded from the start. `test_hybrid.py` holds that one to the float64 judge.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from guided import ids, open_vlm
from matrix import REFRESHES, SCOPES, every_refresh, every_scope
from prompts import ONE_IMAGE, PICTURE, TWO_IMAGES, TWO_IN_A_ROW, picture
from stepped import SharePace
from support import EXACT, TOLERANCE, Rig, Tiny
from test_reuse import QUESTIONS, longer, n_alike
from tiny_llava import TinyConfig, TinyPair

from cmg_gguf import Contrast, Guidance, GuidedVLM, Request, UnsupportedError
from cmg_gguf.arrays import FloatArray
from cmg_gguf.engine.steps import AUTO, EAGER, Strategy
from cmg_gguf.errors import BackendError
from cmg_gguf.guidance import (
    PLAIN,
    AttentionMass,
    CumulativeMass,
    LayerRange,
    LayerSet,
    LowestCosine,
    Refresh,
    Scope,
    States,
    TopRatio,
)
from cmg_gguf.prompt.segments import Prompt

ARCHS = "lfm2", "qwen35", "granitehybrid"
N_STEPS = 6
WAITS = Strategy(waiting="always")

every_arch = pytest.mark.parametrize("arch", ARCHS)


@pytest.fixture
def stateful(arch: str, open_tiny: Callable[[TinyConfig], Tiny]) -> Tiny:
    return open_tiny(TinyConfig(arch=arch))  # type: ignore[arg-type]


def answer(
    rig: Rig, prompt: Prompt, guidance: Guidance, tokens: Sequence[int], *, every: int = 1
) -> list[tuple[FloatArray, FloatArray | None]]:
    """(l_o, l_d) behind the prompt and behind each token; l_d of every `every`-th row alone."""
    rig.engine.prefill(prompt, guidance)
    found = []
    for i in range(len(tokens) + 1):
        degraded = rig.engine.degraded_logits if i % every == 0 else None
        found.append((rig.engine.original_logits, degraded))
        if i < len(tokens):
            rig.engine.step(tokens[i])
    return found


def judged(
    tiny: Tiny, prompt: Prompt, guidance: Guidance, options: Any = EXACT
) -> tuple[list[int], list[tuple[FloatArray, FloatArray | None]]]:
    """Greedy tokens, and what two contexts make of them."""
    rig = Rig(tiny, options, pairing="contexts")
    rig.engine.prefill(prompt, guidance)
    tokens: list[int] = []
    for _ in range(N_STEPS):
        l_o, l_d = rig.engine.original_logits, rig.engine.degraded_logits
        tokens.append(int((l_o if l_d is None else 2 * l_o - l_d).argmax()))
        rig.engine.step(tokens[-1])
    return tokens, answer(Rig(tiny, options, pairing="contexts"), prompt, guidance, tokens)


def agree(
    rig: Rig, prompt: Prompt, guidance: Guidance, options: Any = EXACT, *, every: int = 1
) -> tuple[int, int]:
    """Asserts that an answer of one context is the judge's; rows of the prompt that each branch
    decoded."""
    tokens, expected = judged(rig.tiny, prompt, guidance, options)
    rig.n_decoded()
    found = answer(rig, prompt, guidance, tokens, every=every)
    for (l_o, l_d), (expected_o, expected_d) in zip(found, expected, strict=True):
        assert np.abs(l_o - expected_o).max() <= TOLERANCE
        if l_d is not None:
            assert expected_d is not None
            assert np.abs(l_d - expected_d).max() <= TOLERANCE
            assert np.abs(l_d - l_o).max() > 100 * TOLERANCE
    original, degraded = rig.n_decoded()
    return original - len(tokens), degraded - len(tokens)


# --- two branches --------------------------------------------------------------------------------


@every_arch
@every_refresh
@every_scope
def test_both_branches_are_what_two_contexts_make_of_them(
    stateful: Tiny, scope: Scope, refresh: Refresh
) -> None:
    guidance = Guidance(scope=scope, refresh=refresh)
    prompt = stateful.prompt(ONE_IMAGE, PICTURE)
    n, image = prompt.n_tokens, int(prompt.is_image.argmax())
    own = {"all": n - image, "text": n - image - 16, "question": n - image - 16, "decode": 1}
    for stepping in (EAGER, WAITS):
        rig = Rig(stateful, stepping=stepping)
        assert agree(rig, prompt, guidance) == (n, own[scope])


@every_arch
@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(layers=LayerSet((3,))),
        Guidance(layers=LayerRange(), tokens=TopRatio(1.0)),
        Guidance(layers=AttentionMass(0.5), tokens=CumulativeMass(0.8)),
        Guidance(layers=LowestCosine(0.9), refresh="prompt"),
    ],
    ids=str,
)
def test_layers_and_tokens_are_chosen_alike(stateful: Tiny, guidance: Guidance) -> None:
    agree(Rig(stateful), stateful.prompt(ONE_IMAGE, PICTURE), guidance)


@every_arch
@every_scope
@pytest.mark.parametrize("text", [TWO_IMAGES, TWO_IN_A_ROW], ids=["apart", "in a row"])
def test_two_pictures_in_small_decodes(stateful: Tiny, scope: Scope, text: str) -> None:
    options = replace(EXACT, n_ubatch=8)
    prompt = stateful.prompt(text, 3, 4)
    rig = Rig(stateful, options, stepping=WAITS, n_slots=2)
    agree(rig, prompt, Guidance(scope=scope), options, every=3)


@every_arch
@pytest.mark.parametrize("every", [2, 3, 7])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rows_may_wait_in_any_mixture(stateful: Tiny, every: int, share: float) -> None:
    rig = Rig(stateful, stepping=AUTO, pace=SharePace(share))
    agree(rig, stateful.prompt(ONE_IMAGE, PICTURE), Guidance(), every=every)


@every_arch
@pytest.mark.parametrize("seed", range(6))
def test_any_choice_of_layers_that_attend_changes_the_logits(stateful: Tiny, seed: int) -> None:
    rng = np.random.default_rng(seed)
    attending = stateful.model.attention_layers
    layers = rng.permutation(attending)[: rng.integers(1, len(attending) + 1)].tolist()
    rig, prompt = Rig(stateful), stateful.prompt(ONE_IMAGE, PICTURE)
    rig.engine.prefill(prompt, Guidance(layers=LayerSet(tuple(layers))))
    assert rig.engine.layers == tuple(sorted(layers))
    degraded = rig.engine.degraded_logits
    assert degraded is not None
    assert np.abs(rig.engine.original_logits - degraded).max() > 100 * TOLERANCE


@every_arch
def test_a_state_is_shared_where_it_stands_or_not_at_all(stateful: Tiny) -> None:
    rig = Rig(stateful)
    rig.engine.prefill(stateful.prompt(ONE_IMAGE, PICTURE), PLAIN)
    with pytest.raises(BackendError, match=r"sequence 0 stands behind \d+, not at 5"):
        rig.contexts[0].share(0, 1, 5)


@every_arch
@pytest.mark.parametrize("scope", ["text", "all"])
@pytest.mark.parametrize("text", [ONE_IMAGE, TWO_IMAGES], ids=["one", "two"])
def test_a_state_that_never_read_the_pictures_is_two_contexts(
    stateful: Tiny, text: str, scope: Scope
) -> None:
    prompt = stateful.prompt(text, *(3, 4)[: text.count("<")])
    rig = Rig(stateful, stepping=WAITS, n_slots=2)
    agree(rig, prompt, Guidance(scope=scope, states="unread"))


# --- kept states ---------------------------------------------------------------------------------


@every_arch
@every_refresh
@pytest.mark.parametrize("scope", ["text", "question"])
@pytest.mark.parametrize("stepping", [EAGER, WAITS], ids=["eager", "waits"])
@pytest.mark.parametrize("states", ["read", "unread"])
def test_more_questions_about_a_picture_decode_their_text_alone(
    stateful: Tiny, scope: Scope, refresh: Refresh, stepping: Strategy, states: States
) -> None:
    if states == "unread" and scope != "text":
        return  # refused
    rig = Rig(stateful, n_slots=2, stepping=stepping)
    guidance = Guidance(scope=scope, refresh=refresh, states=states)
    prompts = [stateful.prompt(text, PICTURE) for text in QUESTIONS]
    behind = int(prompts[0].is_image.argmax()) + 16
    assert agree(rig, prompts[0], guidance)[0] == prompts[0].n_tokens
    for prompt in prompts[1:] + prompts[:1]:
        assert agree(rig, prompt, guidance) == (prompt.n_tokens - behind,) * 2
        assert rig.engine.n_reused == behind


@every_arch
@pytest.mark.parametrize("guidance", [PLAIN, Guidance(), Guidance(states="unread")], ids=str)
def test_what_takes_more_cells_than_may_be_kept_is_not_kept(
    stateful: Tiny, guidance: Guidance
) -> None:
    rig, prompt = Rig(stateful, n_slots=2, max_cells=12), stateful.prompt(QUESTIONS[0], PICTURE)
    for _ in range(2):
        assert agree(rig, prompt, guidance)[0] == prompt.n_tokens
    assert rig.engine.prefixes.n_prefixes == 0


@every_arch
def test_a_plain_conversation_goes_on_behind_its_answer(stateful: Tiny) -> None:
    rig, prompt = Rig(stateful, n_slots=2), stateful.prompt(QUESTIONS[0], PICTURE)
    more = stateful.model.tokenize(" USER: How many? ASSISTANT:").tolist()
    n_held = 0
    for _ in range(3):
        tokens, _ = judged(stateful, prompt, PLAIN)
        assert agree(rig, prompt, PLAIN)[0] == prompt.n_tokens - n_held
        n_held = prompt.n_tokens + len(tokens)
        prompt = longer(prompt, *tokens, *more)
    assert rig.engine.prefixes.n_prefixes == 2  # behind the picture, and behind the newest answer
    other = stateful.prompt(QUESTIONS[1], PICTURE)
    assert agree(rig, other, PLAIN)[0] < other.n_tokens - 16


@every_arch
@every_scope
def test_a_guided_conversation_goes_on_behind_its_prompt(stateful: Tiny, scope: Scope) -> None:
    rig, guidance = Rig(stateful, n_slots=2), Guidance(scope=scope)
    prompt = stateful.prompt(QUESTIONS[0], PICTURE)
    more = stateful.model.tokenize(" USER: How many? ASSISTANT:").tolist()
    n_held = 0
    for _ in range(3):
        tokens, _ = judged(stateful, prompt, guidance)
        original, degraded = agree(rig, prompt, guidance)
        assert rig.engine.n_reused == n_held == prompt.n_tokens - original
        if n_held:
            assert degraded == (1 if scope == "decode" else original)
        n_held = prompt.n_tokens + (len(tokens) if scope == "decode" else 0)
        prompt = longer(prompt, *tokens, *more)


@every_arch
def test_a_state_is_of_no_use_to_a_prompt_that_parts_before_it(stateful: Tiny) -> None:
    rig = Rig(stateful, n_slots=3)
    agree(rig, stateful.prompt(QUESTIONS[0], PICTURE), PLAIN)
    for prompt in (stateful.prompt(QUESTIONS[0], 4), stateful.prompt(ONE_IMAGE, PICTURE)):
        assert n_alike(stateful.prompt(QUESTIONS[0], PICTURE), prompt) > 0
        assert agree(rig, prompt, PLAIN)[0] == prompt.n_tokens


GUIDANCES = [
    PLAIN,
    *(Guidance(scope=s, refresh=r) for s in SCOPES for r in REFRESHES),
    Guidance(layers=LayerSet((1, 4))),
    Guidance(layers=AttentionMass(0.5)),
    Guidance(layers=LowestCosine(0.9), refresh="prompt"),
    Guidance(states="unread"),
    Guidance(states="unread", scope="all", refresh="prompt"),
]


@every_arch
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("n_slots", [1, 2, 3])
def test_any_guidance_may_follow_any_other(stateful: Tiny, seed: int, n_slots: int) -> None:
    rig = Rig(stateful, n_slots=n_slots, stepping=(EAGER, WAITS)[seed])
    rng = np.random.default_rng(seed)
    for i in rng.permutation(len(GUIDANCES)).tolist():
        picture_seed = int(rng.choice((PICTURE, PICTURE, 4)))
        prompt = stateful.prompt(QUESTIONS[int(rng.integers(3))], picture_seed)
        agree(rig, prompt, GUIDANCES[i], every=1 + seed)


# --- all of it -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ARCHS)
def pair(request: pytest.FixtureRequest, written: Callable[[TinyConfig], TinyPair]) -> TinyPair:
    return written(TinyConfig(arch=request.param))


def test_a_second_question_encodes_nothing_and_decodes_its_text(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open_vlm(pair) as vlm, open_vlm(pair, pairing="contexts") as apart:
        assert [v.engine.lanes[0].paired for v in (vlm, apart)] == [True, False]
        assert [v.engine.prefixes.keeps for v in (vlm, apart)] == [True, False]
        encoded: list[Any] = []
        embed = vlm.projector._embed

        def spy(image: Any) -> Any:
            encoded.append(image)
            return embed(image)

        monkeypatch.setattr(vlm.projector, "_embed", spy)
        for i, question in enumerate(("What is there?", "How many people are there?")):
            reply = vlm.generate(question, [picture(0)], max_tokens=12)
            assert ids(reply) == ids(apart.generate(question, [picture(0)], max_tokens=12))
            assert (reply.n_reused_tokens > 16) == (i == 1)
            assert len(encoded) == 1
    assert capfd.readouterr().err == ""


def test_answers_at_once_are_those_made_one_by_one(pair: TinyPair) -> None:
    questions = "What is there?", "Is there a dog?"
    guidances = PLAIN, Guidance(), Guidance(beta=0.0), Guidance(scope="all")
    requests = [
        Request(question, [picture(seed % 3)], guidance=guidance, max_tokens=8 + seed)
        for seed, (question, guidance) in enumerate(itertools.product(questions, guidances))
    ]
    with open_vlm(pair, n_ctx=1024, prefix_cells=0) as vlm:
        expected = [ids(vlm.generate(request)) for request in requests]
    with open_vlm(pair, n_ctx=1024, n_parallel=3) as vlm:
        n_rows: list[int] = []
        decode = vlm.engine.decoder.decode

        def spy(batches: Any, n_free: int) -> Any:
            n_rows.append(len(batches))
            return decode(batches, n_free)

        vlm.engine.decoder.decode = spy  # type: ignore[method-assign]
        found = {o.index: ids(o.reply) for o in vlm.generate_many(requests) if o.reply}
    assert max(n_rows) == 3  # steps of three answers in one decode
    assert [found[i] for i in range(len(requests))] == expected


@pytest.mark.parametrize("other", [("What is it?", []), ("What is there?", [picture(5)])], ids=len)
def test_a_branch_of_another_prompt_is_what_two_contexts_make_of_it(
    pair: TinyPair, other: tuple[str, list[Any]]
) -> None:
    replies = []
    for pairing in ("pair", "contexts"):
        with open_vlm(pair, pairing=pairing) as vlm:
            replies.append(
                vlm.generate(
                    "What is there?",
                    [picture(0)],
                    guidance=Guidance(beta=0.0),
                    contrast=Contrast(*other),
                    n_scores=8,
                    max_tokens=8,
                )
            )
    assert ids(replies[0]) == ids(replies[1])
    for a, b in zip(replies[0].scores, replies[1].scores, strict=True):
        assert np.abs(a - b).max() <= 3 * TOLERANCE


def test_what_does_not_apply_is_refused(pair: TinyPair) -> None:
    with pytest.raises(UnsupportedError, match="a recurrent layer of this model would miss"):
        GuidedVLM(*pair, strategy="approximate")
