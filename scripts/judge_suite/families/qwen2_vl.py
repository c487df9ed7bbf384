"""Qwen2-VL: an encoder for every shape, four patches to a token, positions in three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from judge_suite.family import CHATML, Family, chatml_template
from judge_suite.vocabulary import write_tokenizer

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE = chatml_template("<|vision_start|><|image_pad|><|vision_end|>")
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 3136,
    "max_pixels": 12845056,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}}


def build(folder: Path) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 3, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 4, "in_channels": 3}
    return checkpoint(folder, Qwen2VLConfig, Qwen2VLForConditionalGeneration, vision)


def checkpoint(
    folder: Path,
    config_class: Any,
    model_class: Any,
    vision: Mapping[str, object],
    *,
    text: Mapping[str, object] = ROPE,
    preprocessor: Mapping[str, object] = PREPROCESSOR,
    **saving: Any,
) -> Any:
    """A saved random model of the Qwen-VL kind.

    vision, text: what its encoder's and its decoder's config have besides. saving: as `save`.
    """
    ids = write_tokenizer(folder, SPECIAL, bos=None, eos="<|im_end|>", template=TEMPLATE)
    config = config_class(
        text_config=text_config(
            ids,
            bos_token_id=None,
            eos_token_id=ids["<|im_end|>"],
            **text,
        ),
        vision_config={
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        tie_word_embeddings=False,
        **picture_tokens(ids),
    )
    model = model_class(config)
    randomize(model)
    save(model, folder, preprocessor, **saving)
    return model


def picture_tokens(ids: Mapping[str, int]) -> dict[str, int]:
    """What the whole model's config says of the vocabulary."""
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def patches(mean: Sequence[float], std: Sequence[float]) -> Callable[..., dict[str, Any]]:
    """A family's `inputs`, of pictures normalized so."""
    return lambda model, images: _patches(model, images, mean, std)


def _patches(
    model: Any, images: list[Pixels], mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """Patches in the encoder's order: those of one token together, the picture twice in time."""
    vision = model.config.vision_config
    p, merge, n_times = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rows, grids = [], []
    for image in images:
        x = np.stack([normalized(image, mean, std)] * n_times)
        h, w = x.shape[2] // p, x.shape[3] // p
        x = x.reshape(n_times, 3, h // merge, merge, p, w // merge, merge, p)
        x = x.transpose(2, 5, 3, 6, 1, 0, 4, 7)
        rows.append(x.reshape(h * w, 3 * n_times * p * p))
        grids.append([1, h, w])
    values = torch.from_numpy(np.concatenate(rows))
    return {"pixel_values": values, "image_grid_thw": torch.tensor(grids)}


FAMILIES = (
    Family(
        name="qwen2_vl",
        build=build,
        inputs=patches(CLIP_MEAN, CLIP_STD),
        sizes=((140, 168), (112, 140)),
        **CHATML,
    ),
)
