"""llama.cpp's sampler chain, with guidance in front, and its twin without."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp

from cmg_gguf import _core
from cmg_gguf.arrays import FloatArray
from cmg_gguf.errors import BackendError, SamplingError
from cmg_gguf.llama.grammar import grammar_for
from cmg_gguf.llama.log import captured_errors, captured_stderr
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.owned import Owned, making
from cmg_gguf.sampling import Sampling

_MIROSTAT_M = 100  # as llama.cpp's own tools
_REASON = 200  # characters: some reasons hold the rest of the grammar
_ALL_TOKENS = 2**20  # more than an answer has; llama.cpp allocates room for each


_init_chain = making(llama_cpp.llama_sampler_chain_init, llama_cpp.llama_sampler_free)


class Sampler:
    """Draws the guided token, and the one that plain decoding would have drawn.

    Both chains have the same settings and seed and accept the same tokens, so they differ in
    guidance alone: `plain` is what the same draw gives without it.
    """

    def __init__(
        self, model: Model, sampling: Sampling, *, alpha: float, beta: float, seed: int
    ) -> None:
        """Raises SamplingError for a grammar that does not parse or a token that is none."""
        self._state = _core.GuidanceState(alpha, beta)
        self._beta = beta
        self._chains: list[Owned] = []
        constraints = list(_constraints(model, sampling))
        self._sampler = _core.PairSampler(
            model.n_vocab,
            self._chain(constraints) if constraints else 0,
            self._chain([self._guidance(), *_tail(model, sampling, seed)]),
            0 if sampling.takes_best else self._chain(_tail(model, sampling, seed)),
        )

    @property
    def alpha(self) -> float:
        """Strength of guidance in the draws to come; may be changed between them."""
        return self._state.alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._state.alpha = alpha

    def prepare(self, logits: FloatArray) -> bool:
        """Takes what is sampled from: (n_vocab,) float32, l_o or l_o changed by logits processors,
        which stays as it is until `draw`. Whether l_d matters: if one token alone is plausible,
        that is the token whatever l_d says. Raises BackendError if no token is possible, or if a
        score of a plausible token is not a number."""
        self._logits = logits
        with _told():
            return self._sampler.prepare(logits.ctypes.data, self._beta) > 1

    def draw(self, original: FloatArray, degraded: FloatArray | None) -> tuple[int, int]:
        """(guided token, plain token) from what was prepared. original: l_o, (n_vocab,) float32.
        degraded: l_d; None = none, or of no matter. Raises BackendError for numbers that are none.
        """
        self._state.set_rows(original.ctypes.data, 0 if degraded is None else degraded.ctypes.data)
        with _told():
            drawn = self._sampler.draw()
        if not self._state.finite:
            raise BackendError("the degraded branch gave logits that are not numbers")
        return drawn

    def accept(self, token: int) -> None:
        """Tells penalties and grammar which token was taken."""
        try:
            self._sampler.accept(token)
        except RuntimeError as exc:
            raise BackendError(f"the grammar does not take token {token}: {exc}") from exc

    def _guidance(self) -> Any:
        return ctypes.cast(self._state.new_sampler(), llama_cpp.llama_sampler_p_ctypes)

    def _chain(self, samplers: Iterable[Any]) -> int:
        chain = _init_chain(llama_cpp.llama_sampler_chain_default_params())
        chain.hold(self, self._state)  # which the guidance sampler reads
        self._chains.append(chain)
        pointer = ctypes.cast(chain.pointer, llama_cpp.llama_sampler_p_ctypes)
        for sampler in samplers:
            llama_cpp.llama_sampler_chain_add(pointer, sampler)
        return chain.pointer


@contextmanager
def _told() -> Iterator[None]:
    """Tells what goes wrong in the extension as this package does."""
    try:
        yield
    except RuntimeError as exc:
        raise BackendError(str(exc)) from exc


def _constraints(model: Model, sampling: Sampling) -> Iterable[Any]:
    if sampling.logit_bias:
        bias = (llama_cpp.llama_logit_bias * len(sampling.logit_bias))()
        for entry, (token, value) in zip(bias, sampling.logit_bias.items(), strict=True):
            if not 0 <= int(token) < model.n_vocab:
                raise SamplingError(
                    f"logit_bias names token {token}: this vocabulary has {model.n_vocab} "
                    f"(0-{model.n_vocab - 1})"
                )
            entry.token, entry.bias = int(token), float(value)
        yield llama_cpp.llama_sampler_init_logit_bias(model.n_vocab, len(bias), bias)
    text = sampling.grammar or grammar_for(sampling.response_format)
    if text is not None:
        yield _grammar(model, text.encode("utf-8", "replace"))


def _grammar(model: Model, text: bytes) -> Any:
    """Raises SamplingError with the parser's reason, which it prints."""
    reasons: list[str] = []

    def told(printed: str) -> str:
        said = re.escape(text.decode("utf-8"))
        found = re.search(rf"parse: error parsing grammar: (.*?)\n\n{said}\n", printed, re.DOTALL)
        if found is None:
            return printed
        reasons.append(" ".join(found[1].split())[:_REASON])
        return printed.replace(found[0], "")

    with captured_errors() as errors, captured_stderr(told):
        grammar = llama_cpp.llama_sampler_init_grammar(model.vocab, text, b"root")
    if not grammar:
        reason = " ".join(reasons or errors) or "no root rule"
        raise SamplingError(f"the grammar does not parse: {reason}; correct it")
    return grammar


def _tail(model: Model, sampling: Sampling, seed: int) -> Iterable[Any]:
    """Everything behind guidance. Samplers at their neutral value are left out."""
    s = sampling
    if s.penalizes:
        last_n = _ALL_TOKENS if s.penalty_last_n < 0 else min(s.penalty_last_n, _ALL_TOKENS)
        yield llama_cpp.llama_sampler_init_penalties(
            *_of_vocabulary(model.n_vocab),
            last_n,
            s.repeat_penalty,
            s.frequency_penalty,
            s.presence_penalty,
        )
    if s.temperature == 0:
        yield llama_cpp.llama_sampler_init_greedy()
        return
    if s.mirostat_mode:
        yield llama_cpp.llama_sampler_init_temp(s.temperature)
        yield (
            llama_cpp.llama_sampler_init_mirostat(
                model.n_vocab, seed, s.mirostat_tau, s.mirostat_eta, _MIROSTAT_M
            )
            if s.mirostat_mode == 1
            else llama_cpp.llama_sampler_init_mirostat_v2(seed, s.mirostat_tau, s.mirostat_eta)
        )
        return
    if s.top_k > 0:
        yield llama_cpp.llama_sampler_init_top_k(s.top_k)
    if s.typical_p < 1:
        yield llama_cpp.llama_sampler_init_typical(s.typical_p, 1)
    if s.top_p < 1:
        yield llama_cpp.llama_sampler_init_top_p(s.top_p, 1)
    if s.min_p > 0:
        yield llama_cpp.llama_sampler_init_min_p(s.min_p, 1)
    yield llama_cpp.llama_sampler_init_temp(s.temperature)
    yield llama_cpp.llama_sampler_init_dist(seed)


def _of_vocabulary(n_vocab: int) -> tuple[int, ...]:
    """What penalties are told first: their number of tokens, since llama-cpp-python 0.3.35."""
    return (n_vocab,) if hasattr(llama_cpp, "LLAMA_LOAD_MODE_MMAP") else ()
