"""What a token costs: every way of stepping through the same answers, in turns.

A round replays one recorded answer in every way, a few tokens of one and then of the next. Every
way has a context of its own on the same weights, and asks for the degraded row where the record
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Protocol

import llama_cpp

from benchmarks.ratios import Times, milliseconds, rotated
from benchmarks.schedule import Asked, Schedule
from benchmarks.subjects import Subject
from cmg_gguf import Guidance, GuidedVLM, LayerRange
from cmg_gguf.engine.steps import APPROXIMATE, AUTO, EAGER, EXACT, Strategy
from cmg_gguf.guidance import PLAIN
from cmg_gguf.llama.prompts import tokenized
from cmg_gguf.prompt.segments import Prompt

HALF = Guidance(layers=LayerRange(0.5, 1.0))
TWO_THIRDS = Guidance(layers=LayerRange(2 / 3, 1.0))

LAZY = Strategy(waiting="always", fork=True)

WAYS: dict[str, tuple[Guidance, Strategy]] = {
    "plain": (PLAIN, EAGER),
    "eager": (HALF, EAGER),
    "fork at half": (HALF, EXACT),
    "fork at two thirds": (TWO_THIRDS, EXACT),
    "lazy": (HALF, LAZY),
    "lazy, prompt's tokens": (replace(HALF, refresh="prompt"), LAZY),
    "auto": (HALF, AUTO),
    "approximate": (HALF, APPROXIMATE),
}
UNHOOKED = "llama_cpp.Llama"
N_BY_TURNS = 8
"""Tokens of one way before it is another's turn."""


class Way(Protocol):
    """One way to decode an answer."""

    def answer(self, asked: Asked) -> Iterator[object]:
        """An answer behind the prompt, which is decoded with the first token."""
        ...


def open_ways(llama: llama_cpp.Llama, subject: Subject, use_gpu: bool) -> dict[str, Way]:
    """Every way to decode, each with a context of its own on the weights of `llama`."""

    def guided(guidance: Guidance, strategy: Strategy) -> Guided:
        vlm = GuidedVLM.from_llama(llama, subject.pair.mmproj, use_gpu=use_gpu)
        vlm.engine.strategy = strategy
        return Guided(vlm, subject, guidance)

    ways = {name: guided(*how) for name, how in WAYS.items()}
    n_prompt = ways["plain"].prompt.n_tokens
    return {UNHOOKED: Unhooked(llama, n_prompt), **ways}


def measure_decoding(
    ways: Mapping[str, Way], schedule: Schedule, n_rounds: int, report: Callable[[], None]
) -> Times:
    """Milliseconds a token of each round. The first round warms up and does not count."""
    times: Times = {name: [] for name in ways}
    for i in range(n_rounds + 1):
        asked = schedule.captions[i % len(schedule.captions)]
        spent = _replay(ways, asked, turn=i)
        for name, ms in spent.items() if i else ():
            times[name].append(ms / (len(asked) - 1))
        report()
    return times


def _replay(ways: Mapping[str, Way], asked: Asked, turn: int) -> dict[str, float]:
    """Milliseconds that each way took for the answer, its first token not counted."""
    answers = {name: way.answer(asked) for name, way in ways.items()}
    for tokens in answers.values():
        next(tokens)
    spent = dict.fromkeys(ways, 0.0)
    for done in range(1, len(asked), N_BY_TURNS):
        n = min(N_BY_TURNS, len(asked) - done)
        for name, tokens in rotated(answers, turn + done // N_BY_TURNS):
            spent[name] += milliseconds(partial(_take, tokens, n))
    return spent


def _take(tokens: Iterator[object], n: int) -> None:
    for _ in islice(tokens, n):
        pass


class Guided:
    """The engine of a `GuidedVLM`, plain or guided."""

    def __init__(self, vlm: GuidedVLM, subject: Subject, guidance: Guidance) -> None:
        self._vlm, self._guidance = vlm, guidance
        self.prompt = encoded_prompt(vlm, subject)

    def answer(self, asked: Asked) -> Iterator[object]:
        """See `Way`. Prompts are kept, so every answer but the first starts at once."""
        engine, token = self._vlm.engine, self._vlm.model.n_vocab // 2
        session = engine.open(self.prompt, self._guidance)
        try:
            engine.prefill(session)
            engine.degraded(session)  # the prompt's rows, which may wait, are no token's
            yield None
            for needs_l_d in asked[1:]:
                engine.step(session, token)
                if needs_l_d:
                    engine.degraded(session)
                yield None
        finally:
            engine.end(session)


class Unhooked:
    """llama-cpp-python alone, behind as long a text: what plain decoding is held against."""

    def __init__(self, llama: llama_cpp.Llama, n_prompt: int) -> None:
        self._llama, self._n_prompt = llama, n_prompt
        self._token = llama.n_vocab() // 2

    def answer(self, asked: Asked) -> Iterator[object]:
        """See `Way`."""
        if self._llama.n_tokens < self._n_prompt:
            self._llama.reset()
            self._llama.eval([self._token] * self._n_prompt)
        self._llama.n_tokens = self._n_prompt
        yield None
        for _ in asked[1:]:
            self._llama.eval([self._token])
            llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
            yield None


def encoded_prompt(vlm: GuidedVLM, subject: Subject) -> Prompt:
    """The subject's first question, its picture encoded."""
    prompt = tokenized(subject.messages(), template=vlm.template, projector=vlm.projector)
    return vlm.projector.encode(prompt)
