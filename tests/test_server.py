"""The server: OpenAI's client gets what the model says, and every error in the client's shape."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from served import NAME, Served, asking, data_url, serving

from cmg_gguf import EvidenceModel, Guidance, Reply, Request
from cmg_gguf.evidence import UNFITTED
from cmg_gguf.guidance import PLAIN
from cmg_gguf.server.limits import Limits
from cmg_gguf.server.service import Defaults
from cmg_gguf.tiny.pair import embedded_guidance


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def strictly(kind: Any, value: dict[str, Any]) -> Any:
    """The value as OpenAI's own type, which checks every field that it knows."""
    return kind.model_validate(value, strict=True)


def alone(served: Served, body: dict[str, Any], guidance: Guidance | None = None) -> Reply:
    """The same asked of the model itself."""
    settings = {"guidance": guidance or embedded_guidance(), "max_tokens": body["max_tokens"]}
    return served.vlm.generate(Request(body["messages"], **settings))


def chunks(served: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, as they stand in it."""
    with (
        served.client() as client,
        client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, None])
@pytest.mark.parametrize("cmg", [None, "off"])
def test_an_answer_is_what_the_model_says(served: Served, seed: int | None, cmg: Any) -> None:
    body = asking(seed, cmg=cmg)
    got = served.post(body).json()
    strictly(ChatCompletion, got)
    theirs = alone(served, body, PLAIN if cmg else None)
    choice = got["choices"][0]
    assert choice["message"]["content"] == theirs.text
    assert choice["finish_reason"] == theirs.finish_reason
    assert got["model"] == NAME
    assert got["usage"]["completion_tokens"] == len(theirs.tokens)
    assert got["usage"]["prompt_tokens"] == theirs.n_prompt_tokens
    assert got["cmg"]["n_changed"] == theirs.n_changed
    assert got["cmg"]["guided"] is (seed is not None and cmg is None)


@pytest.mark.parametrize("more", [{}, {"logprobs": True, "top_logprobs": 2}])
def test_chunks_add_up_to_the_answer(served: Served, more: dict[str, Any]) -> None:
    body = asking(0, **more)
    served.vlm.forget()
    whole = served.post(body).json()
    served.vlm.forget()
    parts = chunks(served, body)
    for part in parts:
        strictly(ChatCompletionChunk, part)
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant"}
    said = "".join(delta.get("content", "") for delta in deltas)
    assert said == whole["choices"][0]["message"]["content"]
    reasons = [part["choices"][0]["finish_reason"] for part in parts]
    assert reasons == [None] * (len(parts) - 1) + [whole["choices"][0]["finish_reason"]]
    assert parts[-1]["cmg"]["changed"] == whole["cmg"]["changed"]
    assert all("usage" not in part for part in parts)
    if more:
        entries = [e for p in parts[1:-1] for e in p["choices"][0]["logprobs"]["content"]]
        assert entries == whole["choices"][0]["logprobs"]["content"]


def test_counts_come_last_where_they_are_asked_for(served: Served) -> None:
    body = asking(0)
    *parts, last = chunks(served, {**body, "stream_options": {"include_usage": True}})
    strictly(ChatCompletionChunk, last)
    assert last["choices"] == []
    assert (
        last["usage"]["completion_tokens"] == served.post(body).json()["usage"]["completion_tokens"]
    )
    assert parts[-1]["choices"][0]["finish_reason"] is not None


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_are_drawn_with_the_seeds_that_follow(served: Served, stream: bool) -> None:
    drawn: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "min_p": 0.0, "cmg": "off"}
    body = asking(0, **drawn)
    singles = [
        served.post({**body, "seed": seed}).json()["choices"][0]["message"]["content"]
        for seed in (5, 6, 7)
    ]
    assert len(set(singles)) > 1
    several = {**body, "seed": 5, "n": 3}
    if not stream:
        got = served.post(several).json()
        strictly(ChatCompletion, got)
        assert [c["message"]["content"] for c in got["choices"]] == singles
        assert [c["cmg"]["seed"] for c in got["choices"]] == [5, 6, 7]
        return
    texts = [""] * 3
    for part in chunks(served, several):
        (choice,) = part["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == singles


def test_the_official_client_asks_streams_and_lists(served: Served, client: openai.OpenAI) -> None:
    messages: Any = asking(0)["messages"]
    settings: dict[str, Any] = {"model": NAME, "temperature": 0, "max_completion_tokens": 24}
    whole = client.chat.completions.create(messages=messages, **settings)
    assert whole.choices[0].message.content == alone(served, asking(0)).text
    assert whole.model_extra is not None
    assert whole.model_extra["cmg"]["guided"] is True
    text = ""
    for chunk in client.chat.completions.create(messages=messages, stream=True, **settings):
        text += chunk.choices[0].delta.content or ""
    assert text == whole.choices[0].message.content
    (model,) = client.models.list()
    assert model.id == NAME == client.models.retrieve(NAME).id
    plain = client.chat.completions.create(
        messages=messages, extra_body={"cmg": "off"}, logprobs=True, top_logprobs=2, **settings
    )
    assert plain.model_extra is not None
    assert plain.model_extra["cmg"]["guided"] is False
    assert plain.choices[0].logprobs is not None
    for entry in plain.choices[0].logprobs.content or ():
        assert entry.top_logprobs[0].token == entry.token


def test_the_official_client_gets_json_by_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}, "count": {"enum": [1, 2, 3]}},
        "required": ["sure", "count"],
        "additionalProperties": False,
    }
    got = client.chat.completions.create(
        model=NAME,
        messages=asking(0)["messages"],
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    said = json.loads(got.choices[0].message.content or "")
    assert isinstance(said["sure"], bool)
    assert said["count"] in (1, 2, 3)


# --- what a request may say --------------------------------------------------------------------


def test_guidance_of_a_request_is_over_the_servers(served: Served) -> None:
    own = embedded_guidance()
    got = served.post(asking(0, cmg={"alpha": 2.0, "layers": {"rule": "layer_set", "layers": [1]}}))
    block = got.json()["cmg"]
    assert (block["alpha"], block["beta"], block["layers"]) == (2.0, own.beta, [1])
    assert "evidence" not in block


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.0, "beta": 0.0}])
def test_evidence_is_by_the_servers_weights(served: Served, settings: dict[str, Any]) -> None:
    weights = EvidenceModel(intercept=0.5, difference=2.0, fitted_on="nothing")
    with serving(defaults=Defaults(embedded_guidance(), weights)) as fitted:
        for server, model in ((served, UNFITTED), (fitted, weights)):
            body = asking(0, cmg={**settings, "evidence": True})
            server.vlm.forget()
            block = server.post(body).json()["cmg"]
            server.vlm.forget()
            reply = server.vlm.generate(
                Request(
                    body["messages"],
                    guidance=PLAIN if settings else embedded_guidance(),
                    max_tokens=body["max_tokens"],
                    evidence=model,
                )
            )
            told = block["evidence"]
            assert told["fitted_on"] == model.fitted_on
            assert [(w["text"], w["score"]) for w in told["words"]] == [
                (word.text, word.evidence) for word in reply.words
            ]
            assert told["words"]
            server.vlm.forget()
            assert chunks(server, body)[-1]["cmg"]["evidence"] == told


def test_chunks_have_the_evidence_where_guidance_hides_the_picture(served: Served) -> None:
    blind = {
        "tokens": {"rule": "top_ratio", "ratio": 1.0},
        "layers": {"rule": "layer_range", "start": 0.0, "stop": 1.0},
        "scope": "text",
        "evidence": True,
    }
    *said, last = chunks(served, asking(0, cmg=blind))
    in_chunks = [t for chunk in said if "cmg" in chunk for t in chunk["cmg"]["evidence"]["tokens"]]
    assert in_chunks == last["cmg"]["evidence"]["tokens"]
    assert len(in_chunks) > 4
    *said, last = chunks(served, asking(0, cmg={"evidence": True}))
    assert not any("cmg" in chunk for chunk in said)
    assert last["cmg"]["evidence"]["tokens"]


def test_evidence_of_a_request_without_a_picture_is_refused(served: Served) -> None:
    got = served.post(asking(None, cmg={"evidence": True}))
    assert got.status_code == 400
    assert "the request has none" in got.json()["error"]["message"]


def test_heat_is_the_replys(served: Served) -> None:
    assert "heat" not in served.post(asking(0)).json()["cmg"]
    body = asking(0, cmg={"heat": True})
    served.vlm.forget()
    told = served.post(body).json()["cmg"]["heat"]
    served.vlm.forget()
    assert chunks(served, body)[-1]["cmg"]["heat"] == told
    served.vlm.forget()
    heat = served.vlm.generate(
        Request(
            body["messages"],
            guidance=embedded_guidance(),
            max_tokens=body["max_tokens"],
            heat=True,
        )
    ).heat
    assert heat is not None
    weights = np.frombuffer(base64.b64decode(told["weights"]), "<f2").reshape(told["shape"])
    np.testing.assert_allclose(weights, heat.weights, rtol=2**-11, atol=2**-25)
    assert (told["layers"], told["masked"]) == (list(heat.layers), list(heat.masked))
    (image,) = told["images"]
    assert image["size"] == [heat.images[0].width, heat.images[0].height]
    np.testing.assert_allclose(image["boxes"], heat.boxes(0), atol=0.005)
    assert image["n_tokens"] == weights.shape[2]


def test_heat_without_a_picture_is_refused(served: Served) -> None:
    got = served.post(asking(None, cmg={"heat": True}))
    assert got.status_code == 400
    assert "there is no image" in got.json()["error"]["message"]


def test_heat_beyond_its_size_is_refused_with_what_is_not() -> None:
    with serving(limits=Limits(heat_bytes=2000)) as served:
        got = served.post(asking(0, cmg={"heat": True}))
        assert (got.status_code, got.json()["error"]["param"]) == (400, "cmg")
        told = re.search(r"max_tokens to (\d+) or less", got.json()["error"]["message"])
        assert told
        most = int(told[1])
        assert served.wait(lambda: served.is_idle)
        for n, status in ((most, 200), (most + 1, 400)):
            got = served.post(asking(0, cmg={"heat": True}, max_tokens=n))
            assert got.status_code == status


WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": 101}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 5}, "n"),
    ({"stop": [""]}, "stop"),
    ({"top_logprobs": 101, "logprobs": True}, "top_logprobs"),
    ({"logit_bias": {"cat": 1.0}}, "logit_bias"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"seed": -2}, "seed"),
    ({"cmg": "on"}, "cmg"),
    ({"cmg": {"alhpa": 1.0}}, "cmg"),
    ({"cmg": {"evidence": 1}}, "cmg"),
    ({"cmg": {"heat": "yes"}}, "cmg"),
    ({"cmg": {"evidence": {"intercept": 1.0}}}, "cmg"),
    ({"cmg": {"alpha": 1000.0}}, "cmg"),
    ({"cmg": {"alpha": "much"}}, "cmg"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x " * 9000}]}, "messages"),
    ({"stream_options": {"include_usage": 3}}, "stream_options"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'}, None),
    # --- what only this model cannot do
    ({"logit_bias": {"99999999": 1.0}}, "logit_bias"),
    ({"grammar": "root ::= nowhere"}, "grammar"),
    ({"response_format": {"type": "json_object", "schema": {"$ref": "#/x"}}}, "response_format"),
    ({"cmg": {"layers": {"rule": "layer_set", "layers": [99]}}}, "cmg"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_value_is_named(
    served: Served, fields: dict[str, Any], param: str | None, stream: bool
) -> None:
    response = served.post(asking(0, stream=stream, **fields))
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert "\n" not in error["message"]


def test_unknown_fields_are_ignored(served: Served) -> None:
    body = asking(0)
    more = {"user": "me", "store": False, "parallel_tool_calls": True, "tools": [], "metadata": {}}
    got = served.post({**body, **more, "tool_choice": "auto"}).json()
    assert got["choices"] == served.post(body).json()["choices"]


@pytest.mark.parametrize("url", ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/a.png"])
def test_pictures_are_data_urls_and_nothing_else(served: Served, url: str) -> None:
    body = asking(0)
    body["messages"][0]["content"][0]["image_url"]["url"] = url
    response = served.post(body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b"", 400),
        ("GET", "/v1/chat/completions", b"", 405),
        ("GET", "/v1/engines", b"", 404),
    ],
)
def test_errors_of_http_have_the_same_shape(
    served: Served, method: str, path: str, content: bytes, status: int
) -> None:
    with served.client(headers={"Content-Type": "application/json"}) as client:
        response = client.request(method, path, content=content)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_what_is_nested_too_deeply_is_refused(served: Served) -> None:
    """Deeper than any Python's JSON reader goes: 1,000 until 3.11, 10,000 in 3.13."""
    deep = '{"a":' * 50_000 + "1" + "}" * 50_000
    for fields in ({"x": "DEEP"}, {"cmg": "DEEP"}, {"chat_template_kwargs": {"x": "DEEP"}}):
        content = json.dumps(asking(None, **fields)).replace('"DEEP"', deep)
        with served.client(headers={"Content-Type": "application/json"}) as client:
            response = client.post("/v1/chat/completions", content=content)
        assert response.status_code == 400
        assert "nests too many" in response.json()["error"]["message"]
    assert served.is_idle


def test_it_tells_what_it_is_and_does(served: Served) -> None:
    served.post(asking(0))
    with served.client() as client:
        assert client.get("/health").json() == client.get("/healthz").json() == {"status": "ok"}
        props, slots = client.get("/props").json(), client.get("/slots").json()
        metrics = client.get("/metrics").text
    assert props["total_slots"] == len(slots) == served.service.n_parallel
    assert props["cmg"]["alpha"] == embedded_guidance().alpha
    assert not any(slot["is_processing"] for slot in slots)
    figures = dict(
        line.rsplit(" ", 1) for line in metrics.splitlines() if line and not line.startswith("#")
    )
    for name in ("llamacpp:tokens_predicted", "llamacpp:n_decode", "cmg:degraded_rows"):
        assert float(figures[f"{name}_total"]) > 0
    assert float(figures["llamacpp:n_busy_slots_per_decode"]) >= 1
    assert float(figures["llamacpp:requests_processing"]) == 0


def test_rows_of_the_degraded_branch_and_encoded_pictures_are_counted(served: Served) -> None:
    def counted() -> tuple[float, ...]:
        with served.client() as client:
            lines = client.get("/metrics").text.splitlines()
        names = (
            "cmg:degraded_rows_total",
            "cmg:image_cache_hits_total",
            "cmg:image_cache_misses_total",
        )
        return tuple(float(x.rsplit(" ", 1)[1]) for n in names for x in lines if x.startswith(n))

    def more(**fields: Any) -> tuple[float, ...]:
        served.vlm.engine.forget()
        before = counted()
        n = served.post(asking(5, **fields)).json()["usage"]["completion_tokens"]
        assert n > 2
        return (n, *(b - a for a, b in zip(before, counted(), strict=True)))

    served.vlm.forget()
    _, *plain = more(cmg="off")
    assert plain == [0, 0, 1]
    n, n_degraded, *images = more(cmg={"scope": "decode"})  # one of the prompt, one a token
    assert images == [1, 0]
    assert n_degraded in (n, n + 1)  # behind the last token no other is drawn


def test_data_urls_of_a_picture_are_kept_prompts(served: Served) -> None:
    served.vlm.forget()
    first, second = (
        served.post(asking(4, text=text)).json()["usage"] for text in ("Is it big?", "Is it red?")
    )
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] > 0
    assert data_url(4) == data_url(4)
