"""Granite 4 Vision: SigLIP, tiles, projectors that speak to layers all over the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from judge_suite.checkpoint import HALF, Pixels, normalized, randomize, save, text_config, tiles
from judge_suite.family import Family, asked
from judge_suite.vocabulary import write_tokenizer

PINPOINTS = [[64, 128], [128, 64], [128, 128]]
SPECIAL = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<image>"]
TEMPLATE = (
    "{% for message in messages %}<|start_of_role|>{{ message['role'] }}<|end_of_role|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<image>{% endif %}{% endfor %}{% endif %}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


def _build(folder: Path) -> Any:
    from transformers import Granite4VisionConfig, Granite4VisionForConditionalGeneration

    end = "<|end_of_text|>"
    ids = write_tokenizer(folder, SPECIAL, bos=end, eos=end, template=TEMPLATE)
    config = Granite4VisionConfig(
        text_config=text_config(
            ids,
            model_type="granite4_vision_text",
            num_hidden_layers=8,
            attention_multiplier=0.2,
            embedding_multiplier=2.0,
            residual_multiplier=0.7,
            logits_scaling=0.5,
            bos_token_id=ids[end],
            eos_token_id=ids[end],
            pad_token_id=ids[end],
        ),
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 96,
            "num_hidden_layers": 6,  # the converter knows no more projectors than layers
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "vision_use_head": False,
        },
        image_token_index=ids["<image>"],
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="2/4",
        deepstack_layer_map=[[-4, 1], [-1, 0]],  # the converter takes them in this order
        spatial_vision_layer=-1,
        spatial_target_layers=[2, 3, 4, 5],
        tie_word_embeddings=False,
    )
    model = Granite4VisionForConditionalGeneration(config)
    randomize(model)
    preprocessor = {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_mean": HALF,
        "image_std": HALF,
        "image_grid_pinpoints": PINPOINTS,
        "size": {"height": 64, "width": 64},
        "crop_size": {"height": 64, "width": 64},
    }
    known_as = {"text_config.architectures": ["GraniteForCausalLM"]}
    save(model, folder, preprocessor, config=known_as)
    return model


def _small_and_tiles(model: Any, images: list[Pixels]) -> dict[str, Any]:
    """(n, n_pieces, 3, H, W): the whole picture, then its tiles; zeros where one has fewer."""
    size = model.config.vision_config.image_size
    pieces = []
    for image in images:
        cut, small = tiles(image, size)
        pieces.append(np.stack([normalized(piece, HALF, HALF) for piece in (small, *cut)]))
    x = np.zeros((len(pieces), max(map(len, pieces)), 3, size, size), np.float32)
    for i, of_one in enumerate(pieces):
        x[i, : len(of_one)] = of_one
    sizes = torch.tensor([image.shape[:2] for image in images])
    return {"pixel_values": torch.from_numpy(x), "image_sizes": sizes}


FAMILIES = (
    Family(
        name="granite_vision",
        build=_build,
        inputs=_small_and_tiles,
        sizes=((128, 128), (64, 128)),
        pre="refact",
        **asked(
            "<|start_of_role|>user<|end_of_role|>",
            "<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
    ),
)
