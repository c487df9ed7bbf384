"""SmolVLM and Idefics3: SigLIP, tiles with text between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from judge_suite.checkpoint import HALF, Pixels, normalized, randomize, save, text_config, tiles
from judge_suite.family import Family, asked
from judge_suite.vocabulary import write_tokenizer

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
]
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<image>{% endif %}{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def _build(folder: Path, kind: str) -> Any:
    import transformers

    ids = write_tokenizer(
        folder, SPECIAL, bos="<|im_start|>", eos="<end_of_utterance>", template=TEMPLATE
    )
    config = getattr(transformers, f"{kind}Config")(
        text_config=text_config(
            ids,
            model_type="llama",
            rope_theta=1e5,
            head_dim=32,
            bos_token_id=ids["<|im_start|>"],
            eos_token_id=ids["<end_of_utterance>"],
            pad_token_id=ids["<|im_end|>"],
        ),
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
        },
        image_token_id=ids["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=ids["<|im_end|>"],
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    randomize(model)
    preprocessor = {
        "image_processor_type": f"{kind}ImageProcessor",
        "image_mean": HALF,
        "image_std": HALF,
        "size": {"longest_edge": 128},
        "max_image_size": {"longest_edge": 64},
        "do_image_splitting": True,
    }
    known_as = {"text_config.architectures": ["VLlama3ForCausalLM"]}
    save(model, folder, preprocessor, config=known_as)
    return model


def tiles_and_small(model: Any, images: list[Pixels]) -> dict[str, Any]:
    size = model.config.vision_config.image_size
    pieces: list[Pixels] = []
    for image in images:
        cut, small = tiles(image, size, Image.Resampling.LANCZOS)
        pieces += [*cut, small]
    x = np.stack([normalized(piece, HALF, HALF) for piece in pieces])
    return {"pixel_values": torch.from_numpy(x)[None]}


def _family(name: str, kind: str) -> Family:
    return Family(
        name=name,
        build=lambda folder: _build(folder, kind),
        inputs=tiles_and_small,
        sizes=((128, 128), (64, 128)),
        pre="smollm",
        text_model=lambda model: model.model.text_model,
        **asked("<|im_start|>User:", "<end_of_utterance>\n", "Assistant:"),
    )


FAMILIES = (_family("smolvlm", "SmolVLM"), _family("idefics3", "Idefics3"))
