"""Qwen2.5-VL: Qwen2-VL with an encoder most of whose layers see a window of the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from judge_suite.checkpoint import CLIP_MEAN, CLIP_STD, randomize, save, text_config
from judge_suite.families.qwen2_vl import (
    PREPROCESSOR,
    SPECIAL,
    TEMPLATE,
    patches,
    picture_tokens,
)
from judge_suite.family import CHATML, Family
from judge_suite.vocabulary import write_tokenizer


def build(folder: Path) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = write_tokenizer(folder, SPECIAL, bos=None, eos="<|im_end|>", template=TEMPLATE)
    config = Qwen2_5_VLConfig(
        text_config=text_config(
            ids,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            bos_token_id=None,
            eos_token_id=ids["<|im_end|>"],
        ),
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": 128,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
        },
        tie_word_embeddings=False,
        **picture_tokens(ids),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    randomize(model)
    save(model, folder, PREPROCESSOR)
    return model


FAMILIES = (
    Family(
        name="qwen2_5_vl",
        build=build,
        inputs=patches(CLIP_MEAN, CLIP_STD),
        sizes=((140, 168), (112, 140)),
        **CHATML,
    ),
)
