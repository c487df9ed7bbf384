"""Chat completions: llama-cpp-python's shapes, and what guidance adds to them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, cast

import llama_cpp
import pytest
from benchmarks.plain_llama import open_llama
from guided import N_IMAGE_TOKENS, QUESTION, asked, ids, open_vlm
from llama_cpp import LlamaGrammar
from offload import N_GPU_LAYERS
from prompts import picture
from tiny_llava import TinyPair

from cmg_gguf import (
    CMGChatHandler,
    Guidance,
    GuidedVLM,
    SamplingError,
    UnsupportedError,
)
from cmg_gguf.guidance import PLAIN
from cmg_gguf.llama.log import set_verbose

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
TEXT_ONLY = [{"role": "user", "content": QUESTION}]
LOGPROBS: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}


@pytest.fixture(scope="module")
def vlm(pair: TinyPair) -> Iterator[GuidedVLM]:
    with open_vlm(pair, n_ctx=512, strategy="exact") as opened:
        yield opened


@pytest.fixture(scope="module")
def plain_llama(pair: TinyPair) -> Iterator[llama_cpp.Llama]:
    """llama-cpp-python itself, without images or guidance."""
    opened = open_on(pair, logits_all=True)
    yield opened
    opened.close()


def open_on(pair: TinyPair, **settings: Any) -> llama_cpp.Llama:
    return open_llama(
        pair.llm,
        n_ctx=512,
        n_ubatch=64,
        n_threads=1,
        n_threads_batch=1,
        n_gpu_layers=N_GPU_LAYERS,
        type_k=0,
        type_v=0,
        verbose=False,
        **settings,
    )


def shape(value: Any) -> Any:
    """The keys of a reply all the way down; of a list the shapes that occur in it."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return sorted({json.dumps(shape(item), sort_keys=True) for item in value})
    return "a value"


def completion(
    model: GuidedVLM | llama_cpp.Llama, messages: list[dict[str, Any]], **settings: Any
) -> dict[str, Any]:
    return cast(dict[str, Any], model.create_chat_completion(messages, **settings))


def chunks(
    model: GuidedVLM | llama_cpp.Llama, messages: list[dict[str, Any]], **settings: Any
) -> list[dict[str, Any]]:
    stream = model.create_chat_completion(messages, stream=True, **settings)
    return list(cast(Iterator[dict[str, Any]], stream))


def content(model: GuidedVLM | llama_cpp.Llama, *arguments: Any, **settings: Any) -> str:
    said = completion(model, *arguments, **settings)["choices"][0]["message"]["content"]
    assert isinstance(said, str)
    return said


# --- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, LOGPROBS, {"max_tokens": 1}])
def test_a_completion_has_the_keys_of_llama_cpp_python(
    vlm: GuidedVLM, plain_llama: llama_cpp.Llama, settings: dict[str, Any]
) -> None:
    ours, theirs = (
        completion(model, TEXT_ONLY, **{**GREEDY, **settings}) for model in (vlm, plain_llama)
    )
    del ours["cmg"], ours["usage"]["prompt_tokens_details"]
    assert shape(ours) == shape(theirs)
    assert ours["object"] == theirs["object"] == "chat.completion"
    assert ours["id"].startswith("chatcmpl-")


@pytest.mark.parametrize("settings", [{}, LOGPROBS])
def test_chunks_have_the_keys_of_llama_cpp_python(
    vlm: GuidedVLM, plain_llama: llama_cpp.Llama, settings: dict[str, Any]
) -> None:
    ours, theirs = (chunks(model, TEXT_ONLY, **GREEDY, **settings) for model in (vlm, plain_llama))
    last = {k: v for k, v in ours[-1].items() if k not in ("cmg", "usage")}
    assert shape(ours[0]) == shape(theirs[0])
    assert shape(ours[1]) == shape(theirs[1])
    assert shape(last) == shape(theirs[-1])
    assert {len({c[key] for c in ours}) for key in ("id", "created", "model", "object")} == {1}


def test_without_an_image_the_text_is_llama_cpp_pythons(
    vlm: GuidedVLM, plain_llama: llama_cpp.Llama
) -> None:
    theirs = plain_llama.create_completion(f"USER: {QUESTION} ASSISTANT:", **GREEDY)
    assert content(vlm, TEXT_ONLY, **GREEDY) == theirs["choices"][0]["text"].lstrip(" ")


