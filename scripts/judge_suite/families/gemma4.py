"""Gemma 4: an encoder for every shape, heads of two widths, and E: layers that share a cache."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from judge_suite.checkpoint import Pixels, in_patches, normalized, randomize, save, text_config
from judge_suite.families.gemma3 import TABLE_GELU, turns
from judge_suite.family import Family, asked
from judge_suite.vocabulary import write_gemma_tokenizer

FIRST = ["<pad>", "<eos>", "<bos>", "<unk>"]
LAST = [
    "<|turn>",
    "<turn|>",
    "<|image>",
    "<image|>",
    "<|image|>",
    "<|video|>",
    "<|audio>",
    "<audio|>",
    "<|audio|>",
]
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
DENSE = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
    "use_bidirectional_attention": "vision",
}
# llama.cpp tells E2B, whose pictures are causal, by this width.
E2B = {
    "hidden_size": 1536,
    "num_hidden_layers": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "use_bidirectional_attention": None,
}


def build(folder: Path, kind: dict[str, object]) -> Any:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    ids = write_gemma_tokenizer(
        folder,
        FIRST,
        LAST,
        eos="<eos>",
        bos="<bos>",
        pad="<pad>",
        unk="<unk>",
        template=turns("<|turn>", "<turn|>", "<|image|>"),
    )
    settings: dict[str, Any] = {
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": 96,
        "final_logit_softcapping": 30.0,
        "vocab_size_per_layer_input": max(ids.values()) + 1,
        "tie_word_embeddings": True,
        "pad_token_id": ids["<pad>"],
        "bos_token_id": ids["<bos>"],
        "eos_token_id": ids["<eos>"],
        **kind,
    }
    config = Gemma4Config(
        text_config=text_config(ids, **settings),
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "pooling_kernel_size": 3,
            "patch_size": 8,
            "position_embedding_size": 1024,
        },
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        boa_token_id=ids["<|audio>"],
        eoa_token_index=ids["<audio|>"],
        audio_token_id=ids["<|audio|>"],
    )
    config.audio_config = None
    model = Gemma4ForConditionalGeneration(config)
    randomize(model)
    _scale_queries(model)
    preprocessor = {
        "image_processor_type": "Gemma4ImageProcessor",
        "image_mean": ZERO,
        "image_std": ONE,
    }
    save(model, folder, preprocessor)
    return model


@torch.no_grad()
def _scale_queries(model: Any) -> None:
    """Attention has no scale of its own: it is in the weights of the queries' norm."""
    for name, parameter in model.named_parameters():
        if name.endswith("q_norm.weight"):
            parameter *= len(parameter) ** -0.5


def padded(model: Any, images: list[Pixels]) -> dict[str, Any]:
    """Patches, colours last in each, and their places (column, row); -1 behind the last."""
    size = model.config.vision_config.patch_size
    n_most = max(image.shape[0] * image.shape[1] for image in images) // size**2
    values = np.zeros((len(images), n_most, 3 * size * size), np.float32)
    places = np.full((len(images), n_most, 2), -1)
    for i, image in enumerate(images):
        patches = in_patches(normalized(image, ZERO, ONE), size)
        h, w = patches.shape[:2]
        values[i, : h * w] = patches.transpose(0, 1, 3, 4, 2).reshape(h * w, -1)
        places[i, : h * w] = [(x, y) for y in range(h) for x in range(w)]
    return {
        "pixel_values": torch.from_numpy(values),
        "image_position_ids": torch.from_numpy(places),
    }


def _family(name: str, kind: dict[str, object]) -> Family:
    return Family(
        name=name,
        build=partial(build, kind=kind),
        inputs=padded,
        # A picture has 70 tokens at least, of 3 by 3 patches each.
        sizes=((216, 192), (192, 216)),
        pre="gemma4",
        logits=TABLE_GELU,
        # Two or three: among the middle ones of so many, some hang by less than the table rounds.
        share=0.02,
        **asked("<bos><|turn>user\n", "<turn|>\n", "<|turn>model\n"),
    )


FAMILIES = (_family("gemma4", DENSE), _family("gemma4_e", E2B))
