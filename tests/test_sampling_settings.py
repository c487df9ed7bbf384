"""Settings of the sampler chain: what is out of range is named, with the range."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from support import Tiny

from cmg_gguf.chat.completion import request_of
from cmg_gguf.errors import PromptError, SamplingError
from cmg_gguf.llama.grammar import grammar_for
from cmg_gguf.llama.sampler import Sampler
from cmg_gguf.sampling import MAX_GRAMMAR, MAX_NESTING, MAX_SEED, Sampling


def refused(**settings: Any) -> str:
    with pytest.raises(SamplingError) as info:
        Sampling(**settings)
    line = str(info.value)
    assert "\n" not in line
    return line


def build(llama: Tiny, grammar: str) -> Sampler:
    return Sampler(llama.model, Sampling(grammar=grammar), alpha=1.0, beta=0.1, seed=0)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("temperature", 0, 100),
        ("top_k", 0, 2**31 - 1),
        ("top_p", 0, 1),
        ("min_p", 0, 1),
        ("typical_p", 0, 1),
        ("repeat_penalty", 1e-6, 100),
        ("frequency_penalty", -100, 100),
        ("presence_penalty", -100, 100),
        ("penalty_last_n", -1, 2**31 - 1),
        ("mirostat_mode", 0, 2),
        ("mirostat_tau", 0, 1000),
        ("mirostat_eta", 0, 1000),
    ],
)
def test_a_setting_out_of_range_is_named_with_the_range(name: str, low: float, high: float) -> None:
    limits: list[Any] = [low, high]
    for value in limits:
        assert getattr(Sampling(**{name: value}), name) == value
    bad: list[Any] = [low - 1, high + 1, "1", math.nan, math.inf, -math.inf]
    bad += [True, False, np.bool_(True), [1], 1j, b"1", np.array([1.0])]
    for value in bad:
        line = refused(**{name: value})
        assert line.startswith(f"{name}={value!r} is out of range")
        assert f"{low:.10g} to {high:.10g}" in line


@pytest.mark.parametrize("name", ["top_k", "penalty_last_n", "mirostat_mode", "seed"])
def test_a_whole_number_is_asked_for_by_name(name: str) -> None:
    assert refused(**{name: 1.5}).startswith(f"{name}=1.5 is out of range: whole numbers from")


@pytest.mark.parametrize("seed", [-2, 2**32, 1.0, "1", True, False, math.nan, [1]])
def test_a_seed_that_is_none_is_named_with_the_range(seed: Any) -> None:
    line = refused(seed=seed)
    assert line.startswith("seed=")
    assert f"is out of range: whole numbers from 0 to {MAX_SEED}, or None" in line


@pytest.mark.parametrize("seed", [-1, 2**32 - 1, None, np.int64(-1), np.uint32(2**32 - 1)])
def test_llama_cpps_seeds_for_a_new_one_each_time_are_none(seed: Any) -> None:
    assert Sampling(seed=seed).seed is None
    assert request_of([], seed=seed).sampling.seed is None


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED])
def test_every_other_seed_is_kept(seed: int) -> None:
    assert Sampling(seed=seed).seed == seed


def test_none_is_the_default_of_every_setting() -> None:
    names = [field.name for field in dataclasses.fields(Sampling)]
    nothing: dict[str, Any] = dict.fromkeys(names)
    assert Sampling(**nothing) == Sampling()
    # A chat completion has llama-cpp-python's defaults, which draws; Sampling's own is greedy.
    asked = request_of([], **dict.fromkeys(names[:4])).sampling
    assert asked == request_of([]).sampling == Sampling(temperature=0.2)


@pytest.mark.parametrize("bias", [{5: True}, {5: "1"}, {5: None}, {True: 1.0}, {5.5: 1.0}])
def test_a_bias_of_another_type_is_refused_wherever_it_is_asked_for(bias: Any) -> None:
    assert "logit_bias" in refused(logit_bias=bias)
    with pytest.raises(SamplingError, match="logit_bias"):
        request_of([], logit_bias=bias)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"temperature": True}, "temperature=True"),
        ({"temperature": "0.5"}, "temperature='0.5'"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": False}, "top_k=False"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"logprobs": "yes"}, "logprobs='yes'"),
        ({"logprobs": 1}, "logprobs=1"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs=True"),
        ({"logprobs": True, "top_logprobs": ""}, "top_logprobs=''"),
        ({"top_logprobs": 1.0}, "top_logprobs=1.0"),
    ],
)
def test_a_chat_completion_names_its_setting_of_another_type(
    settings: dict[str, Any], name: str
) -> None:
    with pytest.raises(SamplingError) as info:
        request_of([], **settings)
    assert str(info.value).startswith(name)


@pytest.mark.parametrize("wrong", [False, True, "3", math.nan, 2.5])
def test_a_chat_completion_takes_no_other_type_for_the_number_of_tokens(wrong: Any) -> None:
    with pytest.raises(PromptError, match="max_tokens="):
        request_of([], max_tokens=wrong)


def test_numbers_of_numpy_are_numbers() -> None:
    given = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(7))
    assert given == Sampling(temperature=0.5, top_k=3, seed=7)
    assert type(given.top_k) is type(given.seed) is int


@pytest.mark.parametrize("bias", [math.nan, math.inf, 1e39, -2e9])
def test_a_bias_that_would_ban_by_accident_is_refused(bias: float) -> None:
    line = refused(logit_bias={5: bias})
    assert "logit_bias of token 5" in line
    assert repr(bias) in line


def test_a_bias_of_minus_infinity_is_a_ban() -> None:
    assert Sampling(logit_bias={5: -math.inf}).logit_bias == {5: -math.inf}


# --- grammars ----------------------------------------------------------------------------------


@pytest.mark.parametrize("grammar", ['root ::= "a"\0', 5, b'root ::= "a"'])
def test_a_grammar_that_is_no_text_is_refused(grammar: Any) -> None:
    assert "the grammar is" in refused(grammar=grammar)


def test_grammars_that_would_overflow_the_parsers_stack_are_refused() -> None:
    deep = "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000
    assert refused(grammar=deep) == (
        f"the grammar nests 20000 parentheses and the limit is {MAX_NESTING}; simplify it"
    )
    long = "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(80_000))
    assert f"the limit is {MAX_GRAMMAR}" in refused(grammar=long)


def test_parentheses_in_literals_sets_and_comments_do_not_nest(llama: Tiny) -> None:
    n = MAX_NESTING + 1
    for innocent in ('"' + "(" * n + '"', "[" + "(" * n + "]", '"\\"' + "(" * n + '"'):
        build(llama, f"root ::= {innocent} # {'(' * n}\n")
    hidden = 'root ::= "\\\\" ' + "(" * n + '"a"' + ")" * n
    assert "nests" in refused(grammar=hidden)
    build(llama, "root ::= " + "(" * MAX_NESTING + '"a"' + ")" * MAX_NESTING)


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ('answer ::= "a"', "root"),
        ("root ::= missing", "'missing'"),
        ('root ::= root "a" | "b"', "left recursion"),
        ("root ::= [", "unexpected end of input"),
        ('root ::= "a"{1000000}', "number of repetitions"),
        ("root ::= x\n\n# y", "'x'"),
    ],
)
def test_a_grammar_that_does_not_parse_is_refused_with_the_reason(
    llama: Tiny, grammar: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SamplingError, match="the grammar does not parse: ") as info:
        build(llama, grammar)
    assert capfd.readouterr().err == ""
    assert says in str(info.value)
    assert "\n" not in str(info.value)


def test_a_lone_surrogate_in_a_grammar_is_no_crash(llama: Tiny) -> None:
    build(llama, 'root ::= "\ud800"')


# --- response formats --------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}


def test_bounds_within_the_limit_are_fine(llama: Tiny) -> None:
    schema = {
        "type": "array",
        "items": {"type": "string", "maxLength": 100, "pattern": "^[a-z]{2,50}x{,3}$"},
        "maxItems": 500,
    }
    grammar = grammar_for({"type": "json_object", "schema": schema})
    assert grammar is not None
    build(llama, grammar)


def test_free_text_has_no_grammar() -> None:
    assert grammar_for(None) is grammar_for({"type": "text"}) is None


def test_both_ways_to_give_a_schema_give_the_same_grammar(llama: Tiny) -> None:
    nested = grammar_for({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}})
    assert nested == grammar_for({"type": "json_object", "schema": SCHEMA})
    assert nested is not None
    assert json.dumps("yes") in nested.replace("\\", "")
    build(llama, nested)
    any_json = grammar_for({"type": "json_object"})
    assert any_json is not None
    assert any_json != nested
    build(llama, any_json)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"type": "yaml"}, "'yaml'"),
        ({}, "None"),
        ({"type": "json_schema"}, "json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": None}}, "json_schema.schema"),
        ({"type": "json_object", "schema": {"type": "poem"}}, "poem"),
        ({"type": "json_object", "schema": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"type": "json_object", "schema": {"allOf": [{"$ref": "https://x.org/y"}]}}, "fetched"),
        ({"type": "json_object", "schema": [1]}, "schema"),
        ({"type": "json_object", "schema": {"type": "string", "maxLength": 10**9}}, "1000000000"),
        (
            {"type": "json_object", "schema": {"type": "array", "items": {"minItems": 5001}}},
            "minItems 5001 and the limit is 2000",
        ),
        (
            {"type": "json_object", "schema": {"type": "string", "pattern": "^a{3,100000000000}$"}},
            "pattern",
        ),
        ({"type": "json_object", "schema": {"enum": [{1, 2}]}}, "schema"),
    ],
)
def test_another_response_format_is_refused_with_the_reason(
    wanted: dict[str, Any], says: str
) -> None:
    with pytest.raises(SamplingError) as info:
        grammar_for(wanted)
    assert says in str(info.value)
    assert "\n" not in str(info.value)