def test_the_chunks_add_up_to_the_completion(vlm: GuidedVLM) -> None:
    vlm.forget()
    whole = completion(vlm, asked(), **GREEDY, **LOGPROBS)
    vlm.forget()
    parts = chunks(vlm, asked(), **GREEDY, **LOGPROBS)
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant"}
    assert deltas[-1] == {}
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [part["choices"][0]["finish_reason"] for part in parts]
    assert reasons == [None] * (len(parts) - 1) + ["length"]
    logprobs = [part["choices"][0]["logprobs"] for part in parts[1:-1]]
    entries = [entry for part in logprobs for entry in part["content"]]
    assert entries == whole["choices"][0]["logprobs"]["content"]
    assert parts[-1]["usage"] == whole["usage"]
    assert untimed(parts[-1]["cmg"]) == untimed(whole["cmg"])


def untimed(block: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in block.items() if k not in ("seconds", "seed")}


def test_the_cmg_block_tells_what_guidance_did(vlm: GuidedVLM) -> None:
    guidance = Guidance(alpha=2.0, layers=[3, 4])
    vlm.forget()
    whole = completion(vlm, asked(), guidance=guidance, **GREEDY)
    reply = vlm.generate(QUESTION, [picture(0)], guidance=guidance, max_tokens=12)
    block = whole["cmg"]
    assert block["guided"] is True
    assert (block["alpha"], block["beta"], block["layers"]) == (2.0, 0.1, [3, 4])
    assert block["n_image_tokens"] == N_IMAGE_TOKENS
    assert block["n_changed"] == len(block["changed"]) == reply.n_changed > 0
    for change in block["changed"]:
        token = reply.tokens[change["index"]]
        assert change["token"] == token.text
        assert change["plain"] == vlm.model.token_bytes(token.plain).decode("utf-8", "replace")
    n = len(reply.tokens)
    assert whole["usage"] == {
        "prompt_tokens": reply.n_prompt_tokens,
        "completion_tokens": n,
        "total_tokens": reply.n_prompt_tokens + n,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    json.dumps(whole, allow_nan=False)


def test_without_guidance_the_block_says_so(vlm: GuidedVLM) -> None:
    for messages, guidance in ((TEXT_ONLY, Guidance()), (asked(), PLAIN)):
        block = completion(vlm, messages, guidance=guidance, **GREEDY)["cmg"]
        assert (block["guided"], block["layers"], block["changed"]) == (False, [], [])


def test_logprobs_are_of_the_token_that_was_said(vlm: GuidedVLM) -> None:
    whole = completion(vlm, asked(), **GREEDY, **LOGPROBS)
    entries = whole["choices"][0]["logprobs"]["content"]
    assert len(entries) == 12
    for entry in entries:
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # greedy
        assert len(entry["top_logprobs"]) <= 3
        assert entry["logprob"] <= 0
    only = completion(vlm, asked(), **GREEDY, logprobs=True)
    assert {len(e["top_logprobs"]) for e in only["choices"][0]["logprobs"]["content"]} == {0}
    none = completion(vlm, asked(), **GREEDY, top_logprobs=3)
    assert none["choices"][0]["logprobs"] is None


def test_a_reply_is_json_even_if_a_grammar_forces_the_implausible(vlm: GuidedVLM) -> None:
    whole = completion(
        vlm, asked(), grammar='root ::= "zzzz"', guidance=Guidance(beta=1.0), **GREEDY, **LOGPROBS
    )
    assert whole["choices"][0]["message"]["content"] == "zzzz"
    logprobs = [e["logprob"] for e in whole["choices"][0]["logprobs"]["content"]]
    assert min(logprobs) == -9999.0
    json.dumps(whole, allow_nan=False)


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strict", [True, False])
def test_an_answer_under_a_schema_is_what_the_schema_says(
    vlm: GuidedVLM, strict: bool, temperature: float
) -> None:
    schema = {
        "type": "object",
        "properties": {
            "animal": {"enum": ["cat", "dog", "none"]},
            "sure": {"type": "boolean"},
            "count": {"type": "integer"},
        },
        "required": ["animal", "sure", "count"],
        "additionalProperties": False,
    }
    wanted: dict[str, Any] = (
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        if strict
        else {"type": "json_object", "schema": schema}
    )
    for seed in range(3):
        whole = completion(
            vlm, asked(seed), response_format=wanted, temperature=temperature, seed=seed
        )
        choice = whole["choices"][0]
        said = json.loads(choice["message"]["content"])
        assert choice["finish_reason"] == "stop"
        assert set(said) == {"animal", "sure", "count"}
        assert said["animal"] in ("cat", "dog", "none")
        assert isinstance(said["sure"], bool)
        assert isinstance(said["count"], int)


def test_a_grammar_may_be_text_or_llama_cpp_pythons_object(vlm: GuidedVLM) -> None:
    text = 'root ::= "cat" | "dog"'
    for grammar in (text, LlamaGrammar.from_string(text, verbose=False)):
        assert content(vlm, asked(), grammar=grammar, **GREEDY) in ("cat", "dog")


@pytest.mark.parametrize("stop", ["one", ["one"], ("zz", "one")])
def test_a_stop_string_ends_the_answer(vlm: GuidedVLM, stop: Any) -> None:
    greedy = {**GREEDY, "max_tokens": 60}
    whole = content(vlm, asked(), **greedy)
    at = whole.index("one")
    choice = completion(vlm, asked(), stop=stop, **greedy)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (whole[:at], "stop")


@pytest.mark.parametrize("max_tokens", [None, 0, -1])
def test_no_limit_means_until_the_context_is_full(vlm: GuidedVLM, max_tokens: Any) -> None:
    whole = completion(vlm, asked(), temperature=0.0, max_tokens=max_tokens)
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] > 100


