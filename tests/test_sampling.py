"""Drawing tokens: guidance is the formula, and everything behind it is llama.cpp's own."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import llama_cpp
import numpy as np
import pytest
from drawn import drawn as draw_by_halves
from support import Rig, Tiny
from tiny_vocabulary import EOS_TOKEN

from cmg_gguf.answer.logits import combine, log_softmax
from cmg_gguf.arrays import FloatArray
from cmg_gguf.errors import BackendError, SamplingError
from cmg_gguf.guidance import Guidance
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.sampler import Sampler
from cmg_gguf.sampling import Sampling

Rows = list[tuple[FloatArray, FloatArray]]
OFF: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Every sampler at its neutral value; with a temperature, only the draw is left."""


@pytest.fixture(scope="module")
def model(llama: Tiny) -> Model:
    return llama.model


@pytest.fixture(scope="module")
def rows(llama: Tiny) -> Rows:
    """Original and degraded logits of an answer, step by step."""
    engine = Rig(llama).engine
    engine.prefill(llama.prompt("USER: <__media__> What is there? ASSISTANT:", 0), Guidance())
    taken: Rows = []
    for _ in range(30):
        assert engine.degraded_logits is not None
        taken.append((engine.original_logits.copy(), engine.degraded_logits.copy()))
        engine.step(int(engine.original_logits.argmax()))
    return taken


def sampler(
    model: Model, sampling: Sampling, *, alpha: float = 1.0, beta: float = 0.1, seed: int = 1
) -> Sampler:
    return Sampler(model, sampling, alpha=alpha, beta=beta, seed=seed)


def draw(drawer: Sampler, original: FloatArray, degraded: FloatArray | None) -> tuple[int, int]:
    return draw_by_halves(drawer, original, original, lambda: degraded)


def drawn(drawer: Sampler, rows: Rows) -> list[tuple[int, int]]:
    """(guided, plain) of each row, the guided one accepted each time."""
    pairs = []
    for original, degraded in rows:
        pairs.append(draw(drawer, original, degraded))
        drawer.accept(pairs[-1][0])
    return pairs


