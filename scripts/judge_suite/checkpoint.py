"""What the families share: random weights that show something, and checkpoints as on the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Tensors = dict[str, Any]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


def text_config(ids: Mapping[str, int], **more: Any) -> dict[str, Any]:
    """The settings of a tiny decoder; ids: its special tokens, the last of its vocabulary."""
    return {
        "vocab_size": max(ids.values()) + 1,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **more,
    }


@torch.no_grad()
def randomize(model: Any, seed: int = 0) -> None:
    """Draws weights under which attention is uneven, places matter and logits are of order one."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng)
        owner, _, kind = name.rpartition(".")
        is_norm = any(part in owner.rpartition(".")[2] for part in ("norm", "ln_q"))
        if is_norm and kind == "weight":
            start = parameter.mean().round()  # 0 where the norm adds one by itself
            parameter.copy_(start + 0.1 * noise)
        elif "position_embed" in name or "pos_embed" in name or "embed_tokens" in name:
            parameter.copy_(0.5 * noise)
        elif "cls_token" in name or "class_embedding" in name:
            parameter.copy_(noise)
        elif kind in ("A_log", "dt_bias"):  # a state that remembers: nine tenths of it a step
            parameter.copy_(noise - 1)
        elif parameter.ndim >= 2:
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.copy_(noise * gain / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * noise)
    model.eval()


def save(
    model: Any,
    folder: Path,
    preprocessor: Mapping[str, Any],
    *,
    rename: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
) -> None:
    """Writes a checkpoint as the hub has it.

    rename: patterns of tensor names as transformers saves them -> as they are on the hub. config:
    keys of config.json that transformers does not write; "a.b" is b in a. change: applied last.
    """
    from safetensors.torch import load_file, save_file

    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    renamed = {_renamed(name, rename or {}): t for name, t in load_file(weights).items()}
    save_file(change(renamed), weights, metadata={"format": "pt"})
    if config:
        path = folder / "config.json"
        whole = json.loads(path.read_text())
        for key, value in config.items():
            *outer, last = key.split(".")
            part = whole
            for name in outer:
                part = part[name]
            part[last] = value
        path.write_text(json.dumps(whole))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(preprocessor)))


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, new in patterns.items():
        name, found = re.subn("^" + pattern, new, name)
        if found:
            break
    return name


def normalized(image: Pixels, mean: Sequence[float], std: Sequence[float]) -> Floats:
    """(3, H, W) float32, as every image processor makes it of (H, W, 3) pixels."""
    x = image.astype(np.float32) / np.float32(255)
    x = (x - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(x.transpose(2, 0, 1))


def stacked(
    mean: Sequence[float], std: Sequence[float]
) -> Callable[[Any, list[Pixels]], dict[str, Any]]:
    """The `inputs` of a family whose pictures are all of one size and whole."""

    def inputs(_model: Any, images: list[Pixels]) -> dict[str, Any]:
        x = np.stack([normalized(image, mean, std) for image in images])
        return {"pixel_values": torch.from_numpy(x)}

    return inputs


def in_patches(image: Floats, size: int) -> Floats:
    """(rows, columns, 3, size, size) of (3, H, W)."""
    h, w = image.shape[1] // size, image.shape[2] // size
    return image.reshape(3, h, size, w, size).transpose(1, 3, 0, 2, 4)


def tiles(
    image: Pixels, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> tuple[list[Pixels], Pixels]:
    """The tiles of an image whose sides are multiples of `size`, row by row; and all of it, small.

    resample: what llama.cpp shrinks this family's pictures with. It does so as Pillow does.
    """
    h, w, _ = image.shape
    cut = [image[y : y + size, x : x + size] for y in range(0, h, size) for x in range(0, w, size)]
    small = Image.fromarray(image).resize((size, size), resample)
    return cut, np.asarray(small)
