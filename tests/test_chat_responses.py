"""OpenAI's responses as chat completions, and replies as responses: the `openai` package judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from answered import answer, token_bytes
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from cmg_gguf import PromptError, Reply, SamplingError
from cmg_gguf.chat.completion import cmg_block, request_of
from cmg_gguf.chat.responses import LOGPROBS, Answering, head_of, messages_of, settings_of
from cmg_gguf.prompt.messages import render_messages
from cmg_gguf.prompt.templates import ChatTemplate

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
THOUGHT = (1, 2, 3, 4)


def head(**settings: Any) -> dict[str, Any]:
    return head_of(request_of([], **settings), "tiny")


def events_of(pieces: Sequence[Any], reply: Reply, **settings: Any) -> list[dict[str, Any]]:
    answering = Answering(head(**settings), token_bytes)
    events = answering.begun()
    for piece in pieces:
        events += answering.said(piece)
    events += answering.ended(reply)
    for event in events:
        EVENT.validate_python(event)
    return events


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in ("id", "created_at")}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


CASES = [
    pytest.param(((), (6, 7, 8)), id="said"),
    pytest.param((THOUGHT, (6, 7, 8)), id="thought and said"),
    pytest.param((THOUGHT, ()), id="thought"),
    pytest.param(((), ()), id="nothing"),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("finish_reason", ["stop", "length"])
@pytest.mark.parametrize("logprobs", [False, True])
def test_events_end_in_the_whole_response(case: Any, finish_reason: Any, logprobs: bool) -> None:
    pieces, reply = answer(*case, finish_reason=finish_reason, logprobs=logprobs)
    whole = Answering(head(), token_bytes).whole(reply)
    Response.model_validate(whole)
    events = events_of(pieces, reply)
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    status = {"stop": "completed", "length": "incomplete"}[finish_reason]
    assert events[-1]["type"] == f"response.{status}"
    assert whole["status"] == whole["output"][-1]["status"] == status


@pytest.mark.parametrize("case", CASES)
def test_each_item_is_added_written_and_done(case: Any) -> None:
    events = events_of(*answer(*case, logprobs=True))
    for i, item in enumerate(events[-1]["response"]["output"]):
        mine = [event for event in events if event.get("output_index") == i]
        kind = item["content"][0]["type"]
        n_deltas = len(mine) - 5
        assert [event["type"].removeprefix("response.") for event in mine] == [
            "output_item.added",
            "content_part.added",
            *[f"{kind}.delta"] * n_deltas,
            f"{kind}.done",
            "content_part.done",
            "output_item.done",
        ]
        assert mine[0]["item"]["id"] == mine[-1]["item"]["id"] == item["id"]
        assert {event["item_id"] for event in mine[1:-1]} == {item["id"]}
        text = "".join(event["delta"] for event in mine[2 : 2 + n_deltas])
        assert text == mine[-3]["text"] == mine[-2]["part"]["text"] == item["content"][0]["text"]
        if kind == "output_text" and text:
            logprobs = [entry for event in mine[2 : 2 + n_deltas] for entry in event["logprobs"]]
            assert logprobs == mine[-3]["logprobs"] == item["content"][0]["logprobs"]
            assert [entry["token"] for entry in logprobs] == ["A ", "fork", "é"]


def test_a_response_has_its_request_the_counts_and_what_guidance_did() -> None:
    _, reply = answer(THOUGHT)
    told = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "text": {"format": {"type": "json_object"}},
        "reasoning": {"effort": "low"},
    }
    request = request_of([], temperature=0.5, top_p=0.75, max_tokens=9)
    whole = Answering(head_of(request, "tiny", **told), token_bytes).whole(reply)
    parsed = Response.model_validate(whole)
    assert (parsed.output_text, parsed.model, parsed.instructions) == (
        "A forké",
        "tiny",
        "Be brief.",
    )
    assert (parsed.temperature, parsed.top_p, parsed.max_output_tokens) == (0.5, 0.75, 9)
    assert parsed.metadata == {"a": "b"}
    assert whole["text"]["format"] == {"type": "json_object"}
    assert whole["reasoning"] == {"effort": "low", "summary": None}
    assert whole["store"] is False
    assert parsed.usage is not None
    assert (parsed.usage.input_tokens, parsed.usage.output_tokens) == (40, 9)
    assert parsed.usage.input_tokens_details.cached_tokens == 24
    assert parsed.usage.output_tokens_details.reasoning_tokens == 6
    assert whole["cmg"] == cmg_block(reply, token_bytes)


def test_an_answer_that_breaks_off_says_so() -> None:
    pieces, _ = answer()
    answering = Answering(head(), token_bytes)
    events = [*answering.begun(), *answering.said(pieces[0]), *answering.failed("decode failed")]
    parsed = [EVENT.validate_python(event) for event in events]
    assert parsed[-1].type == "response.failed"
    assert parsed[-1].response.error.message == "decode failed"
    assert parsed[-1].response.status == "failed"


def test_input_is_messages() -> None:
    assert messages_of("What?", None) == [{"role": "user", "content": "What?"}]
    picture = {"type": "input_image", "image_url": "data:,", "detail": "auto"}
    items = [
        {"role": "developer", "content": "In French."},
        {"role": "user", "content": [{"type": "input_text", "text": "What?"}, picture]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
            {"type": "reasoning_text", "text": "Hm."}
        ]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
            {"type": "output_text", "text": "Rouge.", "annotations": [], "logprobs": []}
        ]},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"},
        {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    messages = messages_of(items, "Be brief.")
    assert [message["role"] for message in messages] == [
        *("system", "developer", "user", "assistant", "user")
    ]
    assert messages[3]["reasoning_content"] == "Hm."
    assert "reasoning_content" not in messages[4]
    rendered = render_messages(messages, ChatTemplate.named("chatml"), marker="<image>")
    assert rendered.images == ["data:,"]
    assert "Rouge." in rendered.text


@pytest.mark.parametrize(
    ("item", "what"),
    [
        ("What?", "input 0 is 'What\\?'"),
        ({"type": "function_call", "name": "f"}, "input 0 has the type 'function_call'"),
        ({"type": "item_reference", "id": "msg_1"}, "input 0 has the type 'item_reference'"),
    ],
)
def test_items_that_are_no_messages_are_told(item: object, what: str) -> None:
    with pytest.raises(PromptError, match=what):
        messages_of([item], None)


def test_settings_reach_the_request() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    request = request_of(
        [],
        **settings_of(
            max_output_tokens=5,
            text={
                "format": {"type": "json_schema", "name": "it", "schema": schema, "strict": True}
            },
            reasoning={"effort": "none"},
            include=[LOGPROBS],
            chat_template_kwargs={"custom": 1},
            temperature=0.25,
            top_k=None,
        ),
    )
    assert (request.max_tokens, request.top_logprobs) == (5, 0)
    assert request.sampling.temperature == 0.25
    assert request.sampling.response_format is not None
    assert request.sampling.response_format["json_schema"]["schema"] == schema
    variables = {"enable_thinking": False, "reasoning_effort": "none", "custom": 1}
    assert request.chat_template_kwargs == variables
    assert settings_of() == {}
    assert settings_of(text={"verbosity": "low"}, reasoning={"summary": "auto"}) == {}
    assert settings_of(top_logprobs=3) == {"logprobs": True, "top_logprobs": 3}
    assert settings_of(text={"format": {"type": "text"}}) == {"response_format": {"type": "text"}}


@pytest.mark.parametrize(
    "given", ["json", {"type": "json_schema"}, {"type": "xml"}, {"schema": {}}, 7]
)
def test_a_text_format_that_is_none_is_told(given: object) -> None:
    with pytest.raises(SamplingError):
        request_of([], **settings_of(text={"format": given}))
