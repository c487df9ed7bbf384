"""Requests as known clients send them: each is answered, and what it sends has its meaning.

Written from their sources: TagGUI's "Remote" captioner, lmms-eval's `openai` model, VLMEvalKit's
`GPT4V` wrapper, Open WebUI's streams.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from served import Served, data_url, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


def taggui() -> dict[str, Any]:
    """The question and the picture are two turns of the user; parameters are Transformers'."""
    return {
        "messages": [
            {"role": "system", "content": "You are an expert in image captioning."},
            {"role": "user", "content": "Describe the image in one sentence."},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": data_url(2)}}],
            },
        ],
        "model": "null",
        "min_new_tokens": 1,
        "max_new_tokens": 12,
        "max_completion_tokens": 12,
        "num_beams": 1,
        "length_penalty": 1.0,
        "do_sample": False,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "rep_pen": 1.0,
        "no_repeat_ngram_size": 3,
    }


def lmms_eval() -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": data_url(2)}}
    text = {"type": "text", "text": "Is there a fork in the image? Answer with yes or no."}
    return {
        "messages": [{"role": "user", "content": [image, text]}],
        "model": "any",
        "max_tokens": 12,
        "temperature": 0,
    }


def vlmevalkit() -> dict[str, Any]:
    url = data_url(2).replace("image/png", "image/jpeg")  # it says so whatever the picture is
    return {
        "model": "any",
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
                    {"type": "text", "text": "Is there a fork in the image?"},
                ],
            },
        ],
        "max_tokens": 12,
        "n": 1,
        "temperature": 0,
    }


def open_webui() -> dict[str, Any]:
    text = {"type": "text", "text": "Describe the image."}
    image = {"type": "image_url", "image_url": {"url": data_url(2)}}
    return {
        "stream": True,
        "model": "tiny-llava",
        "messages": [{"role": "user", "content": [text, image]}],
        "max_tokens": 12,
        "stream_options": {"include_usage": True},
        "metadata": {"chat_id": "local"},
        "user": {"name": "somebody", "id": "1"},
    }


@pytest.mark.parametrize("client", [taggui, lmms_eval, vlmevalkit])
def test_a_client_is_answered_about_its_picture(served: Served, client: Any) -> None:
    response = served.post(client())
    assert response.status_code == 200, response.text
    answer = response.json()
    choice = answer["choices"][0]
    assert isinstance(choice["message"]["content"], str)
    assert choice["message"]["content"]
    assert answer["usage"]["completion_tokens"] <= 12
    assert answer["cmg"]["n_image_tokens"] > 0
    assert answer["cmg"]["guided"] is True


def test_open_webui_gets_a_stream_with_counts(served: Served) -> None:
    lines = served.post(open_webui()).text.splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(one) for one in data[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] <= 12
    said = [c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]]
    assert "".join(said)
    assert chunks[-2]["cmg"]["n_image_tokens"] > 0
