"""LFM2-VL: a hybrid of attention and short convolutions behind SigLIP 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from judge_suite.checkpoint import (
    HALF,
    Pixels,
    in_patches,
    normalized,
    randomize,
    save,
    text_config,
)
from judge_suite.family import Family, asked, chatml_template
from judge_suite.vocabulary import write_tokenizer

SPECIAL = [
    "<|pad|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<|image_start|>",
    "<|image_end|>",
    "<|img_thumbnail|>",
    *(f"<|img_row_{row}_col_{column}|>" for row in (1, 2, 3) for column in (1, 2, 3)),
]
LAYERS = [*["conv", "conv", "full_attention"] * 2, "conv", "full_attention"]


def build(folder: Path) -> Any:
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    template = "{{ bos_token }}" + chatml_template("<image>")
    ids = write_tokenizer(
        folder, SPECIAL, bos="<|startoftext|>", eos="<|im_end|>", template=template
    )
    config = Lfm2VlConfig(
        text_config=text_config(
            ids,
            model_type="lfm2",
            num_hidden_layers=len(LAYERS),
            layer_types=LAYERS,
            norm_eps=1e-5,
            conv_L_cache=3,
            block_dim=128,
            block_ff_dim=192,
            block_auto_adjust_ff_dim=False,
            rope_theta=1e6,
            tie_word_embeddings=True,
            bos_token_id=ids["<|startoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|pad|>"],
        ),
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_patches": 256,
            "patch_size": 16,
            "vision_use_head": False,
        },
        image_token_id=ids["<image>"],
        projector_hidden_size=96,
        projector_use_layernorm=True,
    )
    model = Lfm2VlForConditionalGeneration(config)
    randomize(model)
    save(
        model,
        folder,
        {"image_processor_type": "Lfm2VlImageProcessor", "image_mean": HALF, "image_std": HALF},
        rename={r"model\.vision_tower\.(?!vision_model)": "model.vision_tower.vision_model."},
        config={"text_config.architectures": ["Lfm2ForCausalLM"]},
    )
    return model


def padded(model: Any, images: list[Pixels]) -> dict[str, Any]:
    """Patches, colours last in each, their grids, and which of them are there."""
    size = model.config.vision_config.patch_size
    n_most = max(image.shape[0] * image.shape[1] for image in images) // size**2
    values = np.zeros((len(images), n_most, 3 * size * size), np.float32)
    there = np.zeros((len(images), n_most), np.int64)
    grids = []
    for i, image in enumerate(images):
        patches = in_patches(normalized(image, HALF, HALF), size)
        h, w = patches.shape[:2]
        values[i, : h * w] = patches.transpose(0, 1, 3, 4, 2).reshape(h * w, -1)
        there[i, : h * w] = 1
        grids.append([h, w])
    return {
        "pixel_values": torch.from_numpy(values),
        "spatial_shapes": torch.tensor(grids),
        "pixel_attention_mask": torch.from_numpy(there),
    }


FAMILIES = (
    Family(
        name="lfm2_vl",
        build=build,
        inputs=padded,
        sizes=((256, 256), (256, 256)),
        pre="lfm2",
        **asked("<|startoftext|><|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"),
    ),
)
