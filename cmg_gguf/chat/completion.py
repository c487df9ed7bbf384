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
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cmg_gguf.answer.generate import Reply, Token
from cmg_gguf.errors import PromptError, SamplingError, UnsupportedError
from cmg_gguf.guidance import Guidance
from cmg_gguf.sampling import LogitsProcessor, Sampling, grammar_for

if TYPE_CHECKING:
    from cmg_gguf.answer.stream import Progress, Stream
    from cmg_gguf.llama.model import Model
    from cmg_gguf.vlm import GuidedVLM

MAX_TOP_LOGPROBS = 100
MIN_LOGPROB = -9999.0
"""Stands for -inf, which JSON has not: what a grammar or bias forced past the plausibility cut."""


def create_chat_completion(
    vlm: GuidedVLM,
    messages: Sequence[Mapping[str, Any]],
    *,
    guidance: Guidance | None = None,
    temperature: float = 0.2,
    top_p: float = 0.95,
    top_k: int = 40,
    min_p: float = 0.05,
    typical_p: float = 1.0,
    stream: bool = False,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    response_format: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repeat_penalty: float = 1.0,
    mirostat_mode: int = 0,
    mirostat_tau: float = 5.0,
    mirostat_eta: float = 0.1,
    model: str | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    grammar: Any = None,
    logit_bias: Mapping[Any, float] | None = None,
    logprobs: bool | None = None,
    top_logprobs: int | None = None,
    progress: Progress | None = None,
    **unsupported: Any,
) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """A chat completion, or an iterator of its chunks with stream=True.

    Takes what `llama_cpp.Llama.create_chat_completion` takes, with the same defaults; `guidance`
    and `progress` are ours. grammar: a `LlamaGrammar` or GBNF text. max_tokens: None or <= 0 =
    until the context is full. logprobs: of the guided distribution, before the other samplers.

    Tools, functions and tail-free sampling are not supported: UnsupportedError, unless left at
    their default. Otherwise raises what `GuidedVLM.stream` raises.
    """
    _refuse(unsupported)
    sampling = Sampling(
        temperature=max(temperature, 0.0),
        top_k=max(top_k, 0),
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repeat_penalty=repeat_penalty,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        mirostat_mode=mirostat_mode,
        mirostat_tau=mirostat_tau,
        mirostat_eta=mirostat_eta,
        logit_bias=_bias(logit_bias),
        grammar=_grammar(grammar, response_format),
        seed=None if seed == -1 else seed,
    )
    answer = vlm.stream(
        messages,
        guidance=guidance,
        sampling=sampling,
        max_tokens=max_tokens if max_tokens is not None and max_tokens > 0 else None,
        stop=stop or (),
        top_logprobs=_top_logprobs(logprobs, top_logprobs),
        logits_processors=logits_processor or (),
        progress=progress,
    )
    head = {
        "id": f"chatcmpl-{uuid.uuid4()}",
        "created": int(time.time()),
        "model": model if model is not None else str(vlm.model.path),
    }
    if stream:
        return _chunks(answer, vlm.model, head)
    for _ in answer:
        pass
    return _completion(answer.reply, vlm.model, head)


def cmg_block(reply: Reply, model: Model) -> dict[str, Any]:
    """What guidance did, JSON-ready; `changed`: the tokens that plain decoding would not draw."""
    return {
        "guided": bool(reply.layers),
        "alpha": reply.guidance.alpha,
        "beta": reply.guidance.beta,
        "scope": reply.guidance.scope,
        "refresh": reply.guidance.refresh,
        "layers": list(reply.layers),
        "n_image_tokens": reply.n_image_tokens,
        "n_changed": reply.n_changed,
        "changed": [
            {"index": i, "token": token.text, "plain": _text(model, token.plain)}
            for i, token in enumerate(reply.tokens)
            if token.changed
        ],
        "seed": reply.seed,
        "seconds": {
            "encode": reply.seconds.encode,
            "prefill": reply.seconds.prefill,
            "decode": reply.seconds.decode,
        },
    }


def _completion(reply: Reply, model: Model, head: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": head["id"],
        "object": "chat.completion",
        "created": head["created"],
        "model": head["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": reply.text},
                "logprobs": _logprobs(reply.tokens, model),
                "finish_reason": reply.finish_reason,
            }
        ],
        "usage": usage(reply),
        "cmg": cmg_block(reply, model),
    }


def _chunks(answer: Stream, model: Model, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    def chunk(delta: dict[str, str], finish: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": more.pop("logprobs", None),
            "finish_reason": finish,
        }
        return {**head, "object": "chat.completion.chunk", "choices": [choice], **more}

    with contextlib.closing(answer):
        yield chunk({"role": "assistant"})
        for piece in answer:
            yield chunk({"content": piece.text}, logprobs=_logprobs(piece.tokens, model))
    reply = answer.reply
    yield chunk({}, reply.finish_reason, usage=usage(reply), cmg=cmg_block(reply, model))


def usage(reply: Reply) -> dict[str, Any]:
    """Counts as OpenAI names them; `cached_tokens`: of the prompt, those not computed anew."""
    n = len(reply.tokens)
    return {
        "prompt_tokens": reply.n_prompt_tokens,
        "completion_tokens": n,
        "total_tokens": reply.n_prompt_tokens + n,
        "prompt_tokens_details": {"cached_tokens": reply.n_reused_tokens},
    }


def _logprobs(tokens: Sequence[Token], model: Model) -> dict[str, Any] | None:
    if not tokens or tokens[0].logprob is None:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = model.token_bytes(token)
        return {
            "token": data.decode("utf-8", "replace"),
            "bytes": list(data),
            "logprob": max(logprob, MIN_LOGPROB),
        }

    content = [
        {**entry(t.id, t.logprob or 0.0), "top_logprobs": [entry(*best) for best in t.top]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def _text(model: Model, token: int) -> str:
    return model.token_bytes(token).decode("utf-8", "replace")


def _refuse(unsupported: dict[str, Any]) -> None:
    neutral: dict[str, Any] = {"tfs_z": 1.0, "tool_choice": "none"}
    for name, value in unsupported.items():
        known = name in ("tfs_z", "functions", "function_call", "tools", "tool_choice")
        if not known:
            raise TypeError(f"create_chat_completion() got an unexpected keyword argument {name!r}")
        if value is not None and value != neutral.get(name):
            raise UnsupportedError(f"{name}={value!r} is not supported here; leave it out")


def _top_logprobs(logprobs: bool | None, top_logprobs: int | None) -> int | None:
    if not logprobs:
        return None
    count = top_logprobs or 0
    if not 0 <= count <= MAX_TOP_LOGPROBS:
        raise SamplingError(f"top_logprobs={count} is out of range: 0 to {MAX_TOP_LOGPROBS}")
    return count


def _bias(logit_bias: Mapping[Any, float] | None) -> dict[int, float]:
    try:
        return {int(token): float(value) for token, value in (logit_bias or {}).items()}
    except (TypeError, ValueError, OverflowError) as exc:
        raise SamplingError(f"logit_bias maps token numbers to numbers: {exc}") from exc


def _grammar(grammar: Any, response_format: Mapping[str, Any] | None) -> str | None:
    wanted = grammar_for(response_format)
    if grammar is None:
        return wanted
    if wanted is not None:
        raise PromptError("give either a grammar or a response_format, not both")
    return grammar if isinstance(grammar, str) else str(grammar._grammar)
