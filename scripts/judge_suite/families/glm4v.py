"""GLM-4V: an encoder for every shape, its places interpolated; RoPE of neighbouring numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from judge_suite.checkpoint import CLIP_MEAN, CLIP_STD, randomize, save, text_config
from judge_suite.families import qwen2_vl
from judge_suite.family import Family, asked
from judge_suite.vocabulary import write_tokenizer

SPECIAL = [
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|video|>",
]
TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|begin_of_image|><|image|><|end_of_image|>{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def build(folder: Path) -> Any:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    ids = write_tokenizer(folder, SPECIAL, bos=None, eos="<|endoftext|>", template=TEMPLATE)
    config = Glm4vConfig(
        text_config=text_config(
            ids,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
                "partial_rotary_factor": 0.5,
            },
            eos_token_id=[ids["<|endoftext|>"], ids["<|user|>"]],
        ),
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": 128,
            "image_size": 112,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"],
        image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"],
        video_end_token_id=ids["<|end_of_video|>"],
    )
    model = Glm4vForConditionalGeneration(config)
    randomize(model)
    preprocessor = {**qwen2_vl.PREPROCESSOR, "image_processor_type": "Glm4vImageProcessor"}
    save(model, folder, preprocessor)
    return model


FAMILIES = (
    Family(
        name="glm4v",
        build=build,
        inputs=qwen2_vl.patches(CLIP_MEAN, CLIP_STD),
        sizes=((140, 168), (112, 140)),
        pre="glm4",
        **asked("[gMASK]<sop><|user|>\n", "", "<|assistant|>\n"),
    ),
)
