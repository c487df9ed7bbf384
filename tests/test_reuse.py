"""Going on from a kept prompt, on a real tiny LLaVA: the same logits, from fewer rows."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matrix import REFRESHES, SCOPES, every_refresh, every_scope
from prompts import PICTURE
from support import EXACT, TOLERANCE, Pairing, Rig, Tiny, agree

from cmg_gguf.engine.steps import Strategy
from cmg_gguf.errors import BackendError
from cmg_gguf.guidance import (
    PLAIN,
    AttentionMass,
    Guidance,
    LayerSet,
    LowestCosine,
    Refresh,
    Scope,
    TopRatio,
)
from cmg_gguf.prompt.segments import Prompt, TextSegment

QUESTIONS = (
    "USER: Look at <__media__> Is there a dog? ASSISTANT:",
    "USER: Look at <__media__> Is there a red car near the tree? ASSISTANT:",
    "USER: Look at <__media__> How many people are in the street? ASSISTANT:",
)
TWO = "USER: <__media__> and <__media__> Is there a dog? ASSISTANT:"
ROUNDING = TOLERANCE / 5
"""Between two float32 forwards of the same rows in other batches."""


def longer(prompt: Prompt, *tokens: int) -> Prompt:
    """The prompt with more tokens behind it, in the same run of text."""
    last = prompt.segments[-1]
    assert isinstance(last, TextSegment)
    text = TextSegment(np.append(last.tokens, np.array(tokens, np.int32)))
    return Prompt((*prompt.segments[:-1], text))


def n_alike(*prompts: Prompt) -> int:
    """Rows that two prompts with the same images begin with alike."""
    rows = []
    for prompt in prompts:
        parts = [
            s.tokens if isinstance(s, TextSegment) else [-1] * s.n_tokens for s in prompt.segments
        ]
        rows.append(np.concatenate(parts).tolist())
    pairs = zip(*rows, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


# --- what is reused, and that it is right ------------------------------------------------------


@every_refresh
@every_scope
def test_more_questions_about_an_image_are_the_judges(
    tiny: Tiny, scope: Scope, refresh: Refresh
) -> None:
    rig, guidance = Rig(tiny, n_slots=2), Guidance(scope=scope, refresh=refresh)
    prompts = [tiny.prompt(text, PICTURE) for text in QUESTIONS]
    image = int(prompts[0].is_image.argmax())
    first_own = {"all": image, "text": image + 16, "question": image + 16}
    assert agree(rig, prompts[0], guidance)[0] == prompts[0].n_tokens
    for before, prompt in itertools.pairwise(prompts):
        n, alike = prompt.n_tokens, n_alike(before, prompt)
        assert alike > image + 16
        original, degraded = agree(rig, prompt, guidance)
        assert rig.engine.n_reused == n - original == alike
        if scope == "decode":
            assert degraded == 1
        elif refresh == "prompt":
            assert degraded == n - first_own[scope]
        else:
            assert degraded == n - alike


@every_scope
def test_a_conversation_goes_on_where_it_stopped(tiny: Tiny, scope: Scope) -> None:
    rig, guidance = Rig(tiny, n_slots=2), Guidance(scope=scope)
    prompt = tiny.prompt(QUESTIONS[0], PICTURE)
    more = tiny.model.tokenize(" USER: How many? ASSISTANT:").tolist()
    for _ in range(3):
        agree(rig, prompt, guidance)
        decoded = rig.tiny.verdict(prompt, guidance).tokens[:-1]  # nobody needs the last one's row
        # The answer's rows are kept of the original branch alone: where rows are observed, both
        # branches go on from the end of the prompt.
        n_held = prompt.n_tokens + (len(decoded) if scope == "decode" else 0)
        prompt = longer(prompt, *decoded, *more)
        n_new = prompt.n_tokens - n_held
        expected = (n_new, 1 if scope == "decode" else n_new)
        assert agree(rig, prompt, guidance) == expected
        assert rig.engine.n_reused == n_held


@every_scope
def test_two_images_by_turns_are_both_kept(tiny: Tiny, scope: Scope) -> None:
    rig, guidance = Rig(tiny, n_slots=2), Guidance(scope=scope)
    prompts = [tiny.prompt(QUESTIONS[0], seed) for seed in (PICTURE, 4)]
    before_image = int(prompts[0].is_image.argmax())
    for i, prompt in enumerate([*prompts, *prompts]):
        agree(rig, prompt, guidance)
        expected = 0 if i == 0 else before_image if i == 1 else prompt.n_tokens - 1
        assert rig.engine.n_reused == expected


def test_of_two_images_the_first_may_be_reused_alone(llama: Tiny) -> None:
    rig = Rig(llama, n_slots=3)
    for second, alike in ((4, 0), (3, 16), (4, 16)):
        prompt = llama.prompt(TWO, 3, second)
        agree(rig, prompt, Guidance(scope="all"))
        assert rig.engine.n_reused >= alike
    assert rig.engine.n_reused == prompt.n_tokens - 1


GUIDANCES = [
    PLAIN,
    *(Guidance(scope=scope, refresh=refresh) for scope in SCOPES for refresh in REFRESHES),
    Guidance(layers=LayerSet((1, 4))),
    Guidance(tokens=TopRatio(0.3)),
    Guidance(layers=AttentionMass(0.5)),
    Guidance(layers=LowestCosine(0.5), refresh="prompt"),
    Guidance(layers=LowestCosine(0.5)),
]


@pytest.mark.parametrize("seed", range(3))
def test_any_guidance_may_follow_any_other(llama: Tiny, seed: int) -> None:
    rig, rng = Rig(llama, n_slots=2), np.random.default_rng(seed)
    for i in rng.permutation(np.repeat(np.arange(len(GUIDANCES)), 2)).tolist():
        prompt = llama.prompt(QUESTIONS[int(rng.integers(3))], PICTURE)
        if GUIDANCES[i].contrasts:
            agree(rig, prompt, GUIDANCES[i])
            # With scope "all" each image row is observed: the text before the image is left.
            assert rig.engine.n_reused > 0 or rig.engine.prefixes.n_prefixes == 0
        else:
            rig.engine.prefill(prompt, PLAIN)
            expected = llama.verdict(prompt, Guidance()).steps[0].original
            assert np.abs(rig.engine.original_logits - expected).max() <= TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_any_way_of_stepping_may_follow_any_other_and_l_d_be_asked_for_or_not(
    tiny: Tiny, seed: int
) -> None:
    """Degraded rows that were never decoded are not kept; those left out below a fork are used by
    rows that fork there too, and by no others."""
    rng = np.random.default_rng(seed)
    prompts = [tiny.prompt(text, PICTURE) for text in QUESTIONS] + [tiny.prompt(TWO, PICTURE, 1)]
    layers = (LayerSet((2, 3)), LayerSet((2, 4)), LayerSet((4,)), LayerSet((0, 2)))
    rig = Rig(tiny, n_slots=2)
    for _ in range(25):
        prompt = prompts[min(3, int(rng.integers(5)))]
        guidance = Guidance(
            layers=layers[int(rng.integers(4))],
            scope=SCOPES[int(rng.integers(len(SCOPES))) if seed % 2 else 2],
            refresh=REFRESHES[int(rng.integers(2)) if seed % 2 else 1],
        )
        asked = frozenset(np.flatnonzero(rng.random(8) < rng.choice([0.0, 0.2, 1.0])).tolist())
        rig.engine.stepping = Strategy(
            waiting=rng.choice(["never", "always", "cheapest", "cheapest"]),
            fork=bool(rng.integers(4)),
        )
        verdict = tiny.verdict(prompt, guidance)
        errors = rig.follow(prompt, guidance, verdict, asked.__contains__)
        assert errors.max() <= TOLERANCE, errors.max(axis=0)
    assert rig.contexts[0].patch.n_left_out > 30


def test_degraded_rows_stay_kept_through_a_turn_that_did_not_need_them(llama: Tiny) -> None:
    prompt, guidance = llama.prompt(QUESTIONS[0], PICTURE), Guidance()
    rig = Rig(llama, n_slots=2, stepping=Strategy(waiting="always", fork=True))
    held = 0
    for asked in (True, False, False, True):
        rig.engine.prefill(prompt, guidance)
        assert rig.engine.n_reused == held
        if asked:
            assert rig.engine.degraded_address
        if asked or not held:
            held = prompt.n_tokens
        prompt = longer(prompt, 300, 301)
    agree(rig, prompt, guidance)
    assert rig.engine.n_reused == held


def test_a_prompt_many_times_longer_than_the_window_is_kept_whole(gemma: Tiny) -> None:
    """Windowed layers could do with 256 cells here, and this takes more of them: see `swa_full`."""
    prompt = gemma.prompt(QUESTIONS[1].replace("near", "near the house and " * 100 + "near"), 0)
    rig, guidance = Rig(gemma, replace(EXACT, n_ctx=1024), n_slots=3), Guidance(scope="all")
    assert prompt.n_tokens > 256
    agree(rig, prompt, guidance)
    assert agree(rig, prompt, guidance) == (1, 1)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("seed", [6, 9])
def test_behind_a_window_cells_of_the_degraded_branch_are_not_given_away(
    gemma: Tiny, seed: int, lazy: bool
) -> None:
    """Prompts longer than the window, in a cache with holes: found by chance, hence the seeds."""
    rng, options = np.random.default_rng(seed), replace(EXACT, n_ctx=256)
    way = Strategy(waiting="always" if lazy else "never", fork=lazy)
    rig = Rig(gemma, options, n_slots=3, max_cells=128, stepping=way)
    for _ in range(8):
        n = int(rng.integers(1, 4))
        text = f"USER: {'<__media__> and ' * n}Is there a dog? ASSISTANT:"
        prompt = gemma.prompt(text, *rng.integers(0, 3, n).tolist())
        alone = Rig(gemma, options).engine
        for engine in (rig.engine, alone):
            engine.prefill(prompt, Guidance(tokens=TopRatio(1.0)))
        kept, fresh = rig.engine.degraded_logits, alone.degraded_logits
        assert kept is not None
        assert fresh is not None
        np.testing.assert_allclose(kept, fresh, rtol=0, atol=TOLERANCE)
        for token in range(int(rng.integers(0, 30))):
            if rig.engine.has_room:
                rig.engine.step(300 + token)


def test_what_the_degraded_branch_never_decoded_is_not_kept(llama: Tiny) -> None:
    prompt, guidance = llama.prompt(QUESTIONS[0], PICTURE), Guidance()
    more = longer(prompt, 300, 301)
    rig = Rig(llama, n_slots=2, stepping=Strategy(waiting="always", fork=True))
    image = int(prompt.is_image.argmax())
    for asked, n_reused in ((False, image + 16), (True, prompt.n_tokens)):
        rig.engine.prefill(prompt, guidance)
        if asked:
            assert rig.engine.degraded_address
        agree(rig, more, guidance)
        assert rig.engine.n_reused == n_reused
        rig.engine.reset()
        rig.engine.prefixes.forget()


@every_refresh
@every_scope
def test_an_unguided_prompt_serves_a_guided_one(tiny: Tiny, scope: Scope, refresh: Refresh) -> None:
    rig, guidance = Rig(tiny, n_slots=2), Guidance(scope=scope, refresh=refresh)
    prompt = tiny.prompt(QUESTIONS[0], PICTURE)
    rig.engine.prefill(prompt, PLAIN)
    for token in range(5):
        rig.engine.step(300 + token)
    agree(rig, prompt, guidance)
    image = int(prompt.is_image.argmax())
    behind = image + 16
    last = prompt.n_tokens - 1
    every_row_observed = {"decode": last, "question": behind, "text": behind, "all": image}
    reusable = every_row_observed[scope if refresh == "step" else "decode"]
    assert rig.engine.n_reused == reusable


@every_refresh
def test_two_contexts_reuse_what_the_original_branch_holds(tiny: Tiny, refresh: Refresh) -> None:
    rig, guidance = Rig(tiny, n_slots=2, pairing="contexts"), Guidance(refresh=refresh)
    for i, text in enumerate(QUESTIONS):
        prompt = tiny.prompt(text, PICTURE)
        original, degraded = agree(rig, prompt, guidance)
        assert degraded == prompt.n_tokens
        assert (original < prompt.n_tokens - 16) == (i > 0)


@pytest.mark.parametrize("change", ["no key", "other key", "fewer positions"])
def test_an_image_that_may_be_another_is_never_reused(llama: Tiny, change: str) -> None:
    def changed(prompt: Prompt) -> Prompt:
        before, image, after = prompt.segments
        changes: dict[str, Any] = {"no key": {"key": None}, "other key": {"key": "other"}}
        return Prompt((before, replace(image, **changes.get(change, {"n_pos": 15})), after))

    rig, prompt = Rig(llama, n_slots=2), llama.prompt(QUESTIONS[0], PICTURE)
    for one in (prompt, changed(prompt), changed(prompt)):
        rig.engine.prefill(prompt, PLAIN)
        start = rig.engine.first_decoded_row(one, PLAIN)
    if change == "no key":
        rig.engine.prefill(changed(prompt), PLAIN)
        start = rig.engine.first_decoded_row(changed(prompt), PLAIN)
    assert start == int(prompt.is_image.argmax())


# --- room --------------------------------------------------------------------------------------


def random_prompt(tiny: Tiny, rng: np.random.Generator) -> Prompt:
    """Few words, images and orders of them, so that beginnings are often alike."""
    parts = ["USER: ", "What is there? "][: int(rng.integers(1, 3))]
    seeds = rng.integers(0, 3, int(rng.integers(0, 4))).tolist()
    for _ in seeds:
        parts += ["<__media__>", " and "][: int(rng.integers(1, 3))]
    parts += ["How many? " * int(rng.integers(0, 4)), "ASSISTANT:"]
    return tiny.prompt("".join(parts), *seeds)


def random_guidance(rng: np.random.Generator) -> Guidance:
    """All image tokens or none: a choice between them could hang by a hair."""
    guidances = [PLAIN] + [
        Guidance(scope=scope, refresh=refresh, tokens=TopRatio(1.0), layers=layers)
        for scope in SCOPES
        for refresh in REFRESHES
        for layers in (LayerSet((2, 3)), LayerSet((0, 5)))
    ]
    return guidances[int(rng.integers(len(guidances)))]


@pytest.mark.parametrize("pairing", ["pair", "contexts"])
def test_hundreds_of_requests_in_little_room_are_answered_as_by_a_fresh_engine(
    tiny: Tiny, pairing: Pairing
) -> None:
    rig = Rig(tiny, n_slots=4, pairing=pairing)
    fresh = Rig(tiny, pairing=pairing)
    rng, n_reused, n_let_go = np.random.default_rng(1), 0, 0
    for _ in range(150):
        prompt, guidance = random_prompt(tiny, rng), random_guidance(rng)
        engines = rig.engine, fresh.engine
        kept = rig.engine.prefixes.n_prefixes
        for engine in engines:
            engine.prefill(prompt, guidance)
        n_let_go += rig.engine.prefixes.n_prefixes < kept
        n_reused += rig.engine.n_reused
        for _ in range(int(rng.choice([0, 1, 3, 40], p=[0.3, 0.3, 0.3, 0.1]))):
            same(*engines)
            if not rig.engine.has_room:
                break
            token = int(fresh.engine.original_logits.argmax())
            for engine in engines:
                engine.step(token)
        same(*engines)
        if rng.random() < 0.1:
            rig.engine.reset()
    assert n_reused > 1000
    assert n_let_go > 5


def same(one: Any, other: Any) -> None:
    assert np.abs(one.original_logits - other.original_logits).max() <= ROUNDING
    assert (one.degraded_logits is None) == (other.degraded_logits is None)
    if one.degraded_logits is not None:
        assert np.abs(one.degraded_logits - other.degraded_logits).max() <= ROUNDING


def test_an_answer_takes_the_cells_of_kept_prompts_when_it_needs_them(llama: Tiny) -> None:
    rig = Rig(llama, n_slots=4)
    for seed in range(4):
        rig.engine.prefill(llama.prompt(QUESTIONS[0], seed), Guidance())
    rig.engine.release()
    assert rig.engine.prefixes.n_prefixes == 4
    fresh, n_steps = Rig(llama), 0
    prompt = llama.prompt(QUESTIONS[1], 3)
    for one in (rig, fresh):
        one.engine.prefill(prompt, Guidance())
    assert rig.engine.n_reused > 16
    while rig.engine.has_room:
        assert fresh.engine.has_room
        for one in (rig, fresh):
            one.engine.step(300 + n_steps % 20)
        n_steps += 1
    assert not fresh.engine.has_room
    assert n_steps > 90
    assert rig.engine.prefixes.n_prefixes == 0
    same(rig.engine, fresh.engine)


# --- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["decode", "decode_image", "share", "is_whole"])
@pytest.mark.parametrize("n_before", range(4))
def test_a_request_that_fails_is_not_kept_and_harms_no_other(
    llama: Tiny, where: str, n_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, guidance = Rig(llama, n_slots=2), Guidance()
    prompts = [llama.prompt(text, seed) for text in QUESTIONS for seed in (2, 4)]
    for prompt in prompts[:2]:
        agree(rig, prompt, guidance)
    context, left = rig.contexts[0], n_before
    works = getattr(context, where)

    def fail(*arguments: Any, **settings: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise BackendError("told to fail")
        return works(*arguments, **settings)

    def go_on() -> None:
        for prompt in itertools.cycle([*prompts[2:], llama.prompt(TWO, 3, 4)]):
            rig.engine.prefill(prompt, guidance)
            rig.engine.step(300)

    with monkeypatch.context() as patched:
        patched.setattr(context, where, fail)
        with pytest.raises(BackendError, match="told to"):
            go_on()
        kept = rig.engine.prefixes.n_cells
        rig.engine.release()
        assert rig.engine.prefixes.n_cells == kept
    for prompt in prompts:
        agree(rig, prompt, guidance)


def test_options_that_change_the_kernels_change_nothing_about_it(llama: Tiny) -> None:
    half = replace(EXACT, flash_attn=True, type_k="f16", type_v="f16", n_ubatch=16)
    rig, fresh = Rig(llama, half, n_slots=2), Rig(llama, half)
    for text in QUESTIONS:
        prompt = llama.prompt(text, PICTURE)
        for one in (rig, fresh):
            one.engine.prefill(prompt, Guidance(tokens=TopRatio(1.0)))
        pairs = [
            (rig.engine.original_logits, fresh.engine.original_logits),
            (rig.engine.degraded_logits, fresh.engine.degraded_logits),
        ]
        assert max(np.abs(a - b).max() for a, b in pairs) <= 0.05  # type: ignore[operator]
    assert rig.engine.n_reused > 16
