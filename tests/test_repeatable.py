"""Answers that repeat to the bit on request, whatever was asked before and is asked beside them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from cmg_gguf import (
    BackendError,
    Contrast,
    Guidance,
    GuidedVLM,
    PromptError,
    Reply,
    Request,
    Sampling,
)
from cmg_gguf.chat.completion import request_of
from cmg_gguf.engine.steps import Pace
from cmg_gguf.tiny.pair import embedded_pair
from cmg_gguf.tiny.scenes import Pixels, draw, make_scene

QUESTION = "Describe the image."
N = 12
OPTIONS: dict[str, Any] = {"n_ctx": 2048, "n_threads": 2, "n_parallel": 4}
"""Q8_0 weights, an f16 cache and kept prompts: nothing that makes rounding rare."""


def scene(number: int) -> Pixels:
    return draw(make_scene("test", number, "counter"))


def asking(number: int, **settings: Any) -> Request:
    sampling = Sampling(temperature=1.0, seed=number)
    wanted = {"guidance": Guidance(alpha=0.5), "max_tokens": N, "n_scores": N, **settings}
    return Request(QUESTION, [scene(number)], sampling=sampling, **wanted)


def is_same(one: Reply, other: Reply) -> bool:
    """To the bit, in all that was drawn from."""
    return one.tokens == other.tokens and all(
        np.array_equal(a, b) for a, b in zip(one.scores, other.scores, strict=True)
    )


@pytest.fixture(scope="module", params=["auto", "exact", "contexts"])
def vlm(request: pytest.FixtureRequest) -> Iterator[GuidedVLM]:
    contexts = request.param == "contexts"
    way = {"pairing": "contexts"} if contexts else {"strategy": request.param}
    options: dict[str, Any] = {**OPTIONS, **way}
    with GuidedVLM(*embedded_pair(), **options) as opened:
        yield opened


REQUESTS: dict[str, dict[str, Any]] = {
    "guided": {},
    "plain": {"guidance": Guidance(alpha=0, beta=0)},
    "contrast": {"contrast": Contrast(QUESTION)},
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_repeatable_answer_is_the_same_to_the_bit(vlm: GuidedVLM, kind: str) -> None:
    asked = asking(3, repeatable=True, **REQUESTS[kind])
    vlm.forget()
    first = vlm.generate(asked)
    assert first.n_reused_tokens == 0
    # Behind others that begin alike, and behind some that leave cells at other places.
    for before in (asking(3), asking(4), asking(5, guidance=Guidance(beta=0.0))):
        vlm.generate(before)
        again = vlm.generate(asked)
        assert again.n_reused_tokens == 0
        assert is_same(first, again)
    # Among others at once.
    company = [asking(3 + i % 3, max_tokens=4 + i) for i in range(6)]
    requests = [*company[:3], asked, *company[3:], asked]
    replies = {outcome.index: outcome.reply for outcome in vlm.generate_many(requests)}
    for i in (3, 7):
        reply = replies[i]
        assert reply is not None
        assert is_same(first, reply)
    assert all(reply is not None for reply in replies.values())


def test_what_is_not_repeatable_does_differ_so_that_this_can_fail(vlm: GuidedVLM) -> None:
    asked = asking(3)
    vlm.forget()
    replies = [vlm.generate(asked)]
    replies += [o.reply for o in vlm.generate_many([asking(4), asked, asking(5)]) if o.reply]
    replies += [vlm.generate(asked)]
    same = [reply for reply in replies if reply.seed == 3]
    assert len(same) == 3
    assert not all(is_same(*two) for two in itertools.combinations(same, 2))


def test_a_new_model_gives_the_same_bits() -> None:
    asked = asking(6, repeatable=True)
    replies = []
    for before in ([], [asking(7)]):
        with GuidedVLM(*embedded_pair(), **OPTIONS) as vlm:
            for request in before:
                vlm.generate(request)
            replies.append(vlm.generate(asked))
    assert is_same(*replies)


def test_it_waits_for_those_before_it_and_those_behind_wait_for_it(vlm: GuidedVLM) -> None:
    n_open: list[tuple[str, int]] = []

    def note(name: str, said: Any, logits: Any) -> Any:
        n_open.append((name, len(vlm.engine.sessions)))
        return logits

    def noting(name: str, **settings: Any) -> Request:
        return asking(3, logits_processors=[partial(note, name)], n_scores=0, **settings)

    requests = [noting("before"), noting("alone", repeatable=True), noting("behind")]
    outcomes = list(vlm.generate_many(requests))
    assert [outcome.index for outcome in outcomes] == [0, 1, 2]
    assert {n for name, n in n_open} == {1}
    assert [name for name, _ in itertools.groupby(name for name, _ in n_open)] == [
        *("before", "alone", "behind")
    ]


def test_an_answer_within_a_repeatable_one_is_an_error_and_no_hang(vlm: GuidedVLM) -> None:
    def ask_within(said: Any, logits: Any) -> Any:
        with pytest.raises(BackendError, match="waits for another"):
            vlm.generate("Why?", max_tokens=1)
        return logits

    done = threading.Event()
    asked = asking(3, repeatable=True, max_tokens=1, logits_processors=[ask_within])

    def ask() -> None:
        vlm.generate(asked)
        done.set()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert done.is_set()


def test_the_engine_refuses_company_beside_what_is_made_alone(vlm: GuidedVLM) -> None:
    prompt = vlm.projector.encode(vlm.tokenize(QUESTION, [scene(3)]))
    other = vlm.engine.open(prompt, Guidance())
    with pytest.raises(BackendError, match="has company"):
        vlm.engine.open(prompt, Guidance(), alone=True)
    vlm.engine.drop(other)
    alone = vlm.engine.open(prompt, Guidance(), alone=True)
    with pytest.raises(BackendError, match="has company"):
        vlm.engine.open(prompt, Guidance())
    vlm.engine.drop(alone)
    vlm.engine.drop(vlm.engine.open(prompt, Guidance()))


def test_what_is_made_alone_is_not_decoded_by_the_clock() -> None:
    with GuidedVLM(*embedded_pair(), **OPTIONS, strategy="auto") as vlm:
        prompt = vlm.projector.encode(vlm.tokenize(QUESTION, [scene(3)]))
        waited = {}
        for alone in (True, False):
            session = vlm.engine.open(prompt, Guidance(), alone=alone)
            vlm.engine.prefill(session)
            waited[alone] = 0
            for _ in range(Pace.N_TRIED * 2 + 2):
                vlm.engine.degraded(session)
                vlm.engine.step(session, int(session.l_o.argmax()))
                waited[alone] += session.l_d is None
            vlm.engine.end(session)
        assert waited[True] == 0
        assert waited[False] >= Pace.N_TRIED


def test_chat_completions_have_it_under_llama_servers_name() -> None:
    messages = [{"role": "user", "content": "Why?"}]
    wanted = {None: False, True: False, False: True}
    for given, repeatable in wanted.items():
        assert request_of(messages, cache_prompt=given).repeatable is repeatable
    with pytest.raises(PromptError, match="cache_prompt=0 is neither True nor False"):
        request_of(messages, cache_prompt=0)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="repeatable=1 is neither True nor False"):
        replace(asking(3), repeatable=1)  # type: ignore[arg-type]
