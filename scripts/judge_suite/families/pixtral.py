"""Pixtral and Mistral Small 3.x: an encoder for every shape, with a break behind each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from judge_suite.checkpoint import (
    CLIP_MEAN,
    CLIP_STD,
    Pixels,
    normalized,
    randomize,
    save,
    text_config,
)
from judge_suite.family import Family, asked
from judge_suite.vocabulary import write_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST]"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}[IMG]{% endif %}{% endfor %}{% endif %}[/INST]"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# The converter drops what is under "language_model." before it looks for [IMG_BREAK]'s embedding.
_AS_ON_THE_HUB = {r"language_model\.model\.": "model.", r"language_model\.lm_head": "lm_head"}


def _build(folder: Path, *, merge: int) -> Any:
    import transformers

    ids = write_tokenizer(folder, SPECIAL, bos="<s>", eos="</s>", template=TEMPLATE)
    kind = "Llava" if merge == 1 else "Mistral3"
    own: dict[str, Any] = (
        {
            "image_seq_length": 1,
            "vision_feature_select_strategy": "full",
            "projector_hidden_act": "gelu",
        }
        if merge == 1
        else {"spatial_merge_size": merge}
    )
    config = getattr(transformers, f"{kind}Config")(
        text_config=text_config(
            ids,
            model_type="mistral",
            head_dim=32,
            sliding_window=None,
            rope_theta=1e6,
            rms_norm_eps=1e-5,
        ),
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 256,
            "patch_size": 16,
            "hidden_act": "gelu" if merge == 1 else "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_index=ids["[IMG]"],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **own,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    randomize(model)
    preprocessor = {
        "image_processor_type": "PixtralImageProcessor",
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "patch_size": 16,
    }
    if merge > 1:
        preprocessor["spatial_merge_size"] = merge
    save(model, folder, preprocessor, rename=_AS_ON_THE_HUB)
    return model


def padded(_model: Any, images: list[Pixels]) -> dict[str, Any]:
    x = [normalized(image, CLIP_MEAN, CLIP_STD) for image in images]
    h, w = max(i.shape[1] for i in x), max(i.shape[2] for i in x)
    same = [np.pad(i, ((0, 0), (0, h - i.shape[1]), (0, w - i.shape[2]))) for i in x]
    sizes = torch.tensor([image.shape[:2] for image in images])
    return {"pixel_values": torch.from_numpy(np.stack(same)), "image_sizes": sizes}


def with_breaks(model: Any, n_tokens: int, image: Pixels) -> list[int]:
    patch = model.config.vision_config.patch_size * getattr(model.config, "spatial_merge_size", 1)
    h, w = image.shape[0] // patch, image.shape[1] // patch
    row = [model.config.image_token_id] * w
    # The special tokens end the vocabulary, in their order.
    first = model.config.text_config.vocab_size - len(SPECIAL)
    ids = [*row, first + SPECIAL.index("[IMG_BREAK]")] * h
    return ids[:n_tokens]


def _family(name: str, merge: int) -> Family:
    return Family(
        name=name,
        build=lambda folder: _build(folder, merge=merge),
        inputs=padded,
        sizes=((64 * merge, 80 * merge), (48 * merge, 64 * merge)),
        pre="tekken",
        image_ids=with_breaks,
        **asked("<s>[INST]", "[/INST]", ""),
    )


FAMILIES = (_family("pixtral", 1), _family("mistral3", 2))
