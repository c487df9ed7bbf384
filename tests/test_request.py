"""What is asked: a value of a wrong type is told with what is right, and the remedy works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prompts import picture

import cmg_gguf
from cmg_gguf import CMGChatHandler, Contrast, Guidance, LayerSet, Request, Sampling
from cmg_gguf.chat.completion import request_of
from cmg_gguf.errors import CMGError, GuidanceError, PromptError, SamplingError
from cmg_gguf.settings import Settings

QUESTION = "What is there?"
TURN = {"role": "user", "content": QUESTION}
WRONG: list[tuple[dict[str, Any], type[CMGError], str]] = [
    ({"guidance": 1.0}, GuidanceError, "guidance=1.0 is no Guidance; write Guidance(alpha=1.0)"),
    ({"guidance": 2}, GuidanceError, "write Guidance(alpha=2)"),
    ({"guidance": 1000}, GuidanceError, "guidance=1000 is no Guidance; write Guidance(alpha=1.0)"),
    ({"guidance": {"alpha": 3.0, "scope": "all"}}, GuidanceError, "(alpha=3.0, scope='all')"),
    ({"guidance": {"strength": 3.0}}, GuidanceError, "write Guidance(alpha=1.0)"),
    ({"guidance": Settings(Guidance())}, GuidanceError, "write settings.guidance"),
    ({"guidance": False}, GuidanceError, "write Guidance(alpha=0.0, beta=0.0)"),
    ({"guidance": None}, GuidanceError, "guidance=None is no Guidance"),
    ({"sampling": 0.5}, SamplingError, "is no Sampling; write Sampling(temperature=0.5)"),
    ({"sampling": {"top_k": 5}}, SamplingError, "write Sampling(top_k=5)"),
    ({"sampling": "greedy"}, SamplingError, "write Sampling(temperature=1.0)"),
    ({"contrast": QUESTION}, PromptError, "is no Contrast; write Contrast(prompt, images)"),
    ({"logits_processors": print}, SamplingError, "is no list; write [process]"),
    ({"logits_processors": 3}, SamplingError, "logits_processors=3 is no list"),
    ({"logits_processors": [3]}, SamplingError, "logits processor 0 is 3: give a function"),
    ({"n_scores": -1}, SamplingError, "n_scores=-1 is out of range"),
    ({"salt": 3}, PromptError, "salt=3 is no string"),
    ({"raw": "no"}, PromptError, "raw='no'"),
    ({"max_tokens": "3"}, PromptError, "max_tokens='3' is out of range: whole numbers from 1"),
    ({"max_tokens": 2.5}, PromptError, "max_tokens=2.5"),
    ({"max_tokens": True}, PromptError, "max_tokens=True"),
    ({"top_logprobs": "3"}, SamplingError, "top_logprobs='3' is out of range: whole numbers"),
    ({"top_logprobs": 1.5}, SamplingError, "top_logprobs=1.5"),
    ({"stop": 3}, SamplingError, "stop=3 is neither a string nor a list"),
    ({"stop": b"END"}, SamplingError, "stop=b'END' is neither"),
    ({"stop": {"END": 1}}, SamplingError, "is neither a string nor a list"),
    ({"images": None}, PromptError, "images=None is no list; for no image leave it out"),
    ({"images": "kitchen.jpg"}, PromptError, "for one image write [image]"),
    ({"images": Path("kitchen.jpg")}, PromptError, "for one image write [image]"),
    ({"images": bytearray(b"image")}, PromptError, "for one image write [image]"),
    ({"images": memoryview(b"image")}, PromptError, "for one image write [image]"),
    ({"images": picture(0)}, PromptError, "for one image write [image]"),
    ({"images": Image.fromarray(picture(0))}, PromptError, "for one image write [image]"),
    ({"images": np.stack([picture(0)] * 2)}, PromptError, "write list(images)"),
    ({"images": iter([picture(0)])}, PromptError, "write list(images)"),
]


def refused(error: type[CMGError], make: Any, *given: Any, **settings: Any) -> str:
    with pytest.raises(error) as info:
        make(*given, **settings)
    line = str(info.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(("settings", "error", "says"), WRONG)
def test_a_setting_of_another_type_is_told_with_its_value_and_a_remedy(
    settings: dict[str, Any], error: type[CMGError], says: str
) -> None:
    assert says in refused(error, Request, QUESTION, **settings)


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({"guidance": 1.5}, Guidance(alpha=1.5)),
        ({"guidance": {"alpha": 3.0, "layers": [1, 2]}}, Guidance(alpha=3.0, layers=[1, 2])),
        ({"guidance": False}, Guidance(alpha=0.0, beta=0.0)),
        ({"sampling": 0.5}, Sampling(temperature=0.5)),
        ({"sampling": {"top_k": 5, "seed": 1}}, Sampling(top_k=5, seed=1)),
    ],
)
def test_what_a_remedy_says_to_write_is_what_was_meant(
    settings: dict[str, Any], meant: object
) -> None:
    line = refused(CMGError, Request, QUESTION, **settings)
    found = re.search(r"write (\w+\(.*\))$", line)
    assert found is not None
    written = eval(found[1], vars(cmg_gguf))
    assert written == meant
    Request(QUESTION, **dict.fromkeys(settings, written))


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (3, "the prompt is 3: give a question as a string, or a list of messages"),
        (None, "the prompt is None"),
        (b"What?", "the prompt is b'What?'"),
        (TURN, "is one message; write [message]"),
    ],
)
def test_a_prompt_of_another_type_is_told(prompt: Any, says: str) -> None:
    assert says in refused(PromptError, Request, prompt)
    assert says in refused(PromptError, Contrast, prompt)


def test_a_contrast_is_checked_like_a_request() -> None:
    images: Any = "kitchen.jpg"
    strength: Any = 1.0
    assert "[image]" in refused(PromptError, Contrast, QUESTION, images)
    line = refused(GuidanceError, Contrast, QUESTION, strength=strength)
    assert line.startswith("strength=1.0 is no function of the number of tokens said; write lambda")
    messages = refused(PromptError, Request, QUESTION, contrast=Contrast([TURN]), raw=True)
    assert "raw=True takes the prompt as one text" in messages


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"guidance": 1.0}, GuidanceError, "write Guidance(alpha=1.0)"),
        ({"max_tokens": "3"}, PromptError, "max_tokens='3'"),
        ({"logprobs": True, "top_logprobs": "3"}, SamplingError, "top_logprobs='3'"),
        ({"logits_processor": print}, SamplingError, "write [process]"),
        ({"temperature": "0"}, SamplingError, "temperature='0'"),
        ({"top_k": "5"}, SamplingError, "top_k='5'"),
        ({"logit_bias": 5}, SamplingError, "logit_bias=5 does not map token numbers"),
        ({"grammar": 5}, SamplingError, "the grammar is 5"),
        ({"response_format": "json"}, SamplingError, "response_format='json' is no mapping"),
    ],
)
def test_a_chat_completion_tells_wrong_types_likewise(
    settings: dict[str, Any], error: type[CMGError], says: str
) -> None:
    assert says in refused(error, request_of, [TURN], **settings)


def test_a_handler_tells_wrong_guidance_when_it_is_made() -> None:
    line = refused(GuidanceError, CMGChatHandler, "mmproj.gguf", guidance=1.0)
    assert "write Guidance(alpha=1.0)" in line


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"logit_bias": [5]}, "logit_bias=[5] does not map token numbers to numbers; write {5:"),
        ({"logit_bias": {"cat": 1.0}}, "logit_bias names token 'cat': write a whole number"),
        ({"logit_bias": {5: "much"}}, "logit_bias of token 5 is 'much'"),
        ({"response_format": 3}, "response_format=3 is no mapping"),
        ({"response_format": {"type": "json_schema", "json_schema": 3}}, "json_schema.schema"),
    ],
)
def test_sampling_tells_wrong_types_too(settings: dict[str, Any], says: str) -> None:
    assert says in refused(SamplingError, Sampling, **settings)


def test_a_layer_alone_is_no_set_of_layers() -> None:
    layers: Any = 3
    assert "layers=3 is no list; write LayerSet((3,))" in refused(GuidanceError, LayerSet, layers)


def test_numbers_and_lists_of_other_kinds_are_numbers_and_lists() -> None:
    settings: dict[str, Any] = {
        "max_tokens": np.int32(3),
        "stop": {"END"},
        "logits_processors": (print,),
    }
    request = Request(QUESTION, (picture(0),), **settings)
    assert request.stop == ("END",)
    assert request.max_tokens == 3
