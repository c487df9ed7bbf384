"""Ollama's API on a real server: the `ollama` client gets what the model says."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from served import NAME, QUESTION, Served, data_url, serving

from cmg_gguf import Guidance, Reply, Request
from cmg_gguf.guidance import PLAIN
from cmg_gguf.tiny.pair import embedded_guidance

MODEL = f"{NAME}:latest"
GREEDY = {"temperature": 0.0, "num_predict": 24}
PICTURE = base64.b64decode(data_url(0).partition(",")[2])


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[ollama.Client]:
    with ollama.Client(served.url, trust_env=False) as opened:
        yield opened


def alone(
    served: Served, guidance: Guidance | None = None, scene: int | None = 0, **settings: Any
) -> Reply:
    """The same asked of the model itself."""
    images = [data_url(scene)] if scene is not None else []
    known = {"guidance": guidance or embedded_guidance(), "max_tokens": 24}
    return served.vlm.generate(Request(QUESTION, images, **{**known, **settings}))


def message(**more: Any) -> dict[str, Any]:
    return {"role": "user", "content": QUESTION, "images": [PICTURE], **more}


def test_chat_and_generate_say_what_the_model_says(served: Served, client: ollama.Client) -> None:
    theirs = alone(served)
    chat = client.chat(MODEL, [message()], options=GREEDY)
    generated = client.generate(MODEL, QUESTION, images=[PICTURE], options=GREEDY)
    assert chat.message.content == generated.response == theirs.text
    for got in (chat, generated):
        assert (got.model, got.done, got.done_reason) == (MODEL, True, theirs.finish_reason)
        assert (got.prompt_eval_count, got.eval_count) == (
            theirs.n_prompt_tokens,
            len(theirs.tokens),
        )
        assert got.total_duration
        assert got.eval_duration


def test_streams_add_up_to_the_answer(served: Served, client: ollama.Client) -> None:
    theirs = alone(served)
    chat = list(client.chat(MODEL, [message()], stream=True, options=GREEDY))
    generated = list(
        client.generate(MODEL, QUESTION, images=[PICTURE], stream=True, options=GREEDY)
    )
    assert "".join(part.message.content or "" for part in chat) == theirs.text
    assert "".join(part.response or "" for part in generated) == theirs.text
    for parts in (chat, generated):
        assert [part.done for part in parts] == [*[False] * (len(parts) - 1), True]
        assert len(parts) > 3
        assert parts[-1].eval_count == len(theirs.tokens)


def test_without_a_picture_and_with_a_system_message(served: Served, client: ollama.Client) -> None:
    theirs = served.vlm.generate(
        Request(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
            max_tokens=8,
        )
    )
    options = {**GREEDY, "num_predict": 8}
    got = client.generate(MODEL, QUESTION, system="Be brief.", options=options)
    assert got.response == theirs.text
    assert got.done_reason == "length"


def test_formats_are_kept_to(client: ollama.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    options = {**GREEDY, "num_predict": 64}
    got = client.chat(MODEL, [message()], format=schema, options=options)
    assert set(json.loads(got.message.content or "")) == {"n"}
    said = client.generate(MODEL, QUESTION, images=[PICTURE], format=schema, options=options)
    assert set(json.loads(said.response or "")) == {"n"}
    started = client.generate(MODEL, QUESTION, format="json", options={"num_predict": 4})
    assert (started.response or "").startswith("{")


def test_logprobs_come_with_their_tokens(served: Served, client: ollama.Client) -> None:
    theirs = alone(served, top_logprobs=2)
    got = client.chat(MODEL, [message()], logprobs=True, top_logprobs=2, options=GREEDY)
    assert got.logprobs is not None
    assert [entry.logprob for entry in got.logprobs] == [t.logprob for t in theirs.tokens]
    best = [[top.logprob for top in entry.top_logprobs or ()] for entry in got.logprobs]
    assert best == [[logprob for _, logprob in t.top] for t in theirs.tokens]


@pytest.mark.parametrize("by", ["field", "option"])
def test_guidance_is_a_field_or_an_option(served: Served, by: str) -> None:
    body: dict[str, Any] = {"messages": [message(images=[data_url(0).partition(",")[2]])]}
    body |= {"options": dict(GREEDY), "stream": False}
    guided = served.post(body, "/api/chat").json()["cmg"]
    (body if by == "field" else body["options"])["cmg"] = "off"
    plain = served.post(body, "/api/chat").json()
    assert guided["guided"] is True
    assert plain["cmg"]["guided"] is False
    assert plain["message"]["content"] == alone(served, PLAIN).text
    (body if by == "field" else body["options"])["cmg"] = {"alpha": 2.0}
    assert served.post(body, "/api/chat").json()["cmg"]["alpha"] == 2.0


def test_photoprisms_requests_are_answered(served: Served) -> None:
    """As its `ApiRequest` is written: fields that are empty, and options that are not ours."""
    body = {
        "id": "b8a0",
        "model": "gemma3:latest",
        "version": "latest",
        "prompt": QUESTION,
        "suffix": "",
        "options": {
            **{"num_predict": 24, "top_p": 0.9, "stop": ["\n\n"], "num_ctx": 4096},
            **{"use_mmap": True, "combine_outputs": "1", "temperature": 0},
        },
        "stream": False,
        "images": [data_url(0).partition(",")[2]],
    }
    got = served.post(body, "/api/generate")
    assert got.status_code == 200
    assert got.json()["response"] == alone(served).text
    assert got.json()["model"] == "gemma3:latest"


def test_what_asks_nothing_loads(client: ollama.Client) -> None:
    for got in (client.generate(MODEL, keep_alive="5m"), client.chat(MODEL, [])):
        assert (got.done, got.done_reason) == (True, "load")


def test_the_model_is_listed_and_described(served: Served, client: ollama.Client) -> None:
    (listed,) = client.list().models
    assert listed.model == MODEL
    assert listed.size == served.service.facts["bytes"]
    shown = client.show(MODEL)
    assert shown.capabilities == ["completion", "vision"]
    assert shown.modelinfo is not None
    family = shown.modelinfo["general.architecture"]
    assert shown.modelinfo[f"{family}.context_length"] == served.service.facts["n_ctx_train"]
    (running,) = client.ps().models
    assert running.model == MODEL
    assert running.context_length == served.service.n_ctx
    with served.client() as http:
        version = http.get("/api/version").json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4)


def refusal(served: Served, path: str, **body: Any) -> str:
    got = served.post({"prompt": QUESTION, "messages": [message(images=[])], **body}, path)
    assert got.status_code == 400
    assert set(got.json()) == {"error"}
    return str(got.json()["error"])


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize(
    ("body", "what"),
    [
        ({"options": {"temperature": "hot"}}, "options.temperature"),
        ({"options": {"top_p": 2}}, "top_p=2.0 is out of range"),
        ({"options": {"num_predict": 1.5}}, "options.num_predict"),
        ({"options": {"stop": [""]}}, "stop string 0"),
        ({"options": {"cmg": "on"}}, "cmg"),
        ({"options": []}, "options"),
        ({"format": "xml"}, 'write "json", or give a JSON schema'),
        ({"think": "hard"}, "think='hard' is unknown"),
        ({"stream": "yes"}, "stream"),
        ({"cmg": {"alpha": -1}}, "alpha=-1"),
    ],
)
def test_wrong_values_are_told_in_ollamas_shape(
    served: Served, path: str, body: dict[str, Any], what: str
) -> None:
    assert what in refusal(served, path, **body)


@pytest.mark.parametrize(
    ("name", "value"),
    [("suffix", "."), ("template", "{{ .Prompt }}"), ("context", [1]), ("raw", True)],
)
def test_what_generate_has_not_is_told(served: Served, name: str, value: Any) -> None:
    assert refusal(served, "/api/generate", **{name: value}) == (
        f"{name} is not supported here; leave it out"
    )


def test_tools_and_bad_pictures_are_refused(served: Served, client: ollama.Client) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(ollama.ResponseError, match="tools") as caught:
        client.chat(MODEL, [message()], tools=[tool])
    assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="the picture cannot be had"):
        client.chat(MODEL, [message(images=[b"no picture"])])
    with pytest.raises(ollama.ResponseError, match="the picture cannot be had"):
        list(client.generate(MODEL, QUESTION, images=[b"no picture"], stream=True))


def test_whole_numbers_may_be_floats(served: Served) -> None:
    options = {**GREEDY, "num_predict": 3.0, "top_k": 40.0}
    body = {"prompt": QUESTION, "options": options, "stream": False}
    assert served.post(body, "/api/generate").json()["eval_count"] == 3


def test_a_client_that_leaves_frees_its_place(served: Served) -> None:
    body = {"prompt": "Count.", "options": {"num_predict": 500, "stop": []}}
    with served.client() as http, http.stream("POST", "/api/generate", json=body) as response:
        next(response.iter_lines())
    assert served.wait(lambda: served.is_idle)
