"""Gemma 3: SigLIP, its patches averaged; a picture's tokens see each other; a sliding window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from judge_suite.checkpoint import HALF, randomize, save, stacked, text_config
from judge_suite.family import Family, asked
from judge_suite.vocabulary import write_tokenizer

SPECIAL = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
]

TABLE_GELU = 1e-2
"""llama.cpp's CPU kernels look GELU up in a table of F16 numbers, which both branches go through in
every layer, and a number that lies between two of it may be taken for either: so not even one way
of decoding gives the other's logits to 1e-4. `--gelu table` rounds so in transformers too.
"""


def turns(start: str, end: str, image: str) -> str:
    """The chat template of a Gemma, whose assistant is called model."""
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '" + start + "' + ('model' if message['role'] == 'assistant' else message['role']) }}\n"
        "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + image
        + "{% else %}"
        "{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}" + end + "\n{% endfor %}"
        "{% if add_generation_prompt %}" + start + "model\n{% endif %}"
    )


def build(folder: Path) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    template = turns("<start_of_turn>", "<end_of_turn>", "<start_of_image>")
    ids = write_tokenizer(folder, SPECIAL, bos="<bos>", eos="<end_of_turn>", template=template)
    config = Gemma3Config(
        # Every sixth layer sees everything, the others 20 tokens.
        text_config=text_config(
            ids,
            num_hidden_layers=7,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=20,
            tie_word_embeddings=True,
            pad_token_id=ids["<pad>"],
            bos_token_id=ids["<bos>"],
            eos_token_id=ids["<end_of_turn>"],
        ),
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=16,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )
    model = Gemma3ForConditionalGeneration(config)
    randomize(model)
    preprocessor = {
        "image_processor_type": "Gemma3ImageProcessor",
        "image_mean": HALF,
        "image_std": HALF,
        "image_seq_length": 16,
    }
    save(
        model,
        folder,
        preprocessor,
        rename={r"vision_tower\.(?!vision_model)": "vision_tower.vision_model."},
    )
    return model


FAMILIES = (
    Family(
        name="gemma3",
        build=build,
        inputs=stacked(HALF, HALF),
        sizes=((112, 112), (112, 112)),
        logits=TABLE_GELU,
        **asked("<bos><start_of_turn>user\n", "<end_of_turn>\n", "<start_of_turn>model\n"),
    ),
)
