"""What the judge must know of an architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from judge_suite.checkpoint import Pixels

IMAGE = "<image>"
"""Stands for a picture in a family's questions."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """build(folder): writes the checkpoint, returns transformers' model. inputs(model, images):
    what its forward takes beside tokens. questions: two about one picture; pair: one about two.
    sizes: (H, W) of two pictures that no preprocessing resizes. pre: the pre-tokenizer's name.
    image_ids(model, n_tokens, image): the tokens that stand for a piece of a picture, where they
    are not all the image token. text_model(model): the decoder. write_mmproj(model, path): for
    architectures that the converter does not take. llm_options, mmproj_names: see `convert`.
    limit: how far the picture's embeddings may be from transformers'; logits: how far logits may.
    share: of the image tokens, hidden where not all are.
    """

    name: str
    build: Callable[[Path], Any]
    inputs: Callable[[Any, list[Pixels]], dict[str, Any]]
    questions: tuple[str, str]
    pair: str
    sizes: tuple[tuple[int, int], tuple[int, int]]
    pre: str = "qwen2"
    image_ids: Callable[[Any, int, Pixels], list[int]] | None = None
    text_model: Callable[[Any], Any] = lambda model: model.model.language_model
    write_mmproj: Callable[[Any, Path], None] | None = None
    llm_options: tuple[str, ...] = ()
    mmproj_names: Mapping[str, str] = field(default_factory=dict)
    limit: float = 0.02
    logits: float = 1e-4
    share: float = 0.5


def pictures(family: Family, seed: int = 0) -> list[Pixels]:
    """Two pictures of noise, of the family's sizes."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in family.sizes]


def asked(start: str, end: str, answer: str) -> dict[str, Any]:
    """`questions` and `pair` in the prompt format of a family."""
    return {
        "questions": (
            f"{start}{IMAGE}What is in the image?{end}{answer}",
            f"{start}{IMAGE}Is there a dog on the left?{end}{answer}",
        ),
        "pair": f"{start}{IMAGE}and {IMAGE}Which shows a cat?{end}{answer}",
    }


CHATML = asked("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n")


def chatml_template(image: str) -> str:
    """The Jinja chat template of a family that writes chatml and `image` for a picture."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% else %}" + image + "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
