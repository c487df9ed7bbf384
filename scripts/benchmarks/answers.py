"""What whole requests cost: chat completions of one word about a picture, plain and guided.

Nothing is kept from one request to the next, but where six questions are asked about one picture:
that is what keeping is for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import Llava15ChatHandler

from benchmarks.ratios import Times, in_turns
from benchmarks.subjects import N_QUESTIONS, Messages, Subject
from cmg_gguf import Guidance, GuidedVLM
from cmg_gguf.guidance import PLAIN

GUIDED = Guidance()
ONE_WORD: dict[str, Any] = {"temperature": 0.0, "max_tokens": 2}
"""The word and what ends it."""
KEEPS_NOTHING: dict[str, Any] = {"prefix_cells": 0, "image_cache_bytes": 0}

Report = Callable[[], None]


def measure_requests(
    llama: llama_cpp.Llama, subject: Subject, use_gpu: bool, n_rounds: int, report: Report
) -> Times:
    """Milliseconds of a request: plain, guided, and guided in two contexts with a prefill each."""
    mmproj, kept = subject.pair.mmproj, {**KEEPS_NOTHING, "use_gpu": use_gpu}
    with (
        GuidedVLM.from_llama(llama, mmproj, **kept) as pair,
        GuidedVLM.from_llama(llama, mmproj, pairing="contexts", **kept) as contexts,
    ):
        messages = subject.messages()
        _ask(pair, messages, GUIDED)  # what is done once, as settling the strategy, is done here
        return in_turns(
            {
                "request, plain": lambda: _ask(pair, messages, PLAIN),
                "request, guided": lambda: _ask(pair, messages, GUIDED),
                "request, two contexts": lambda: _ask(contexts, messages, GUIDED),
            },
            n_rounds,
            report,
        )


def measure_questions(
    llama: llama_cpp.Llama, subject: Subject, use_gpu: bool, n_rounds: int, report: Report
) -> Times:
    """Milliseconds of six questions about a picture: guided, and by llama-cpp-python's handler."""
    asked = [subject.messages(i) for i in range(N_QUESTIONS)]
    handler = Llava15ChatHandler(str(subject.pair.mmproj), verbose=False)

    def by_handler() -> None:
        for messages in asked:
            handler(llama=llama, messages=messages, **ONE_WORD)

    with GuidedVLM.from_llama(llama, subject.pair.mmproj, use_gpu=use_gpu) as vlm:

        def guided() -> None:
            vlm.forget()
            for messages in asked:
                _ask(vlm, messages, GUIDED)

        return in_turns(
            {"six questions, llama_cpp.Llama": by_handler, "six questions, guided": guided},
            n_rounds,
            report,
        )


def _ask(vlm: GuidedVLM, messages: Messages, guidance: Guidance) -> None:
    vlm.create_chat_completion(messages, guidance=guidance, **ONE_WORD)
