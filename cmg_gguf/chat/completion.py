"""Chat completions in llama-cpp-python's shape (which is OpenAI's), plus a `cmg` block.

{"choices": [{"message": {"role": "assistant", "content": "..."}, "finish_reason": "stop", ...}],
 "usage": {...},
 "cmg": {"guided": true, "n_changed": 3, "changed": [{"index": 4, "token": ..., "plain": ...}],
         "layers": [...], "n_image_tokens": 576, "alpha": 1.0, "beta": 0.1, ...}}
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from numbers import Integral, Real
from typing import Any, Protocol, TypeGuard

from cmg_gguf.chat.heat import heat_block
from cmg_gguf.errors import PromptError, SamplingError, UnsupportedError, shown
from cmg_gguf.evidence import EvidenceModel
from cmg_gguf.guidance import Guidance
from cmg_gguf.reply import Piece, Reply, Token
from cmg_gguf.request import Messages, Request
from cmg_gguf.sampling import LogitsProcessor, Sampling
from cmg_gguf.settings import guidance_to_json

TokenBytes = Callable[[int], bytes]
"""The bytes of a token, possibly part of a character."""
MAX_TOP_LOGPROBS = 100
_CHOICES = ("none", "auto")
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "tfs_z": (1.0,),
    **dict.fromkeys(("tools", "functions"), ([], ())),
    **dict.fromkeys(("tool_choice", "function_call"), _CHOICES),
}
"""Settings that are not supported, and the values with which they do nothing."""
MIN_LOGPROB = -9999.0
"""Stands for -inf, which JSON has not: what a grammar or bias forced past the plausibility cut."""


class Pieces(Protocol):
    """An answer as it comes: see `cmg_gguf.stream.Stream`."""

    def __iter__(self) -> Iterator[Piece]: ...
    def close(self) -> None: ...
    @property
    def reply(self) -> Reply: ...


def request_of(
    messages: Messages,
    *,
    guidance: Guidance | None = None,
    evidence: bool | EvidenceModel | None = None,
    heat: bool | None = None,
    max_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    logprobs: bool | None = None,
    top_logprobs: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    cache_prompt: bool | None = None,
    **sampling: Any,
) -> Request:
    """The request of a chat completion.

    Takes what `llama_cpp.Llama.create_chat_completion` takes, with the same defaults; `guidance`,
    `evidence` and `heat` are ours, see `Request`. max_tokens: None or <= 0 = until the context is
    full. logprobs: of the guided distribution, before the other samplers. chat_template_kwargs: as
    in `Request`, and in llama-server. cache_prompt: False = nothing kept is gone on from, and the
    same request gives the same bits: `Request.repeatable`, which costs others their kept prompts.
    sampling: see `sampling_of`. Raises what it, `Request` and `Guidance` raise.
    """
    return Request(
        messages,
        guidance=guidance if guidance is not None else Guidance(),
        evidence=False if evidence is None else evidence,
        heat=False if heat is None else heat,
        sampling=sampling_of(**sampling),
        max_tokens=None if _is_number(max_tokens) and max_tokens <= 0 else max_tokens,
        stop=stop or (),
        top_logprobs=_top_logprobs(logprobs, top_logprobs),
        logits_processors=logits_processor or (),
        chat_template_kwargs={} if chat_template_kwargs is None else chat_template_kwargs,
        repeatable=_is_repeatable(cache_prompt),
    )


def sampling_of(
    *,
    temperature: float | None = 0.2,
    top_p: float | None = 0.95,
    top_k: int | None = 40,
    min_p: float | None = 0.05,
    typical_p: float | None = 1.0,
    seed: int | None = None,
    response_format: Mapping[str, Any] | None = None,
    presence_penalty: float | None = 0.0,
    frequency_penalty: float | None = 0.0,
    repeat_penalty: float | None = 1.0,
    penalty_last_n: int | None = None,
    mirostat_mode: int | None = 0,
    mirostat_tau: float | None = 5.0,
    mirostat_eta: float | None = 0.1,
    grammar: Any = None,
    logit_bias: Mapping[Any, float] | None = None,
    **unsupported: Any,
) -> Sampling:
    """The sampling of a chat completion, with llama-cpp-python's defaults, also for None.

    grammar: a `LlamaGrammar` or GBNF text. penalty_last_n: see `Sampling`. Tools, functions and
    tail-free sampling are not supported: UnsupportedError, unless they are none, or left to the
    model ("auto") with none. Raises what `Sampling` raises.
    """
    _refuse(unsupported)
    wanted: dict[str, Any] = {  # those that are None are left to `Sampling`
        "temperature": 0.2 if temperature is None else _not_negative(temperature),
        "top_k": _not_negative(top_k),
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "repeat_penalty": repeat_penalty,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "penalty_last_n": penalty_last_n,
        "mirostat_mode": mirostat_mode,
        "mirostat_tau": mirostat_tau,
        "mirostat_eta": mirostat_eta,
        "logit_bias": _bias(logit_bias),
        "grammar": _grammar(grammar),
        "response_format": response_format,
        "seed": seed,
    }
    return Sampling(**wanted)


def completion_of(reply: Reply, model: str, token_bytes: TokenBytes) -> dict[str, Any]:
    """A reply as a chat completion; `reasoning_content` is there where there was reasoning, as in
    llama-server. model: its name."""
    return {
        **_head(model),
        "object": "chat.completion",
        "choices": [_choice(reply, 0, token_bytes)],
        "usage": usage(reply),
        "cmg": cmg_block(reply, token_bytes),
    }


def completion_of_many(
    replies: Sequence[Reply], model: str, token_bytes: TokenBytes
) -> dict[str, Any]:
    """Several replies to one prompt as one chat completion, each choice with its own `cmg`."""
    choices = [
        {**_choice(reply, i, token_bytes), "cmg": cmg_block(reply, token_bytes)}
        for i, reply in enumerate(replies)
    ]
    head = {**_head(model), "object": "chat.completion"}
    return {**head, "choices": choices, "usage": usage(*replies)}


def chunks_of(answer: Pieces, model: str, token_bytes: TokenBytes) -> Iterator[dict[str, Any]]:
    """The chunks of a chat completion, as its pieces come. Closing it closes the answer."""
    chunks = Chunks(model, token_bytes)
    with contextlib.closing(answer):
        yield chunks.first()
        for piece in answer:
            yield chunks.said(piece)
    yield {**chunks.last(answer.reply), "usage": usage(answer.reply)}


class Chunks:
    """Makes the chunks of one chat completion. index: of the choice, where there are several."""

    def __init__(self, model: str, token_bytes: TokenBytes) -> None:
        self._head = {**_head(model), "object": "chat.completion.chunk"}
        self._token_bytes = token_bytes

    def first(self, index: int = 0) -> dict[str, Any]:
        """Who speaks."""
        return self._chunk(index, {"role": "assistant"})

    def said(self, piece: Piece, index: int = 0) -> dict[str, Any]:
        """Some of the answer, and the evidence of its tokens where that is known already."""
        said = "reasoning_content" if piece.reasoning else "content"
        logprobs = _logprobs(piece.tokens, self._token_bytes)
        chunk = self._chunk(index, {said: piece.text}, logprobs=logprobs)
        weighed = _evidence_of(piece.tokens)
        return {**chunk, "cmg": {"evidence": {"tokens": weighed}}} if weighed else chunk

    def last(self, reply: Reply, index: int = 0) -> dict[str, Any]:
        """How it ended, and what guidance did."""
        chunk = self._chunk(index, {}, finish=reply.finish_reason)
        return {**chunk, "cmg": cmg_block(reply, self._token_bytes)}

    def counts(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """What all of it took, behind the last choice's end: OpenAI's `include_usage`."""
        return {**self._head, "choices": [], "usage": usage(*replies)}

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        *,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "choices": [choice]}


def cmg_block(reply: Reply, token_bytes: TokenBytes) -> dict[str, Any]:
    """What guidance did, JSON-ready; `changed`: the tokens that plain decoding would not draw."""
    return {
        "guided": bool(reply.layers),
        "alpha": reply.guidance.alpha,
        "beta": reply.guidance.beta,
        "gate": guidance_to_json(reply.guidance).get("gate"),
        "scope": reply.guidance.scope,
        "refresh": reply.guidance.refresh,
        "states": reply.guidance.states,
        "layers": list(reply.layers),
        "n_image_tokens": reply.n_image_tokens,
        "mended": list(reply.mended),
        "n_changed": reply.n_changed,
        "changed": [
            {
                "index": i,
                "token": token.text,
                "plain": token_bytes(token.plain).decode("utf-8", "replace"),
            }
            for i, token in enumerate(reply.tokens)
            if token.changed
        ],
        **_evidence(reply),
        **({} if reply.heat is None else {"heat": heat_block(reply.heat)}),
        "seed": reply.seed,
        "seconds": {
            "encode": reply.seconds.encode,
            "prefill": reply.seconds.prefill,
            "decode": reply.seconds.decode,
        },
    }


def _evidence(reply: Reply) -> dict[str, Any]:
    """Where it was asked for: each word with its score, what each token is scored by, and what the
    weights were fitted on ("" = they were not, and scores are no probabilities)."""
    if reply.evidence is None:
        return {}
    words = [
        {"text": word.text, "start": word.start, "stop": word.stop, "score": word.evidence}
        for word in reply.words
    ]
    tokens, fitted_on = _evidence_of(reply.tokens), reply.evidence.fitted_on
    return {"evidence": {"fitted_on": fitted_on, "words": words, "tokens": tokens}}


def _evidence_of(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    return [
        {"token": token.text}
        | {name: max(value, MIN_LOGPROB) for name, value in asdict(token.evidence).items()}
        for token in tokens
        if token.evidence is not None
    ]


def usage(*replies: Reply) -> dict[str, Any]:
    """Counts as OpenAI names them, of one prompt and what was said to it; `cached_tokens`: of the
    prompt, those not computed anew; `reasoning_tokens`: of the answers, where there was any."""
    n_prompt = replies[0].n_prompt_tokens
    n = sum(len(reply.tokens) for reply in replies)
    n_thought = sum(reply.n_reasoning_tokens for reply in replies)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n,
        "total_tokens": n_prompt + n,
        "prompt_tokens_details": {"cached_tokens": replies[0].n_reused_tokens},
        **({"completion_tokens_details": {"reasoning_tokens": n_thought}} if n_thought else {}),
    }


def _choice(reply: Reply, index: int, token_bytes: TokenBytes) -> dict[str, Any]:
    message = {"role": "assistant", "content": reply.text}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(reply.tokens, token_bytes),
        "finish_reason": reply.finish_reason,
    }


def token_logprobs(tokens: Sequence[Token], token_bytes: TokenBytes) -> list[dict[str, Any]] | None:
    """Each token with its log-probability and the likeliest ones; None where none were asked
    for."""
    if not tokens or tokens[0].logprob is None:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(token)
        return {
            "token": _text(data),
            "bytes": list(data),
            "logprob": max(logprob, MIN_LOGPROB),
        }

    return [
        {**entry(t.id, t.logprob or 0.0), "top_logprobs": [entry(*best) for best in t.top]}
        for t in tokens
    ]


def _logprobs(tokens: Sequence[Token], token_bytes: TokenBytes) -> dict[str, Any] | None:
    content = token_logprobs(tokens, token_bytes)
    return None if content is None else {"content": content, "refusal": None}


def _head(model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4()}", "created": int(time.time()), "model": model}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _refuse(unsupported: dict[str, Any]) -> None:
    for name, value in unsupported.items():
        if name not in _WITHOUT_EFFECT:
            raise TypeError(f"create_chat_completion() got an unexpected keyword argument {name!r}")
        if value is not None and value not in _WITHOUT_EFFECT[name]:
            what = "tail-free sampling" if name == "tfs_z" else "calling of tools and functions"
            raise UnsupportedError(
                f"{name}={shown(value)} is not supported: there is no {what} here; leave it out"
            )


def _top_logprobs(logprobs: bool | None, top_logprobs: int | None) -> int | None:
    if logprobs is not None and not isinstance(logprobs, bool):
        raise SamplingError(
            f"logprobs={shown(logprobs)} is neither True nor False; write logprobs=True, and "
            "top_logprobs for how many"
        )
    count = 0 if top_logprobs is None else top_logprobs
    whole = isinstance(count, Integral) and not isinstance(count, bool)
    if not whole or not 0 <= count <= MAX_TOP_LOGPROBS:
        raise SamplingError(
            f"top_logprobs={shown(count)} is out of range: whole numbers from 0 to "
            f"{MAX_TOP_LOGPROBS}"
        )
    return count if logprobs else None


def _is_repeatable(cache_prompt: bool | None) -> bool:
    if cache_prompt is not None and not isinstance(cache_prompt, bool):
        raise PromptError(
            f"cache_prompt={shown(cache_prompt)} is neither True nor False; write one of them"
        )
    return cache_prompt is False


def _bias(logit_bias: Mapping[Any, float] | None) -> dict[int, float]:
    """With tokens as whole numbers: JSON's keys are texts. `Sampling` checks the rest."""
    if logit_bias is None:
        return {}
    try:
        return {
            int(token) if isinstance(token, str) else token: bias
            for token, bias in logit_bias.items()
        }
    except (AttributeError, TypeError, ValueError) as exc:
        raise SamplingError(
            f"logit_bias={shown(logit_bias)} does not map token numbers to numbers ({exc}); write "
            "{5: -1.0}"
        ) from exc


def _grammar(grammar: Any) -> Any:
    """The text of a `LlamaGrammar`; anything else as it is, for `Sampling` to check."""
    return getattr(grammar, "_grammar", grammar)


def _not_negative(value: Any) -> Any:
    return max(value, 0) if _is_number(value) else value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)
