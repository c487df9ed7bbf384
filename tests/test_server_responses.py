"""OpenAI's responses on a real server: the `openai` client gets what the model says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from served import NAME, QUESTION, Served, data_url, serving

from cmg_gguf import Guidance, Reply, Request
from cmg_gguf.guidance import PLAIN
from cmg_gguf.tiny.pair import embedded_guidance

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 64, "model": NAME}
INPUT: Any = [
    {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": data_url(0), "detail": "auto"},
            {"type": "input_text", "text": QUESTION},
        ],
    }
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def alone(served: Served, guidance: Guidance | None = None, **settings: Any) -> Reply:
    """The same asked of the model itself."""
    known = {"guidance": guidance or embedded_guidance(), "max_tokens": 64}
    return served.vlm.generate(Request(INPUT, **{**known, **settings}))


def test_a_response_is_what_the_model_says(served: Served, client: openai.OpenAI) -> None:
    theirs = alone(served)
    got = client.responses.create(input=INPUT, **GREEDY)
    assert got.output_text == theirs.text
    assert (got.status, got.model, got.object) == ("completed", NAME, "response")
    assert got.usage is not None
    assert (got.usage.input_tokens, got.usage.output_tokens) == (
        theirs.n_prompt_tokens,
        len(theirs.tokens),
    )
    raw = served.post({"input": INPUT, **GREEDY}, "/v1/responses").json()
    Response.model_validate(raw)
    assert raw["cmg"]["n_changed"] == theirs.n_changed


def test_events_add_up_to_the_response(served: Served, client: openai.OpenAI) -> None:
    theirs = alone(served)
    events = list(client.responses.create(input=INPUT, stream=True, **GREEDY))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == theirs.text
    assert len(deltas) > 3
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == theirs.text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_each_event_is_named_by_its_type_and_valid(served: Served) -> None:
    body = {"input": INPUT, **GREEDY, "stream": True, "include": ["message.output_text.logprobs"]}
    with served.client() as http, http.stream("POST", "/v1/responses", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if "data: " in block]
    for named, data in blocks:
        event = json.loads(data.removeprefix("data: "))
        EVENT.validate_python(event)
        assert named == f"event: {event['type']}"
    assert event["response"]["output"][0]["content"][0]["logprobs"]


def test_the_clients_own_stream_helper_accumulates(served: Served, client: openai.OpenAI) -> None:
    with client.responses.stream(input=INPUT, **GREEDY) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == alone(served).text


def test_a_conversation_goes_on_from_the_items_that_came(
    served: Served, client: openai.OpenAI
) -> None:
    first = client.responses.create(input=INPUT, **GREEDY)
    more = [*INPUT, *(item.model_dump() for item in first.output)]
    more.append({"role": "user", "content": "Is there a fork?"})
    got = client.responses.create(input=more, **GREEDY)
    said = {"role": "assistant", "content": first.output_text}
    asked = [*INPUT, said, {"role": "user", "content": "Is there a fork?"}]
    theirs = served.vlm.generate(asked, guidance=embedded_guidance(), max_tokens=64)
    assert got.output_text == theirs.text


def test_instructions_guidance_and_limits_reach_the_model(
    served: Served, client: openai.OpenAI
) -> None:
    got = client.responses.create(
        input=INPUT, **{**GREEDY, "max_output_tokens": 3}, extra_body={"cmg": "off"}
    )
    theirs = alone(served, PLAIN, max_tokens=3)
    assert got.output_text == theirs.text
    assert got.status == "incomplete"
    assert got.incomplete_details is not None
    assert got.incomplete_details.reason == "max_output_tokens"
    got = client.responses.create(input=QUESTION, instructions="Be brief.", **GREEDY)
    system = {"role": "system", "content": "Be brief."}
    asked = [system, {"role": "user", "content": QUESTION}]
    assert got.output_text == served.vlm.generate(asked, max_tokens=64).text
    assert got.instructions == "Be brief."


def test_a_schema_is_kept_to(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    got = client.responses.create(input=INPUT, text=form, **{**GREEDY, "max_output_tokens": 64})
    assert set(json.loads(got.output_text)) == {"n"}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "input"),
        ({"input": 7}, "input"),
        ({"text": {"format": {"type": "xml"}}}, "response_format"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 7.0}, "top_p"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"cmg": {"alpha": -1}}, "cmg"),
        ({"input": None}, "input"),
    ],
)
def test_what_is_not_supported_or_wrong_is_told(
    served: Served, given: dict[str, Any], param: str
) -> None:
    got = served.post({"input": QUESTION, **GREEDY, **given}, "/v1/responses")
    assert got.status_code == 400
    error = got.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize("store", [True, False])
def test_storing_is_taken_and_told_as_not_done(served: Served, store: bool) -> None:
    got = served.post({"input": QUESTION, **GREEDY, "store": store}, "/v1/responses").json()
    assert got["store"] is False
    with served.client() as http:
        assert http.get(f"/v1/responses/{got['id']}").status_code == 404


def test_a_file_is_no_picture_of_a_response(served: Served) -> None:
    part = {"type": "input_image", "image_url": "file:///etc/passwd"}
    body = {"input": [{"role": "user", "content": [part]}], **GREEDY}
    error = served.post(body, "/v1/responses").json()["error"]
    assert "the picture cannot be had" in error["message"]


def test_a_client_that_leaves_frees_its_place(served: Served) -> None:
    body = {"input": "Count.", "max_output_tokens": 500, "stream": True}
    with served.client() as http, http.stream("POST", "/v1/responses", json=body) as response:
        next(response.iter_lines())
    assert served.wait(lambda: served.is_idle)
