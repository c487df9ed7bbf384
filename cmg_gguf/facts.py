"""What a model pair is and what runs it, JSON-ready: for people who ask before they load."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import PIL

from cmg_gguf.llama.about import devices, features, library
from cmg_gguf.llama.header import open_header, projector_facts, read_architecture
from cmg_gguf.llama.layers import layer_places
from cmg_gguf.llama.log import set_verbose
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.openmp import WAITING
from cmg_gguf.llama.projector import Projector
from cmg_gguf.llama.repacking import REMEDY, is_safe
from cmg_gguf.llama.resolution import measured
from cmg_gguf.opening import DEFAULT_TEMPLATE, fitting_n_ubatch, named_template

SIZE_IF_UNKNOWN = 336
"""Pixels a side of the image whose tokens are counted, where the projector names no size."""
NO_OPENMP = "as llama.cpp's own threads do: it was built without OpenMP"


def system_facts() -> dict[str, Any]:
    """Versions, the libllama that is loaded, devices. waiting: how threads wait for each other, in
    words. repacking_remedy: None where weights may be repacked."""
    return {
        "llama_cpp_python": llama_cpp.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        "library": str(library()),
        "devices": [vars(device) for device in devices()],
        "features": features(),
        "waiting": WAITING.told if "OPENMP = 1" in features() else NO_OPENMP,
        "repacking_remedy": None if is_safe() else REMEDY,
    }


def pair_facts(
    path: Path, mmproj: Path | None, *, offload_kqv: bool = True, **placed: Any
) -> dict[str, Any]:
    """What the files hold, and where their layers lie. placed: see `Placement`. Raises ModelError,
    ProjectorError, BackendError, UnsupportedError."""
    set_verbose(False)
    model = Model.load(path, **placed)
    places = layer_places(model.handle, model.n_layer, offload_kqv=offload_kqv)
    return {
        "model": {
            "path": str(path),
            "description": model.describe(),
            "bytes": model.size,
            "layers": model.n_layer,
            "attention_layers": list(model.attention_layers),
            "layer_devices": places.weights,
            "cache_devices": places.caches,
            "vocabulary": model.n_vocab,
            "context": model.n_ctx_train,
            "chat_template": "own" if model.chat_template() else DEFAULT_TEMPLATE,
        },
        "mmproj": _projector_block(mmproj, model) if mmproj else None,
    }


def unread_variables(path: Path, chosen: str | None, names: Iterable[str]) -> list[str]:
    """Which of these variables the chat template does not read, so that they change nothing.

    path: the model file, of which the header alone is read. chosen: a template in place of its own.
    Raises ModelError, PromptError.
    """
    read_architecture(path, "model")
    with open_header(path) as header:
        template = named_template(chosen, header.text("tokenizer.chat_template"))
    return [name for name in names if not template.reads(name)]


def _projector_block(path: Path, model: Model) -> dict[str, Any]:
    """What an mmproj file holds, and the tokens it makes of a square image."""
    projector = Projector(path, model, use_gpu=False)
    # What is to be mended is known when something has been encoded.
    projector.encode(projector.tokenize(projector.marker, [np.zeros((32, 32, 3), np.uint8)]))
    facts = projector_facts(path)
    size = facts.image_size or SIZE_IF_UNKNOWN
    square = np.zeros((size, size, 3), np.uint8)
    return {
        "path": str(path),
        "projector": facts.kind,
        "image_size": size,
        "image_tokens": projector.tokenize(projector.marker, [square]).n_image_tokens,
        "image_tokens_by_size": _tokens_by_size(projector),
        "n_ubatch": fitting_n_ubatch(projector),
        "mended": sorted(projector.mended),
    }


def _tokens_by_size(projector: Projector) -> list[int] | None:
    """Of a small picture and of a large one, where a picture's size decides; else None."""
    found = measured(projector)
    return [found.fewest, found.most] if found.by_size else None
