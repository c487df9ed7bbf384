"""Llama 4: a class token that does stand last, places in two dimensions, pixel shuffle, experts.

llama.cpp's converter gives the norm behind a layer's attention a name that is another norm's, Gemma
4's. In files of earlier converters it has its own, and so it has here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from judge_suite.checkpoint import HALF, randomize, save, stacked, text_config
from judge_suite.family import Family, asked
from judge_suite.vocabulary import write_tokenizer

SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
]
TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}<|header_start|>{{ message['role'] }}"
    "<|header_end|>\n\n{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|image|>{% endif %}{% endfor %}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


def build(folder: Path) -> Any:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    ids = write_tokenizer(
        folder, SPECIAL, bos="<|begin_of_text|>", eos="<|eot|>", template=TEMPLATE
    )
    config = Llama4Config(
        text_config=text_config(
            ids,
            num_hidden_layers=4,
            head_dim=32,
            intermediate_size=96,
            intermediate_size_mlp=192,
            num_local_experts=16,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            rope_theta=5e5,
            use_qk_norm=True,
            rms_norm_eps=1e-5,
            bos_token_id=ids["<|begin_of_text|>"],
            eos_token_id=ids["<|eot|>"],
            pad_token_id=ids["<|end_of_text|>"],
        ),
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
            "vision_output_dim": 96,
            "projector_input_dim": 96,
            "projector_output_dim": 96,
            "pixel_shuffle_ratio": 0.5,
            "rope_theta": 10000.0,
        },
        image_token_index=ids["<|patch|>"],
        boi_token_index=ids["<|image_start|>"],
        eoi_token_index=ids["<|image_end|>"],
    )
    model = Llama4ForConditionalGeneration(config)
    randomize(model)
    preprocessor = {
        "image_processor_type": "Llama4ImageProcessor",
        "image_mean": HALF,
        "image_std": HALF,
    }
    save(model, folder, preprocessor)
    decode = model.language_model.forward

    # transformers 5.24 looks here for something that it never sets.
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = decode(*args, **kwargs)
        object.__setattr__(out, "image_outputs", None)
        return out

    model.language_model.forward = forward
    return model


FAMILIES = (
    Family(
        name="llama4",
        build=build,
        inputs=stacked(HALF, HALF),
        sizes=((112, 112), (112, 112)),
        pre="llama4",
        text_model=lambda model: model.language_model.model,
        mmproj_names={"attn_post_norm": "ln2"},
        **asked(
            "<|begin_of_text|><|header_start|>user<|header_end|>\n\n",
            "<|eot|>",
            "<|header_start|>assistant<|header_end|>\n\n",
        ),
    ),
)
