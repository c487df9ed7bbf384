"""Ollama's requests as chat completions, and replies in its shapes: the `ollama` package judges."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest
from answered import answer, token_bytes
from ollama import ChatResponse, GenerateResponse

from cmg_gguf import PromptError, SamplingError, UnsupportedError
from cmg_gguf.chat.completion import cmg_block, request_of
from cmg_gguf.chat.ollama import (
    OPTIONS,
    Lines,
    chat_messages,
    prompt_messages,
    settings_of,
    timestamp,
)

KINDS: dict[Any, Any] = {"chat": ChatResponse, "generate": GenerateResponse}


def text_of(line: dict[str, Any]) -> str:
    return str(line["message"]["content"] if "message" in line else line["response"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("thought", [(), (1, 2, 3, 4)])
@pytest.mark.parametrize("logprobs", [False, True])
def test_a_stream_says_what_the_whole_says(
    kind: Any, thought: tuple[int, ...], logprobs: bool
) -> None:
    pieces, reply = answer(thought, logprobs=logprobs)
    lines = Lines(kind, "tiny:latest", token_bytes)
    whole, said, last = lines.whole(reply), [*map(lines.said, pieces)], lines.last(reply)
    for line in (whole, *said, last):
        KINDS[kind].model_validate(line)
        assert line["model"] == "tiny:latest"
    assert "".join(map(text_of, said)) == text_of(whole) == "A forké"
    assert [line["done"] for line in said] == [False] * len(pieces)
    assert text_of(last) == ""

    thoughts = [(line.get("message", line)).get("thinking", "") for line in (*said, whole)]
    assert "".join(thoughts[:-1]) == thoughts[-1] == reply.reasoning
    own = ("created_at", "message", "response", "thinking", "logprobs")
    assert {k: v for k, v in whole.items() if k not in own} == {
        k: v for k, v in last.items() if k not in own
    }
    if logprobs:
        each = [entry for line in said for entry in line["logprobs"]]
        assert [entry["token"] for entry in each[-3:]] == ["A ", "fork", "é"]
        assert each[-3:] == whole["logprobs"][-3:]
    else:
        assert not any("logprobs" in line for line in (*said, whole))


def test_the_account_is_in_nanoseconds_and_has_what_guidance_did() -> None:
    _, reply = answer(finish_reason="length")
    last = Lines("chat", "m", token_bytes).last(reply)
    assert last["done_reason"] == "length"
    assert last["prompt_eval_duration"] == 750_000_000
    assert last["eval_duration"] == 1_000_000_000
    assert last["total_duration"] == 1_750_000_000
    assert (last["prompt_eval_count"], last["eval_count"]) == (40, 3)
    assert last["cmg"] == cmg_block(reply, token_bytes)
    assert last["cmg"]["n_changed"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_asks_nothing_is_told_that_the_model_is_there(kind: Any) -> None:
    line = Lines(kind, "m", token_bytes).loaded()
    KINDS[kind].model_validate(line)
    assert (line["done"], line["done_reason"], text_of(line)) == (True, "load", "")


def test_times_are_written_as_rfc_3339_has_them() -> None:
    time = datetime(2025, 2, 3, 4, 5, 6, 70, tzinfo=timezone.utc)
    assert timestamp(time) == "2025-02-03T04:05:06.000070Z"


def test_options_reach_the_request() -> None:
    options = {
        **{"temperature": 0.5, "top_k": 7, "top_p": 0.6, "min_p": 0.01, "typical_p": 0.9},
        **{"repeat_penalty": 1.25, "presence_penalty": 0.5, "frequency_penalty": 0.75},
        **{"repeat_last_n": -1, "mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.2},
        **{"seed": 3, "num_predict": 5, "stop": ["\n"]},
    }
    assert set(options) == set(OPTIONS)
    loading = {"num_ctx": 99, "num_gpu": 1, "tfs_z": 0.5, "unheard_of": "yes"}
    request = request_of([], **settings_of({**options, **loading}))
    sampling = request.sampling
    renamed = {"repeat_last_n": "penalty_last_n", "mirostat": "mirostat_mode"}
    for name, value in options.items():
        if name not in ("num_predict", "stop"):
            assert getattr(sampling, renamed.get(name, name)) == value
    assert (request.max_tokens, request.stop) == (5, ("\n",))
    assert settings_of({"top_k": None}) == {}


@pytest.mark.parametrize("n", [-1, -2, 0])
def test_a_num_predict_that_is_not_positive_is_no_limit(n: int) -> None:
    assert request_of([], **settings_of({"num_predict": n})).max_tokens is None


@pytest.mark.parametrize(
    ("given", "response_format"),
    [
        (None, None),
        ("", None),
        ("json", {"type": "json_object"}),
        (
            {"type": "object"},
            {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"type": "object"}},
            },
        ),
    ],
)
def test_formats_are_response_formats(given: object, response_format: object) -> None:
    assert settings_of({}, format=given).get("response_format") == response_format
    request_of([], **settings_of({}, format=given))


@pytest.mark.parametrize("given", ["JSON", "xml", 7, True, ["json"]])
def test_another_format_is_told(given: object) -> None:
    with pytest.raises(SamplingError, match=r'write "json", or give a JSON schema'):
        settings_of({}, format=given)


@pytest.mark.parametrize(
    ("think", "variables"),
    [
        (True, {"enable_thinking": True}),
        (False, {"enable_thinking": False}),
        ("low", {"enable_thinking": True, "reasoning_effort": "low"}),
    ],
)
def test_thinking_reaches_the_template(think: bool | str, variables: dict[str, Any]) -> None:
    request = request_of([], **settings_of({}, think=think))
    assert request.chat_template_kwargs == variables


def test_another_way_to_think_is_told() -> None:
    with pytest.raises(SamplingError, match="think='hard' is unknown: true, false, or one of low"):
        settings_of({}, think="hard")


def test_a_prompt_is_a_message_with_its_pictures() -> None:
    assert prompt_messages("What?", system="Be brief.", images=["iVBO"]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What?", "images": ["iVBO"]},
    ]
    assert prompt_messages("What?", images=[]) == [{"role": "user", "content": "What?"}]


def test_messages_of_pictures_alone_have_a_content_and_thoughts_their_place() -> None:
    assert chat_messages([{"role": "user", "images": ["iVBO"]}]) == [
        {"role": "user", "images": ["iVBO"], "content": ""}
    ]
    assert chat_messages([{"role": "assistant", "content": "A.", "thinking": "B."}]) == [
        {"role": "assistant", "content": "A.", "reasoning_content": "B."}
    ]


def test_tools_are_refused_by_the_request() -> None:
    with pytest.raises(UnsupportedError, match="tools"):
        request_of([], **settings_of({}), tools=[{"type": "function"}])


def test_what_is_wrong_in_an_option_is_told_by_the_request() -> None:
    with pytest.raises(SamplingError, match=r"top_p=2\.0 is out of range"):
        request_of([], **settings_of({"top_p": 2.0}))
    with pytest.raises(PromptError, match="max_tokens='many'"):
        request_of([], **settings_of({"num_predict": "many"}))