def test_settings_reach_the_sampler(vlm: GuidedVLM) -> None:
    wild: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "min_p": 0.0, "top_p": 1.0, "seed": 3}

    def said(**settings: Any) -> str:
        return content(vlm, asked(), **{"max_tokens": 12, "guidance": PLAIN, **wild, **settings})

    base = said()
    assert base == said()
    for settings in (
        {"temperature": 0.5},
        {"top_k": 2},
        {"top_p": 0.2},
        {"min_p": 0.5},
        {"typical_p": 0.2},
        {"seed": 4},
        {"seed": -1},
        {"repeat_penalty": 5.0},
        {"frequency_penalty": 20.0},
        {"presence_penalty": 20.0},
        {"mirostat_mode": 1},
        {"mirostat_mode": 2},
        {"mirostat_mode": 2, "mirostat_tau": 1.0},
        {"mirostat_mode": 2, "mirostat_eta": 1.0},
        {"logit_bias": {"700": 100.0}},
        {"guidance": Guidance(alpha=3.0)},
        {"logits_processor": [lambda tokens, logits: -logits]},
    ):
        assert said(**settings) != base, settings
    assert said(temperature=0.0) == said(temperature=-1.0)
    assert said(top_k=-1) == base
    assert said(tfs_z=1.0, tools=None, tool_choice="none", functions=None) == base
    assert said(tools=[], tool_choice="auto", functions=[], function_call="auto") == base
    assert said(logit_bias={"700": -math.inf}) == said(logit_bias={700: -math.inf})


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"tfs_z": 0.5}, UnsupportedError, "tfs_z=0.5"),
        ({"tools": [{"type": "function"}]}, UnsupportedError, "tools="),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, UnsupportedError, "tools="),
        ({"tool_choice": "required"}, UnsupportedError, "tool_choice='required'"),
        ({"tool_choice": {"type": "function"}}, UnsupportedError, "tool_choice={"),
        ({"functions": [{}]}, UnsupportedError, "functions="),
        ({"function_call": {"name": "f"}}, UnsupportedError, "function_call={"),
        ({"temprature": 1.0}, TypeError, "'temprature'"),
        ({"top_logprobs": 101, "logprobs": True}, SamplingError, "top_logprobs=101"),
        ({"top_logprobs": -1, "logprobs": True}, SamplingError, "top_logprobs=-1"),
        ({"logit_bias": {"cat": 1.0}}, SamplingError, "cat"),
        ({"logit_bias": {math.inf: 1.0}}, SamplingError, "logit_bias"),
        ({"logit_bias": {5: math.nan}}, SamplingError, "nan"),
        ({"temperature": math.nan}, SamplingError, "temperature=nan"),
        ({"temperature": 101.0}, SamplingError, "temperature=101"),
        ({"seed": -2}, SamplingError, "seed=-2"),
        ({"stop": [""]}, SamplingError, "stop string 0"),
        ({"response_format": {"type": "xml"}}, SamplingError, "'xml'"),
        (
            {"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'},
            SamplingError,
            "not both",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused_before_anything_is_computed(
    vlm: GuidedVLM,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    error: type[Exception],
    says: str,
    stream: bool,
) -> None:
    monkeypatch.setattr(vlm.engine, "prefill", lambda *arguments: pytest.fail("computed"))
    with pytest.raises(error) as info:
        completion(vlm, asked(), stream=stream, **settings)
    assert says in str(info.value)
    assert "\n" not in str(info.value)


# --- for people who hold a Llama ---------------------------------------------------------------


@pytest.mark.parametrize("guidance", [None, PLAIN, Guidance(alpha=3.0)])
def test_a_llama_with_the_handler_says_what_a_guided_vlm_says(
    pair: TinyPair, vlm: GuidedVLM, guidance: Guidance | None
) -> None:
    handler = CMGChatHandler(pair.mmproj, guidance=guidance, use_gpu=False)
    llm = open_on(pair, chat_handler=handler)
    theirs = completion(llm, asked(), **GREEDY)
    ours = completion(vlm, asked(), guidance=guidance, **GREEDY)
    assert theirs["choices"] == ours["choices"]
    assert untimed(theirs["cmg"]) == untimed(ours["cmg"])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(llm, asked(), **GREEDY)]
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == ours["choices"][0]["message"]["content"]
    llm.close()


def test_every_option_of_a_llama_passes_through_the_handler(pair: TinyPair) -> None:
    llm = open_on(pair, chat_handler=CMGChatHandler(pair.mmproj, use_gpu=False))
    whole = completion(llm, asked(), **GREEDY, **LOGPROBS, stop=["zz"], seed=1)
    assert len(whole["choices"][0]["logprobs"]["content"]) == 12
    with pytest.raises(UnsupportedError, match="tools="):
        llm.create_chat_completion(asked(), tools=[{"type": "function", "function": {}}])
    llm.close()


@pytest.mark.parametrize("pairing", ["pair", "contexts"])
def test_a_guided_vlm_from_a_llama_says_the_same(
    pair: TinyPair, vlm: GuidedVLM, pairing: Any
) -> None:
    llm = open_on(pair)
    with GuidedVLM.from_llama(llm, pair.mmproj, pairing=pairing, use_gpu=False) as other:
        assert other.n_ctx == 512
        replies = [v.generate(QUESTION, [picture(1)], max_tokens=20) for v in (vlm, other)]
    assert ids(replies[0]) == ids(replies[1])
    # The weights stay the Llama's: closing ours leaves it usable.
    assert content(llm, TEXT_ONLY, **GREEDY)
    llm.close()


def test_the_handler_is_made_as_llama_cpp_pythons_are(
    pair: TinyPair, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(pair.mmproj)
    made = {
        False: [
            CMGChatHandler(path, use_gpu=False),
            CMGChatHandler(path, False, use_gpu=False),
            CMGChatHandler(clip_model_path=path, verbose=False, use_gpu=False),
        ],
        True: [
            CMGChatHandler(path, True, use_gpu=False),
            CMGChatHandler(clip_model_path=path, verbose=True, use_gpu=False),
        ],
    }
    said = set()
    try:
        for is_verbose, handlers in made.items():
            for handler in handlers:
                llm = open_on(pair, chat_handler=handler)
                capfd.readouterr()
                said.add(content(llm, asked(), **GREEDY))
                assert bool(capfd.readouterr().err) == is_verbose
                llm.close()
    finally:
        set_verbose(False)
    assert len(said) == 1


WILD: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "min_p": 0.0, "top_p": 1.0, "max_tokens": 9}


def drawn(llm: llama_cpp.Llama, **settings: Any) -> tuple[int, str]:
    block = completion(llm, asked(), **WILD, **settings)
    return block["cmg"]["seed"], block["choices"][0]["message"]["content"]


def test_the_handler_draws_with_the_seed_of_its_llama(pair: TinyPair) -> None:
    handler = CMGChatHandler(pair.mmproj, use_gpu=False)
    llm = open_on(pair, chat_handler=handler, seed=7)
    first, second = drawn(llm), drawn(llm)
    assert first == drawn(llm, seed=7)
    assert first[0] == 7
    assert first != second
    llm.set_seed(7)
    assert [drawn(llm), drawn(llm)] == [first, second]
    llm.set_seed(0)
    assert drawn(llm)[0] == 0
    llm.set_seed(7)
    assert drawn(llm, seed=3)[0] == 3  # which is that call's alone
    assert drawn(llm) == first
    llm.close()


def test_a_llama_without_a_seed_draws_at_random(pair: TinyPair) -> None:
    llm = open_on(pair, chat_handler=CMGChatHandler(pair.mmproj, use_gpu=False))
    llm.set_seed(llama_cpp.LLAMA_DEFAULT_SEED)
    assert drawn(llm)[0] != drawn(llm)[0]
    llm.set_seed(-1)
    assert drawn(llm)[0] != drawn(llm)[0]
    llm.close()
