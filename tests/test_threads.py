"""Several threads at the extension: what is one thread's own is as if it were alone.

A decode gives other threads leave to run Python meanwhile. What belongs to the sessions that are
decoded is not theirs to touch then; all else is. `scripts/sanitize thread` looks for races here.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import numpy as np
import pytest
from many import Answer, check, open_context
from plans import N_LAYER, survey
from prompts import ONE_IMAGE, TWO_IMAGES
from support import Counted, Tiny

from cmg_gguf import Sampling, _core
from cmg_gguf.guidance import Guidance, MeanStd, TopRatio
from cmg_gguf.llama.sampler import Sampler

LAYER = 2
ASKED: list[tuple[str, tuple[int, ...], Guidance]] = [
    (ONE_IMAGE, (4,), Guidance(tokens=TopRatio(0.3), layers=[2, 4], scope="question")),
    (TWO_IMAGES, (3, 4), Guidance(tokens=MeanStd(0.5), layers=[2, 3, 5], scope="question")),
]


def opened(tiny: Tiny, asked: tuple[str, tuple[int, ...], Guidance]) -> tuple[Counted, Answer]:
    context = open_context(tiny)
    survey(context)
    text, pictures, guidance = asked
    return context, Answer(context, tiny, tiny.prompt(text, *pictures), guidance, 0)


def decode_all(context: Counted, answer: Answer) -> None:
    """Row by row, each degraded one in a fork."""
    fork = _core.ForkPlan(layer=LAYER, n_below=1)
    while answer.n_left:
        rows = answer.original(0, notes=True) + answer.degraded(0, enters=True)
        check(context, rows, [answer.part()], fork)
    answer.check_selections()


def test_two_contexts_decode_at_once_and_each_is_the_judges(tiny: Tiny) -> None:
    """With a patch each, over one model."""
    pairs = [opened(tiny, asked) for asked in ASKED]
    begin = Barrier(len(pairs))

    def run(pair: tuple[Counted, Answer]) -> None:
        begin.wait()
        decode_all(*pair)

    with ThreadPoolExecutor(len(pairs)) as pool:
        for done in [pool.submit(run, pair) for pair in pairs]:
            done.result()


def while_decoding(tiny: Tiny, work: Callable[[], object]) -> None:
    """Decodes an answer, and lets another thread do the work meanwhile, again and again."""
    context, answer = opened(tiny, ASKED[0])
    stop, n_done = Event(), 0

    def again() -> None:
        nonlocal n_done
        while not stop.is_set() or n_done == 0:
            work()
            n_done += 1

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(again)
        try:
            decode_all(context, answer)
        finally:
            stop.set()
        done.result()


def test_selections_are_used_while_others_rows_are_decoded(llama: Tiny) -> None:
    selections = _core.Selections(N_LAYER)
    selections.resize(4)

    def work() -> None:
        for il in range(N_LAYER):
            selections.set_tokens(3, il, np.array([il, 9], np.int32))
            assert selections.tokens(3, il).tolist() == [il, 9]
        selections.keep_last()
        assert selections.tokens(0, 1).tolist() == [1, 9]
        selections.resize(4)

    while_decoding(llama, work)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_drawn_while_others_rows_are_decoded(llama: Tiny, temperature: float) -> None:
    sampling = Sampling(temperature=temperature)
    sampler = Sampler(llama.model, sampling, alpha=1.0, beta=0.1, seed=0)
    random = np.random.default_rng(0)
    l_o, l_d = random.normal(size=(2, llama.model.n_vocab)).astype(np.float32)

    def work() -> None:
        sampler.prepare(l_o)
        token, plain = sampler.draw(l_o, l_d)
        if temperature == 0:
            score = np.where(l_o < l_o.max() + np.log(0.1), -np.inf, 2 * l_o - l_d)
            assert (token, plain) == (int(score.argmax()), int(l_o.argmax()))
        sampler.accept(token)

    while_decoding(llama, work)
