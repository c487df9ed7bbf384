"""OpenAI's responses in terms of chat completions: pure functions, both ways. Nothing is stored.

    messages = messages_of("What is it?", instructions="Be brief.")
    request_of(messages, **settings_of(max_output_tokens=64, text={"format": {"type": "text"}}))

    answer = Answering(head, token_bytes)             # head: see `head_of`
    answer.whole(reply)                               # a response
    [*answer.begun(), *answer.said(piece), ..., *answer.ended(reply)]    # or its events

A response is `output`, a list of items: what the model thought, if it did, and what it says.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cmg_gguf.chat.completion import TokenBytes, cmg_block, token_logprobs, usage
from cmg_gguf.errors import PromptError, SamplingError, shown
from cmg_gguf.reply import Piece, Reply, Token
from cmg_gguf.request import Request

LOGPROBS = "message.output_text.logprobs"
"""What `include` names for log-probabilities."""
_PARTS = {"reasoning": "reasoning_text", "message": "output_text"}

Kind = Literal["reasoning", "message"]
Event = dict[str, Any]


def messages_of(given: str | Sequence[object], instructions: str | None) -> list[dict[str, Any]]:
    """The messages of `input`: a question, or items. What was thought goes with the assistant's
    message behind it, where templates look for it.

    Raises PromptError for an item that is no message and nothing thought.
    """
    messages = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    thought = ""
    for i, item in enumerate(given):
        if not isinstance(item, Mapping):
            raise PromptError(f"input {i} is {shown(item)}: it must be an object")
        kind = item.get("type", "message")
        if kind == "reasoning":
            thought = _thought(item)
        elif kind == "message":
            messages.append(_message(item, thought))
            thought = ""
        else:
            raise PromptError(
                f"input {i} has the type {shown(kind)}: there are no tools and nothing is stored "
                "here; give messages, and reasoning as it was answered"
            )
    return messages


def settings_of(
    *,
    max_output_tokens: int | None = None,
    text: Mapping[str, Any] | None = None,
    reasoning: Mapping[str, Any] | None = None,
    include: Sequence[str] = (),
    top_logprobs: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **same: Any,
) -> dict[str, Any]:
    """Settings of `cmg_gguf.chat.completion.request_of`; what is None is left out. same: those that
    have the same name there.

    Log-probabilities are those that `include` or `top_logprobs` asks for. Raises SamplingError for
    a text format that is none.
    """
    wanted = LOGPROBS in include or bool(top_logprobs)
    settings = {
        **same,
        "max_tokens": max_output_tokens,
        "response_format": _response_format(text),
        "logprobs": wanted or None,
        "top_logprobs": top_logprobs,
        "chat_template_kwargs": {**_thinking(reasoning), **(chat_template_kwargs or {})} or None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def head_of(request: Request, model: str, **echoed: Any) -> dict[str, Any]:
    """What a response says of its request. echoed: fields that are told as they were asked:
    instructions, metadata, text, reasoning."""
    sampling = request.sampling
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "instructions": echoed.get("instructions"),
        "metadata": echoed.get("metadata") or {},
        "text": {"format": {"type": "text"}, **(echoed.get("text") or {})},
        "reasoning": {"effort": None, "summary": None, **(echoed.get("reasoning") or {})},
        "max_output_tokens": request.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_logprobs": request.top_logprobs or 0,
        "background": False,
        "store": False,
        "truncation": "disabled",
        "previous_response_id": None,
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
    }


class Answering:
    """Makes one response, whole or as events."""

    def __init__(self, head: Mapping[str, Any], token_bytes: TokenBytes) -> None:
        self._head, self._token_bytes = head, token_bytes
        self._n_events = 0
        self._done: list[dict[str, Any]] = []
        self._kind: Kind | None = None
        self._id, self._text = "", ""
        self._tokens: list[Token] = []

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The response of a reply."""
        thought, said, status = reply.reasoning, reply.text, _status(reply)
        if thought:
            self._open("reasoning")
            self._close(thought, "completed" if said else status)
        if said or not thought:
            self._open("message")
            self._tokens = list(reply.tokens[reply.n_reasoning_tokens :])
            self._close(said, status)
        return self._response(status, reply)

    def begun(self) -> list[Event]:
        """That it is under way."""
        response = self._response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def said(self, piece: Piece) -> list[Event]:
        """Some of what is thought or said."""
        kind: Kind = "reasoning" if piece.reasoning else "message"
        events = []
        if self._kind not in (None, kind):
            events += self._closing()
        if self._kind is None:
            events += self._opening(kind)
        self._text += piece.text
        self._tokens += piece.tokens
        more: dict[str, Any] = {"delta": piece.text}
        if kind == "message":
            more["logprobs"] = self._logprobs(piece.tokens)
        return [*events, self._part_event(f"response.{_PARTS[kind]}.delta", **more)]

    def ended(self, reply: Reply) -> list[Event]:
        """How it ended, and the whole of it."""
        events, status = [], _status(reply)
        if self._kind is None and not self._done:
            events += self._opening("message")
        if self._kind is not None:
            events += self._closing(status)
        response = self._response(status, reply)
        return [*events, self._event(f"response.{status}", response=response)]

    def failed(self, message: str) -> list[Event]:
        """That it broke off."""
        error = {"code": "server_error", "message": message}
        response = {**self._response("failed"), "error": error}
        return [self._event("response.failed", response=response)]

    def _opening(self, kind: Kind) -> list[Event]:
        self._open(kind)
        item = self._item("in_progress", [])
        return [
            self._event("response.output_item.added", output_index=len(self._done), item=item),
            self._part_event("response.content_part.added", part=self._part("")),
        ]

    def _closing(self, status: str = "completed") -> list[Event]:
        kind, text, index = self._kind, self._text, len(self._done)
        assert kind is not None
        logprobs = {"logprobs": self._logprobs(self._tokens)} if kind == "message" else {}
        ends = [
            self._part_event(f"response.{_PARTS[kind]}.done", text=text, **logprobs),
            self._part_event("response.content_part.done", part=self._part(text)),
        ]
        item = self._close(text, status)
        return [*ends, self._event("response.output_item.done", output_index=index, item=item)]

    def _open(self, kind: Kind) -> None:
        self._kind, self._text, self._tokens = kind, "", []
        self._id = f"{'rs' if kind == 'reasoning' else 'msg'}_{uuid.uuid4().hex}"

    def _close(self, text: str, status: str = "completed") -> dict[str, Any]:
        item = self._item(status, [self._part(text)])
        self._done.append(item)
        self._kind = None
        return item

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        is_message = self._kind == "message"
        own: dict[str, Any] = {"role": "assistant"} if is_message else {"summary": []}
        return {"id": self._id, "type": self._kind, **own, "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        if self._kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = self._logprobs(self._tokens if text else ())
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _logprobs(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        return token_logprobs(tokens, self._token_bytes) or []

    def _event(self, kind: str, **more: Any) -> Event:
        self._n_events += 1
        return {"type": kind, "sequence_number": self._n_events - 1, **more}

    def _part_event(self, kind: str, **more: Any) -> Event:
        where = {"item_id": self._id, "output_index": len(self._done), "content_index": 0}
        return self._event(kind, **where, **more)

    def _response(self, status: str, reply: Reply | None = None) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "output": list(self._done),
            "usage": None if reply is None else _usage(reply),
            **({} if reply is None else {"cmg": cmg_block(reply, self._token_bytes)}),
        }


def _message(item: Mapping[str, Any], thought: str) -> dict[str, Any]:
    message = {name: item.get(name) for name in ("role", "content")}
    if thought and item.get("role") == "assistant":
        message["reasoning_content"] = thought
    return message


def _thought(item: Mapping[str, Any]) -> str:
    """What a reasoning item says; "" where it is a summary, or sealed."""
    content = item.get("content")
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return "".join(text for text in texts if isinstance(text, str))


def _response_format(text: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The `response_format` of a text's format, which is the same but for one level."""
    given = None if text is None else text.get("format")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise SamplingError(f'text.format={shown(given)} is no object; write {{"type": "text"}}')
    if given.get("type") != "json_schema":
        return given
    if given.get("schema") is None:
        raise SamplingError("text.format json_schema has no schema; give one")
    return {"type": "json_schema", "json_schema": {"name": "answer", **given}}


def _thinking(reasoning: Mapping[str, Any] | None) -> dict[str, Any]:
    """What templates read: Qwen's and others' `enable_thinking`, gpt-oss's `reasoning_effort`."""
    effort = None if reasoning is None else reasoning.get("effort")
    if effort is None:
        return {}
    return {"enable_thinking": effort != "none", "reasoning_effort": effort}


def _status(reply: Reply) -> str:
    return "incomplete" if reply.finish_reason == "length" else "completed"


def _usage(reply: Reply) -> dict[str, Any]:
    counts = usage(reply)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": reply.n_reused_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reply.n_reasoning_tokens},
        "total_tokens": counts["total_tokens"],
    }
