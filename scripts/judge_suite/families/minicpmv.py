"""MiniCPM-V 4.6: SigLIP that merges windows of patches twice, on the decoder of Qwen3.5."""

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
from judge_suite.families import qwen2_vl, qwen3_5
from judge_suite.family import CHATML, Family
from judge_suite.vocabulary import write_tokenizer

SPECIAL = [*qwen2_vl.SPECIAL, "<image>", "</image>", "<slice>", "</slice>"]


def build(folder: Path) -> Any:
    from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

    ids = write_tokenizer(folder, SPECIAL, bos=None, eos="<|im_end|>", template=qwen2_vl.TEMPLATE)
    config = MiniCPMV4_6Config(
        text_config=text_config(
            ids, model_type="qwen3_5_text", eos_token_id=ids["<|im_end|>"], **qwen3_5.TEXT
        ),
        # llama.cpp counts on 70 by 70 places.
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 560,
            "patch_size": 8,
            "insert_layer_id": 1,
        },
        insert_layer_id=1,
        image_size=128,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )
    model = MiniCPMV4_6ForConditionalGeneration(config)
    randomize(model)
    preprocessor = {
        "image_processor_type": "MiniCPMV4_6ImageProcessor",
        "image_mean": HALF,
        "image_std": HALF,
        "scale_resolution": 128,
        "downsample_mode": "16x",
    }
    save(model, folder, preprocessor)
    return model


def strips(model: Any, images: list[Pixels]) -> dict[str, Any]:
    """All patches side by side, one patch high."""
    size = model.config.vision_config.patch_size
    rows, grids = [], []
    for image in images:
        patches = in_patches(normalized(image, HALF, HALF), size)
        h, w = patches.shape[:2]
        rows.append(patches.transpose(2, 3, 0, 1, 4).reshape(3, size, h * w * size))
        grids.append([h, w])
    values = torch.from_numpy(np.concatenate(rows, -1)[None])
    return {"pixel_values": values, "target_sizes": torch.tensor(grids, dtype=torch.int32)}


FAMILIES = (
    Family(
        name="minicpmv4_6",
        build=build,
        inputs=strips,
        sizes=((128, 128), (128, 128)),
        pre="qwen35",
        llm_options=("--no-mtp",),
        **CHATML,
    ),
)
