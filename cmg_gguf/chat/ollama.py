"""Ollama's chat and generate in terms of chat completions: pure functions, both ways.

    messages = prompt_messages("What is it?", system=None, images=["iVBORw0KGgo..."])
    request_of(messages, **settings_of({"num_predict": 64, "top_k": 20}, format="json"))

    lines = Lines("generate", "llava:latest", token_bytes)
    [*map(lines.said, pieces), lines.last(reply)]      # a stream: one object a line

{"model": "llava:latest", "created_at": "2025-01-01T00:00:00.000000Z", "response": "A fork.",
 "done": true, "done_reason": "stop", "total_duration": 512000000, ..., "cmg": {...}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Literal

from cmg_gguf.chat.completion import TokenBytes, cmg_block, token_logprobs
from cmg_gguf.errors import SamplingError, shown
from cmg_gguf.reply import Piece, Reply, Token

Kind = Literal["chat", "generate"]

OPTIONS = {
    "num_predict": "max_tokens",
    "repeat_last_n": "penalty_last_n",
    "mirostat": "mirostat_mode",
    **{
        name: name
        for name in (
            *("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop"),
            *("repeat_penalty", "presence_penalty", "frequency_penalty"),
            *("mirostat_tau", "mirostat_eta"),
        )
    },
}
"""Ollama's options that say how a token is drawn, and what `request_of` calls them. The others say
how a model is loaded (`num_ctx`, `num_gpu`...), which it is already."""

THINKING = ("low", "medium", "high", "max")
"""How much a model may think, where its template reads that."""


def settings_of(
    options: Mapping[str, Any],
    *,
    format: object = None,
    think: bool | str | None = None,
    logprobs: bool | None = None,
    top_logprobs: int | None = None,
) -> dict[str, Any]:
    """Settings of `cmg_gguf.chat.completion.request_of`. An option that is None is left out.

    format: "json", or a JSON schema. think: whether, or how much; for templates that read it.
    Raises SamplingError for another format or way to think.
    """
    known = {OPTIONS[k]: v for k, v in options.items() if k in OPTIONS and v is not None}
    more = {
        "response_format": _response_format(format),
        "chat_template_kwargs": _template_variables(think),
        "logprobs": logprobs,
        "top_logprobs": top_logprobs,
    }
    return {**known, **{name: value for name, value in more.items() if value is not None}}


def prompt_messages(
    prompt: str, *, system: str | None = None, images: Sequence[Any] | None = None
) -> list[dict[str, Any]]:
    """The messages of a prompt for generate."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt, **({"images": images} if images else {})}]


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a chat: what was thought is where templates look for it, and a message that
    is pictures alone has a content."""
    return [
        {
            "content": "",
            **{"reasoning_content" if k == "thinking" else k: v for k, v in message.items()},
        }
        for message in messages
    ]


class Lines:
    """Makes the objects of one answer. model: its name, as the client gave it."""

    def __init__(self, kind: Kind, model: str, token_bytes: TokenBytes) -> None:
        self._kind, self._model, self._token_bytes = kind, model, token_bytes

    def said(self, piece: Piece) -> dict[str, Any]:
        """Some of the answer, or of what is thought before it."""
        text, thought = ("", piece.text) if piece.reasoning else (piece.text, "")
        return self._line(text, thought, piece.tokens, done=False)

    def last(self, reply: Reply) -> dict[str, Any]:
        """How it ended, what it took, and what guidance did."""
        return {**self._line("", "", (), done=True), **self._account(reply)}

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The answer at once."""
        line = self._line(reply.text, reply.reasoning, reply.tokens, done=True)
        return {**line, **self._account(reply)}

    def loaded(self) -> dict[str, Any]:
        """The answer to a request that asks nothing: the model is there."""
        return {**self._line("", "", (), done=True), "done_reason": "load"}

    def _line(
        self, text: str, thought: str, tokens: Sequence[Token], *, done: bool
    ) -> dict[str, Any]:
        thinking = {"thinking": thought} if thought else {}
        if self._kind == "chat":
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text, **thinking}}
        else:
            said = {"response": text, **thinking}
        logprobs = token_logprobs(tokens, self._token_bytes)
        return {
            "model": self._model,
            "created_at": timestamp(datetime.now(timezone.utc)),
            **said,
            **({} if logprobs is None else {"logprobs": logprobs}),
            "done": done,
        }

    def _account(self, reply: Reply) -> dict[str, Any]:
        """Durations are whole nanoseconds, at least 1: clients divide by them."""
        seconds = reply.seconds
        prompt, answer = (
            _nanoseconds(seconds.encode + seconds.prefill),
            _nanoseconds(seconds.decode),
        )
        return {
            "done_reason": reply.finish_reason,
            "total_duration": prompt + answer,
            "load_duration": 0,
            "prompt_eval_count": reply.n_prompt_tokens,
            "prompt_eval_duration": prompt,
            "eval_count": len(reply.tokens),
            "eval_duration": answer,
            "cmg": cmg_block(reply, self._token_bytes),
        }


def timestamp(time: datetime) -> str:
    """A time as Ollama writes it. time: UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _nanoseconds(seconds: float) -> int:
    return max(1, round(seconds * 1e9))


def _response_format(format: object) -> dict[str, Any] | None:
    if format is None or format == "":
        return None
    if format == "json":
        return {"type": "json_object"}
    if isinstance(format, Mapping):
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": dict(format)}}
    raise SamplingError(f'format={shown(format)} is none: write "json", or give a JSON schema')


def _template_variables(think: bool | str | None) -> dict[str, Any] | None:
    """What templates read: Qwen's and others' `enable_thinking`, gpt-oss's `reasoning_effort`."""
    if think is None or isinstance(think, bool):
        return None if think is None else {"enable_thinking": think}
    if think not in THINKING:
        raise SamplingError(
            f"think={shown(think)} is unknown: true, false, or one of {', '.join(THINKING)}"
        )
    return {"enable_thinking": True, "reasoning_effort": think}