def chain_drawn(samplers: Iterable[Any], logits: Sequence[FloatArray]) -> list[int]:
    """What llama.cpp's chain of these samplers draws from the rows by itself."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for one in samplers:
        llama_cpp.llama_sampler_chain_add(chain, one)
    tokens = []
    for row in logits:
        data = (llama_cpp.llama_token_data * len(row))()
        for i, value in enumerate(row.tolist()):
            data[i].id, data[i].logit = i, value
        candidates = llama_cpp.llama_token_data_array(data, len(row), -1, False)
        llama_cpp.llama_sampler_apply(chain, ctypes.byref(candidates))
        tokens.append(int(candidates.data[candidates.selected].id))
        llama_cpp.llama_sampler_accept(chain, tokens[-1])
    llama_cpp.llama_sampler_free(chain)
    return tokens


# --- guidance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.1, 0.5, 1.0])
def test_the_greedy_token_is_the_best_of_the_combined_logits(
    model: Model, rows: Rows, alpha: float, beta: float
) -> None:
    pairs = drawn(sampler(model, Sampling(), alpha=alpha, beta=beta), rows)
    for (token, plain), (original, degraded) in zip(pairs, rows, strict=True):
        score = combine(original, degraded, alpha=alpha, beta=beta)
        assert score[token] >= score.max() - 1e-5 * (1 + alpha)
        assert plain == original.argmax()


def test_guidance_changes_some_greedy_tokens_and_not_all(model: Model, rows: Rows) -> None:
    pairs = drawn(sampler(model, Sampling()), rows)
    assert 0 < sum(token != plain for token, plain in pairs) < len(pairs)


@pytest.mark.parametrize("degraded_too", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_zero_alpha_draws_what_plain_decoding_cut_at_beta_draws(
    model: Model, rows: Rows, beta: float, degraded_too: bool
) -> None:
    settings = Sampling(temperature=2.0, **OFF)
    alpha = 0.0 if degraded_too else 5.0
    given: Any = rows if degraded_too else [(original, None) for original, _ in rows]
    pairs = drawn(sampler(model, settings, alpha=alpha, beta=beta, seed=3), given)
    cut = [combine(original, None, alpha=0.0, beta=beta) for original, _ in rows]
    expected = chain_drawn(
        [llama_cpp.llama_sampler_init_temp(2.0), llama_cpp.llama_sampler_init_dist(3)], cut
    )
    assert [token for token, _ in pairs] == expected
    if beta == 0:
        assert [plain for _, plain in pairs] == expected


def test_zero_beta_lets_the_least_plausible_token_win(model: Model, rows: Rows) -> None:
    original, degraded = rows[0][0].copy(), rows[0][0].copy()
    worst = int(original.argmin())
    degraded[worst] -= 100
    assert draw(sampler(model, Sampling(), beta=0.0), original, degraded)[0] == worst
    assert draw(sampler(model, Sampling(), beta=1e-3), original, degraded)[0] != worst


def test_an_implausible_token_is_never_drawn_at_any_temperature(model: Model, rows: Rows) -> None:
    drawer = sampler(model, Sampling(temperature=100.0, **OFF), beta=0.1)
    for original, degraded in rows * 20:
        token, _ = draw(drawer, original, degraded)
        assert original[token] >= original.max() + math.log(0.1) - 1e-5


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_draws_follow_the_combined_distribution(model: Model, rows: Rows, alpha: float) -> None:
    original, degraded = rows[0]
    drawer, n = sampler(model, Sampling(temperature=1.0, **OFF), alpha=alpha, seed=11), 20_000
    pairs = np.array([draw(drawer, original, degraded) for _ in range(n)])
    expected_pair = combine(original, degraded, alpha=alpha, beta=0.1), original
    for tokens, logits in zip(pairs.T, expected_pair, strict=True):
        expected = np.exp(log_softmax(logits).astype(np.float64))
        observed = np.bincount(tokens, minlength=len(expected)) / n
        assert (np.abs(observed - expected) <= 6 * np.sqrt(expected / n) + 2 / n).all()


def test_temperature_divides_the_combined_logits(model: Model, rows: Rows) -> None:
    original, degraded = rows[0]
    drawer, n = sampler(model, Sampling(temperature=0.5, **OFF), beta=0.0, seed=5), 5_000
    tokens = [draw(drawer, original, degraded)[0] for _ in range(n)]
    score = combine(original, degraded, alpha=1.0, beta=0.0)
    expected = np.exp(log_softmax(score / np.float32(0.5)).astype(np.float64))
    observed = np.bincount(tokens, minlength=len(expected)) / n
    assert (np.abs(observed - expected) <= 6 * np.sqrt(expected / n) + 2 / n).all()


# --- the rest of the chain ---------------------------------------------------------------------


def _penalties(model: Model, last_n: int, *penalties: float) -> Any:
    first = (model.n_vocab,) if hasattr(llama_cpp, "LLAMA_LOAD_MODE_MMAP") else ()  # since 0.3.35
    return llama_cpp.llama_sampler_init_penalties(*first, last_n, *penalties)


def _then_draw(*samplers: Any, temperature: float = 1.5) -> list[Any]:
    temp = llama_cpp.llama_sampler_init_temp(temperature)
    return [*samplers, temp, llama_cpp.llama_sampler_init_dist(7)]


CHAINS: dict[str, tuple[dict[str, Any], Callable[[Model], list[Any]]]] = {
    "top_k": ({"top_k": 3}, lambda m: _then_draw(llama_cpp.llama_sampler_init_top_k(3))),
    "top_p": ({"top_p": 0.4}, lambda m: _then_draw(llama_cpp.llama_sampler_init_top_p(0.4, 1))),
    "min_p": ({"min_p": 0.4}, lambda m: _then_draw(llama_cpp.llama_sampler_init_min_p(0.4, 1))),
    "typical_p": (
        {"typical_p": 0.3},
        lambda m: _then_draw(llama_cpp.llama_sampler_init_typical(0.3, 1)),
    ),
    "narrowest": (
        {"typical_p": 0.0},
        lambda m: _then_draw(llama_cpp.llama_sampler_init_typical(0.0, 1)),
    ),
    "repeat_penalty": (
        {"repeat_penalty": 3.0},
        lambda m: _then_draw(_penalties(m, 64, 3.0, 0.0, 0.0)),
    ),
    "frequency_penalty": (
        {"frequency_penalty": 5.0},
        lambda m: _then_draw(_penalties(m, 64, 1.0, 5.0, 0.0)),
    ),
    "presence_penalty": (
        {"presence_penalty": 5.0, "penalty_last_n": 4},
        lambda m: _then_draw(_penalties(m, 4, 1.0, 0.0, 5.0)),
    ),
    "penalty over all": (
        {"presence_penalty": 5.0, "penalty_last_n": -1},
        lambda m: _then_draw(_penalties(m, 10_000, 1.0, 0.0, 5.0)),
    ),
    "temperature": ({"temperature": 0.3}, lambda m: _then_draw(temperature=0.3)),
    "mirostat 1": (
        {"mirostat_mode": 1, "mirostat_tau": 3.0, "mirostat_eta": 0.3},
        lambda m: [
            llama_cpp.llama_sampler_init_temp(1.5),
            llama_cpp.llama_sampler_init_mirostat(m.n_vocab, 7, 3.0, 0.3, 100),
        ],
    ),
    "mirostat 2": (
        {"mirostat_mode": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.3},
        lambda m: [
            llama_cpp.llama_sampler_init_temp(1.5),
            llama_cpp.llama_sampler_init_mirostat_v2(7, 3.0, 0.3),
        ],
    ),
    "all in order": (
        {"repeat_penalty": 1.5, "top_k": 50, "typical_p": 0.9, "top_p": 0.9, "min_p": 0.02},
        lambda m: _then_draw(
            _penalties(m, 64, 1.5, 0.0, 0.0),
            llama_cpp.llama_sampler_init_top_k(50),
            llama_cpp.llama_sampler_init_typical(0.9, 1),
            llama_cpp.llama_sampler_init_top_p(0.9, 1),
            llama_cpp.llama_sampler_init_min_p(0.02, 1),
        ),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_every_setting_is_llama_cpps_own_sampler_and_has_an_effect(
    model: Model, rows: Rows, name: str
) -> None:
    settings, samplers = CHAINS[name]
    given = rows * 4
    drawer = sampler(
        model, Sampling(**{"temperature": 1.5, **OFF, **settings}), alpha=0.0, beta=0.0, seed=7
    )
    pairs = drawn(drawer, given)
    assert all(token == plain for token, plain in pairs)
    assert [token for token, _ in pairs] == chain_drawn(
        samplers(model), [original for original, _ in given]
    )
    neutral = sampler(model, Sampling(temperature=1.5, **OFF), alpha=0.0, beta=0.0, seed=7)
    assert pairs != drawn(neutral, given)


def test_without_a_look_back_penalties_have_no_effect(model: Model, rows: Rows) -> None:
    settings = Sampling(temperature=1.5, frequency_penalty=50.0, penalty_last_n=0)
    assert drawn(sampler(model, settings), rows) == drawn(
        sampler(model, Sampling(temperature=1.5)), rows
    )


def test_greedy_answers_are_penalised_too(model: Model, rows: Rows) -> None:
    given = rows[:1] * 20
    tokens = [t for t, _ in drawn(sampler(model, Sampling(presence_penalty=50.0)), given)]
    plausible = np.isfinite(combine(*given[0], alpha=1.0, beta=0.1)).sum()
    assert len(set(tokens)) == min(20, plausible)
    assert len({t for t, _ in drawn(sampler(model, Sampling()), given)}) == 1


def test_the_same_seed_draws_the_same_and_another_seed_something_else(
    model: Model, rows: Rows
) -> None:
    settings = Sampling(temperature=1.5)
    runs = [drawn(sampler(model, settings, seed=seed), rows) for seed in (4, 4, 5)]
    assert runs[0] == runs[1] != runs[2]


def test_any_setting_in_range_draws_a_plausible_token(model: Model, rows: Rows) -> None:
    rng = np.random.default_rng(0)
    extremes: dict[str, list[Any]] = {
        "temperature": [0.0, 1e-38, 0.7, 100.0],
        "top_k": [0, 1, 40, 2**31 - 1],
        "top_p": [0.0, 0.5, 1.0],
        "min_p": [0.0, 0.5, 1.0],
        "typical_p": [0.0, 0.5, 1.0],
        "repeat_penalty": [1e-6, 1.0, 100.0],
        "frequency_penalty": [-100.0, 0.0, 100.0],
        "presence_penalty": [-100.0, 0.0, 100.0],
        "penalty_last_n": [-1, 0, 5, 2**31 - 1],
        "mirostat_mode": [0, 1, 2],
        "mirostat_tau": [0.0, 5.0, 1000.0],
        "mirostat_eta": [0.0, 0.1, 1000.0],
    }
    for _ in range(200):
        chosen = {name: rng.choice(values).item() for name, values in extremes.items()}
        alpha, beta = rng.choice([0.0, 1.0, 100.0]), rng.choice([0.0, 0.1, 1.0])
        drawer = sampler(model, Sampling(**chosen), alpha=alpha, beta=beta)
        pairs = drawn(drawer, rows[:5])
        for (token, plain), (original, _) in zip(pairs, rows, strict=False):
            assert 0 <= plain < model.n_vocab
            assert beta == 0 or original[token] >= original.max() + math.log(beta) - 1e-4


# --- what may be said at all -------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_bias_of_minus_infinity_bans_a_token_even_if_only_it_is_plausible(
    model: Model, rows: Rows, temperature: float
) -> None:
    for original, degraded in rows:
        best = int(original.argmax())
        settings = Sampling(temperature=temperature, logit_bias={best: -math.inf})
        token, plain = draw(sampler(model, settings, beta=1.0), original, degraded)
        others = original.copy()
        others[best] = -np.inf
        assert token == others.argmax()
        assert best not in (token, plain)


def test_a_bias_is_added_before_plausibility_and_guidance(model: Model, rows: Rows) -> None:
    rng = np.random.default_rng(1)
    for original, degraded in rows:
        bias = {int(t): float(rng.normal(0, 5)) for t in rng.choice(700, 300)}
        biased = original.copy()
        biased[list(bias)] += np.array(list(bias.values()), np.float32)
        score = np.where(
            biased >= biased.max() + math.log(0.1), biased + (original - degraded), -np.inf
        )
        token, plain = draw(sampler(model, Sampling(logit_bias=bias)), original, degraded)
        assert [token, plain] == [int(score.argmax()), int(biased.argmax())]


def test_a_large_bias_forces_a_token(model: Model, rows: Rows) -> None:
    settings = Sampling(temperature=1.5, logit_bias={500: 1e9})
    assert set(drawn(sampler(model, settings), rows)) == {(500, 500)}


def test_forbidding_every_token_is_an_error_and_not_a_token(model: Model, rows: Rows) -> None:
    settings = Sampling(logit_bias=dict.fromkeys(range(model.n_vocab), -math.inf))
    with pytest.raises(BackendError, match="no token can follow"):
        draw(sampler(model, settings), *rows[0])


@pytest.mark.parametrize("token", [-1, 764, 10**6])
def test_a_bias_on_a_token_that_is_none_is_refused_with_the_range(model: Model, token: int) -> None:
    with pytest.raises(SamplingError, match=rf"token {token}: this vocabulary has 764 \(0-763\)"):
        sampler(model, Sampling(logit_bias={token: 1.0}))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_a_grammar_lets_nothing_else_through(model: Model, rows: Rows, temperature: float) -> None:
    settings = Sampling(temperature=temperature, grammar='root ::= ("yes" | "no") "."?')
    said = set()
    for seed in range(30):
        drawer, data = sampler(model, settings, seed=seed), b""
        for original, degraded in itertools.cycle(rows):
            token, _ = draw(drawer, original, degraded)
            if token == EOS_TOKEN:
                break
            drawer.accept(token)
            data += model.token_bytes(token)
        said.add(data.decode())
    assert said <= {"yes", "no", "yes.", "no."}
    assert temperature < 100 or len(said) == 4


def test_a_finished_grammar_leaves_only_the_end(model: Model, rows: Rows) -> None:
    drawer = sampler(model, Sampling(grammar='root ::= "a"'), beta=1.0)
    token, _ = draw(drawer, *rows[0])
    drawer.accept(token)
    assert model.token_bytes(token) == b"a"
    assert draw(drawer, *rows[1]) == (EOS_TOKEN, EOS_TOKEN)
    with pytest.raises(BackendError, match=f"the grammar does not take token {token}"):
        drawer.accept(token)


# --- logits that are no numbers ----------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_number_is_an_error(
    model: Model, rows: Rows, value: float, temperature: float
) -> None:
    row = np.full(model.n_vocab, value, np.float32)
    with pytest.raises(BackendError, match="no token can follow"):
        draw(sampler(model, Sampling(temperature=temperature)), row, rows[0][1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_degraded_row_that_is_no_number_where_it_counts_is_an_error(
    model: Model, rows: Rows, value: float, temperature: float
) -> None:
    original, degraded = rows[0][0], rows[0][1].copy()
    settings = Sampling(temperature=temperature)
    degraded[original.argmin()] = value
    draw(sampler(model, settings), original, degraded)  # implausible: it is never looked at
    degraded[original.argmax()] = value
    with pytest.raises(BackendError, match="degraded branch"):
        draw(sampler(model, settings), original, degraded)


# --- what is left undone -----------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(
    "settings",
    [{}, {"logit_bias": {300: 6.0, 301: 5.9, 302: -50.0}}, {"temperature": 0.7}],
    ids=["plain", "bias", "temperature"],
)
def test_l_d_is_asked_for_exactly_where_more_than_one_token_is_plausible(
    model: Model, rows: Rows, settings: dict[str, Any], beta: float
) -> None:
    drawer = sampler(model, Sampling(seed=1, **settings), beta=beta)
    asked = []
    for original, degraded in rows:
        calls: list[int] = []

        def l_d(calls: list[int] = calls, degraded: FloatArray = degraded) -> FloatArray:
            calls.append(1)
            return degraded

        token, _ = draw_by_halves(drawer, original, original, l_d)
        biased = original.copy()
        for biased_token, bias in settings.get("logit_bias", {}).items():
            biased[biased_token] += np.float32(bias)
        cut = combine(biased, None, alpha=0.0, beta=beta)
        n_plausible = int(np.isfinite(cut).sum())
        assert len(calls) == int(n_plausible > 1)
        assert n_plausible > 1 or token == cut.argmax()
        asked.append(n_plausible > 1)
    assert any(asked) or beta == 1.0
    assert not all(asked) or beta < 0.3 or "logit_bias" in settings


def test_l_d_is_not_asked_for_where_the_grammar_leaves_one_token(model: Model, rows: Rows) -> None:
    end = sampler(model, Sampling(grammar='root ::= ""'), beta=0.0)
    original = rows[0][0]
    token, plain = draw_by_halves(end, original, original, lambda: pytest.fail("asked for"))
    assert token == plain == EOS_TOKEN


def test_an_error_of_the_degraded_branch_is_told_as_it_is(model: Model, rows: Rows) -> None:
    def broken() -> FloatArray:
        raise BackendError("its own words")

    drawer, original = sampler(model, Sampling(), beta=0.0), rows[0][0]
    with pytest.raises(BackendError, match=r"^its own words$"):
        draw_by_halves(drawer, original, original, broken)
