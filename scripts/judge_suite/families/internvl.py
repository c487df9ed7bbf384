"""InternVL: an encoder of its own with a class token, pixel shuffle, tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from judge_suite.checkpoint import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Pixels,
    Tensors,
    normalized,
    randomize,
    save,
    text_config,
    tiles,
)
from judge_suite.family import CHATML, Family, chatml_template
from judge_suite.vocabulary import write_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]

_TOWER = r"vision_tower\.encoder\.layer\.(\d+)\."
_AS_ON_THE_HUB = {
    r"vision_tower\.embeddings\.cls_token": "vision_model.embeddings.class_embedding",
    r"vision_tower\.embeddings\.position_embeddings": "vision_model.embeddings.position_embedding",
    r"vision_tower\.embeddings\.patch_embeddings\.projection": (
        "vision_model.embeddings.patch_embedding"
    ),
    _TOWER + r"lambda_(\d)": r"vision_model.encoder.layers.\1.ls\2",
    _TOWER + "layernorm_before": r"vision_model.encoder.layers.\1.norm1",
    _TOWER + "layernorm_after": r"vision_model.encoder.layers.\1.norm2",
    _TOWER + r"attention\.projection_layer": r"vision_model.encoder.layers.\1.attn.proj",
    _TOWER + r"attention\.": r"vision_model.encoder.layers.\1.attn.",
    _TOWER: r"vision_model.encoder.layers.\1.",
    r"multi_modal_projector\.layer_norm": "mlp1.0",
    r"multi_modal_projector\.linear_1": "mlp1.1",
    r"multi_modal_projector\.linear_2": "mlp1.3",
}


def build(folder: Path) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    template = chatml_template("<IMG_CONTEXT>")
    ids = write_tokenizer(folder, SPECIAL, bos=None, eos="<|im_end|>", template=template)
    config = InternVLConfig(
        text_config=text_config(
            ids, model_type="qwen2", rope_theta=1e6, eos_token_id=ids["<|im_end|>"]
        ),
        # Four layers at least: the converter takes the number in "mlp1.3" for a layer's.
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": [112, 112],
            "patch_size": [14, 14],
            "attention_bias": True,
            "use_mean_pooling": True,
        },
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    randomize(model)
    save(
        model,
        folder,
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
        },
        rename=_AS_ON_THE_HUB,
        config={
            "vision_config.architectures": ["InternVisionModel"],
            "text_config.architectures": ["Qwen2ForCausalLM"],
            "min_dynamic_patch": 1,
            "max_dynamic_patch": 4,
        },
        change=_fused,
    )
    return model


def _fused(tensors: Tensors) -> Tensors:
    """q, k and v of a layer of the image encoder as one matrix."""
    fused: Tensors = {}
    for name, tensor in tensors.items():
        if ".attn.q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            fused[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif ".attn.k_proj." not in name and ".attn.v_proj." not in name:
            fused[name] = tensor
    return fused


def tiles_and_small(model: Any, images: list[Pixels]) -> dict[str, Any]:
    size = model.config.vision_config.image_size[0]
    pieces: list[Pixels] = []
    for image in images:
        cut, small = tiles(image, size)
        pieces += [image] if len(cut) == 1 else [*cut, small]
    x = np.stack([normalized(piece, IMAGENET_MEAN, IMAGENET_STD) for piece in pieces])
    return {"pixel_values": torch.from_numpy(x)}


def _family(name: str, width: int) -> Family:
    sizes = ((112, width), (112, width))
    return Family(name=name, build=build, inputs=tiles_and_small, sizes=sizes, **CHATML)


FAMILIES = (_family("internvl", 112), _family("internvl_tiles", 224))
