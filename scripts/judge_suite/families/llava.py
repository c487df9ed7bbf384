"""LLaVA 1.5 and 1.6: a CLIP encoder with a class token, its layer before the last, two matrices.

llama.cpp's converter does not take them: the mmproj files on the hub were written by scripts that
it has retired. `writer` writes what those wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch

from judge_suite.checkpoint import (
    CLIP_MEAN,
    CLIP_STD,
    Pixels,
    normalized,
    randomize,
    save,
    stacked,
    text_config,
    tiles,
)
from judge_suite.family import Family, asked
from judge_suite.vocabulary import write_tokenizer

Layout = Literal["feature_layer", "whole", "legacy"]
PINPOINTS = ((56, 112), (112, 56), (112, 112))
TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<image>\n{% endif %}{% endfor %}{% endif %} {% endfor %}ASSISTANT:"
)


def build(folder: Path) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    ids = write_tokenizer(
        folder, ["<unk>", "<s>", "</s>", "<image>"], bos="<s>", eos="</s>", template=TEMPLATE
    )
    config = LlavaConfig(
        text_config=text_config(
            ids,
            model_type="llama",
            head_dim=32,
            rope_theta=10000.0,
            bos_token_id=ids["<s>"],
            eos_token_id=ids["</s>"],
        ),
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "projection_dim": 64,
            "hidden_act": "quick_gelu",
        },
        image_token_index=ids["<image>"],
        image_seq_length=16,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    randomize(model)
    save(model, folder, {"image_processor_type": "CLIPImageProcessor"})
    return model


def tiles_and_small(model: Any, images: list[Pixels]) -> dict[str, Any]:
    """What llama.cpp makes of LLaVA 1.6: its tiles one by one, then the whole picture.

    The model was trained on the whole picture first, and on the tiles' rows joined, each with a
    newline at its end: here only what the encoder makes of a piece is judged.
    """
    size = model.config.vision_config.image_size
    pieces = []
    for image in images:
        cut, small = tiles(image, size)
        pieces += [normalized(piece, CLIP_MEAN, CLIP_STD) for piece in (*cut, small)]
    return {"pixel_values": torch.from_numpy(np.stack(pieces))}


def writer(
    layout: Layout, pinpoints: Sequence[tuple[int, int]] = ()
) -> Callable[[Any, Path], None]:
    """Writes an mmproj file.

    layout: "feature_layer" names the layer whose output is the picture. "whole" holds every layer:
    llama.cpp's graph leaves the last one out. "legacy" is what the retired converter makes of a
    checkpoint that does not name it: the last layer is left out of the file already.
    """

    def write(model: Any, out: Path) -> None:
        vision = model.config.vision_config
        n_read = vision.num_hidden_layers - 1
        n_stored = vision.num_hidden_layers if layout == "whole" else n_read
        file = gguf.GGUFWriter(out, "clip")
        file.add_description("image encoder for LLaVA")
        for key in ("has_vision_encoder", "has_llava_projector"):
            file.add_bool(f"clip.{key}", True)
        file.add_bool("clip.has_text_encoder", False)
        file.add_file_type(0)
        file.add_string("clip.projector_type", "mlp")
        _add_shape(file, vision, n_stored)
        file.add_bool("clip.use_gelu", False)
        if layout == "feature_layer":
            file.add_array("clip.vision.feature_layer", [n_read])
        if pinpoints:
            file.add_array("clip.vision.image_grid_pinpoints", [n for p in pinpoints for n in p])
            file.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
            file.add_string("clip.vision.image_aspect_ratio", "anyres")
        _add_tensors(file, model, n_stored)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()

    return write


def _add_shape(file: gguf.GGUFWriter, vision: Any, n_stored: int) -> None:
    numbers = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "projection_dim": vision.projection_dim,
        "attention.head_count": vision.num_attention_heads,
        "block_count": n_stored,
    }
    for key, value in numbers.items():
        file.add_uint32(f"clip.vision.{key}", value)
    file.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    file.add_array("clip.vision.image_mean", list(CLIP_MEAN))
    file.add_array("clip.vision.image_std", list(CLIP_STD))


# The two matrices of the feed-forward network are named the wrong way round in these files.
_NAMES = {
    "embeddings.class_embedding": "class_embd",
    "embeddings.patch_embedding": "patch_embd",
    "embeddings.position_embedding": "position_embd",
    "pre_layrnorm": "pre_ln",
    "encoder.layers": "blk",
    "self_attn.out_proj": "attn_out",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_down",
    "mlp.fc2": "ffn_up",
}


def _add_tensors(file: gguf.GGUFWriter, model: Any, n_stored: int) -> None:
    for name, parameter in model.model.vision_tower.named_parameters():
        name = name.removeprefix("vision_model.")
        parts = name.split(".")
        if parts[0] == "post_layernorm" or (parts[1] == "layers" and int(parts[2]) >= n_stored):
            continue
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        data = parameter.detach().numpy()
        file.add_tensor(f"v.{name}", data.astype(np.float16) if data.ndim == 4 else data)
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        name = name.replace("linear_1", "0").replace("linear_2", "2")
        file.add_tensor(f"mm.{name}", parameter.detach().numpy())


def _family(name: str, layout: Layout, *, tiled: bool = False) -> Family:
    return Family(
        name=name,
        build=build,
        inputs=tiles_and_small if tiled else stacked(CLIP_MEAN, CLIP_STD),
        sizes=((112, 112), (56, 112)) if tiled else ((56, 56), (56, 56)),
        write_mmproj=writer(layout, PINPOINTS if tiled else ()),
        **asked("<s>USER: ", "", " ASSISTANT:"),
    )


FAMILIES = (
    _family("llava", "feature_layer"),
    _family("llava_whole", "whole"),
    _family("llava_legacy", "legacy"),
    _family("llava_next", "feature_layer", tiled=True),
)
