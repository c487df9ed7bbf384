"""Tiny random image encoders as mmproj files, for any language model of the right width.

write_encoder(path, TinyEncoder("internvl", width=64))

`tiny_llava` writes an encoder without a class token, which llama.cpp runs as it was meant. These
are encoders that it does not. What they must give is in `encoder_reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Kind = Literal["clip", "internvl", "cogvlm", "pixtral", "gemma4uv", "gemma3", "qwen2vl", "qwen3vl"]
Layout = Literal["whole", "legacy", "feature_layer"]

EPS = dict.fromkeys(("internvl", "cogvlm", "gemma4uv", "gemma3", "qwen2vl", "qwen3vl"), 1e-6)
EPS |= dict.fromkeys(("clip", "pixtral"), 1e-5)


@dataclass(frozen=True)
class TinyEncoder:
    """kind: "clip" is LLaVA's, with a class token; "internvl" has one too, and "cogvlm", whose
    picture stands between two tokens of its own; "pixtral" has none, and
    a break behind each row of patches; "gemma4uv" has no layers, takes a picture of any shape, and
    its model reads one at once; "gemma3" and "qwen2vl" make one token of four patches, of a square
    and of any shape; "qwen3vl" does as "qwen2vl", and n_deepstack of its first layers give
    embeddings of that width too, which are appended. width: of the language model. n_layer: layers
    whose output counts; of "clip"
    it is known by `layout`: "whole" holds one layer more, which is not run; "legacy" is the same
    without that layer, as llama.cpp's retired converter wrote it; "feature_layer" names the layer.
    pinpoints: widths and heights that a larger picture is scaled
    to before it is cut into tiles, as LLaVA-1.6 does it. names_gelu: the file of a "cogvlm"
    names its activation, which none of the converter's does. same_places: one for all patches.
    """

    kind: Kind = "clip"
    width: int = 64
    n_layer: int = 3
    n_embd: int = 32
    n_head: int = 2
    n_ff: int = 64
    image_size: int = 56
    patch_size: int = 14
    layout: Layout = "whole"
    seed: int = 0
    pinpoints: tuple[int, ...] = ()
    n_deepstack: int = 0
    names_gelu: bool = False
    same_places: bool = False

    @property
    def n_side(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def n_patches(self) -> int:
        return self.n_side**2

    @property
    def n_image_tokens(self) -> int:
        of_a_kind = {
            "clip": self.n_patches,
            "internvl": self.n_patches // 4,
            "cogvlm": self.n_patches + 2,
            "pixtral": self.n_patches + self.n_side - 1,
            "gemma4uv": self.n_patches,
            "gemma3": self.n_patches // 4,
            "qwen2vl": self.n_patches // 4,
            "qwen3vl": self.n_patches // 4,
        }
        return of_a_kind[self.kind]

    @property
    def n_stored(self) -> int:
        if self.kind == "gemma4uv":
            return 0
        return self.n_layer + (self.kind == "clip" and self.layout == "whole")

    @property
    def has_class_token(self) -> bool:
        return self.kind in ("clip", "internvl", "cogvlm")


def weights_of(encoder: TinyEncoder) -> dict[str, F32]:
    """Every tensor by its name in the file; shapes are NumPy's, (n_out, n_in) for a matrix.

    A layer that is stored and not run is drawn last: the others are the same with and without it.
    """
    draw = _Draw(encoder.seed)
    if encoder.kind == "gemma4uv":
        return _unified(draw, encoder)
    n, patch = encoder.n_embd, encoder.patch_size
    found = {"v.patch_embd.weight": draw.normal((n, 3, patch, patch), 3.0 / patch)}
    if encoder.kind == "pixtral":
        found["v.pre_ln.weight"] = draw.scale(n)
        found["v.token_embd.img_break"] = draw.normal((encoder.width,), 1.0)
    elif encoder.kind == "qwen2vl":
        found["v.patch_embd.weight.1"] = draw.normal((n, 3, patch, patch), 3.0 / patch)
    elif encoder.kind == "qwen3vl":
        found["v.patch_embd.weight.1"] = draw.normal((n, 3, patch, patch), 3.0 / patch)
        found["v.patch_embd.bias"] = draw.normal((n,), 0.1)
        found["v.position_embd.weight"] = draw.normal((encoder.n_patches, n), 1.0)
    else:
        if encoder.has_class_token:
            found["v.class_embd"] = draw.normal((n,), 1.0)
        # Places must matter: a shift by one is to be seen.
        n_places = encoder.n_patches + encoder.has_class_token
        places = draw.normal((n_places, n), 1.0)
        found["v.position_embd.weight"] = places[[0] * n_places] if encoder.same_places else places
    if encoder.kind in ("internvl", "cogvlm"):
        found["v.patch_embd.bias"] = draw.normal((n,), 0.1)
    if encoder.kind == "clip":
        draw.norm(found, "v.pre_ln", n)
    _add_projector(found, draw, encoder)
    for il in range(encoder.n_stored):
        _add_layer(found, draw, encoder, f"v.blk.{il}")
    return found


def write_encoder(path: Path, encoder: TinyEncoder) -> Path:
    """Writes the file; the same encoder gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = gguf.GGUFWriter(path, "clip")
    file.add_bool("clip.has_vision_encoder", True)
    if encoder.kind == "clip":
        file.add_description("image encoder for LLaVA")
        file.add_bool("clip.has_llava_projector", True)
    names = {"clip": "mlp", "qwen2vl": "qwen2vl_merger", "qwen3vl": "qwen3vl_merger"}
    file.add_string("clip.projector_type", names.get(encoder.kind, encoder.kind))
    # False, or nothing as in CogVLM's files, means quick-GELU, CLIP's own. Pixtral's networks are
    # gated with SiLU.
    file.add_bool("clip.use_gelu", encoder.kind == "internvl" or encoder.names_gelu)
    file.add_bool("clip.use_silu", encoder.kind == "pixtral")
    if encoder.kind in ("internvl", "gemma4uv", "gemma3"):
        file.add_uint32("clip.vision.projector.scale_factor", 2)
    numbers = {
        "block_count": encoder.n_stored,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "embedding_length": encoder.n_embd,
        "feed_forward_length": encoder.n_ff,
        "projection_dim": encoder.width,
        "attention.head_count": encoder.n_head,
    }
    for key, value in numbers.items():
        file.add_uint32(f"clip.vision.{key}", value)
    file.add_float32("clip.vision.attention.layer_norm_epsilon", EPS[encoder.kind])
    if encoder.kind == "clip" and encoder.layout == "feature_layer":
        file.add_array("clip.vision.feature_layer", [encoder.n_layer])
    if encoder.pinpoints:
        file.add_array("clip.vision.image_grid_pinpoints", list(encoder.pinpoints))
    file.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    file.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    for name, tensor in weights_of(encoder).items():
        file.add_tensor(name, tensor)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


class _Draw:
    """Float32 tensors, drawn one after another."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def normal(self, shape: tuple[int, ...], std: float) -> F32:
        return (self._rng.standard_normal(shape) * std).astype(np.float32)

    def scale(self, n: int) -> F32:
        return self._rng.uniform(0.8, 1.2, n).astype(np.float32)

    def norm(self, found: dict[str, F32], name: str, n: int) -> None:
        found[f"{name}.weight"] = self.scale(n)
        found[f"{name}.bias"] = self.normal((n,), 0.05)

    def linear(self, found: dict[str, F32], name: str, n_out: int, n_in: int) -> None:
        found[f"{name}.weight"] = self.normal((n_out, n_in), n_in**-0.5)
        found[f"{name}.bias"] = self.normal((n_out,), 0.05)


def _unified(draw: _Draw, encoder: TinyEncoder) -> dict[str, F32]:
    """Four patches of the file make one token."""
    n, n_pixels = encoder.n_embd, 3 * (2 * encoder.patch_size) ** 2
    found = {
        "v.patch_embd.weight": draw.normal((n, n_pixels), n_pixels**-0.5),
        "v.patch_embd.bias": draw.normal((n,), 0.1),
        "v.position_embd.weight": draw.normal((2, 1200, n), 0.5),
        "mm.input_projection.weight": draw.normal((encoder.width, n), n**-0.5),
    }
    for i, width in enumerate((n_pixels, n, n), start=1):
        draw.norm(found, f"v.patch_norm.{i}", width)
    return found


def _add_projector(found: dict[str, F32], draw: _Draw, encoder: TinyEncoder) -> None:
    n, width = encoder.n_embd, encoder.width
    if encoder.kind == "internvl":
        draw.norm(found, "mm.model.mlp.0", 4 * n)
        draw.linear(found, "mm.model.mlp.1", width, 4 * n)
        draw.linear(found, "mm.model.mlp.3", width, width)
        return
    if encoder.kind == "gemma3":
        found["mm.input_projection.weight"] = draw.normal((n, width), n**-0.5)
        found["mm.soft_emb_norm.weight"] = draw.scale(n)
        return
    if encoder.kind == "cogvlm":
        _add_gated_projector(found, draw, n, width)
        return
    for il in range(encoder.n_deepstack):
        draw.norm(found, f"v.deepstack.{il}.norm", 4 * n)
        draw.linear(found, f"v.deepstack.{il}.fc1", 4 * n, 4 * n)
        draw.linear(found, f"v.deepstack.{il}.fc2", width, 4 * n)
    if encoder.kind in ("qwen2vl", "qwen3vl"):
        draw.norm(found, "v.post_ln", n)
        draw.linear(found, "mm.0", 4 * n, 4 * n)
        draw.linear(found, "mm.2", width, 4 * n)
        return
    first, second = (0, 2) if encoder.kind == "clip" else (1, 2)
    draw.linear(found, f"mm.{first}", width, n)
    draw.linear(found, f"mm.{second}", width, width)


def _add_gated_projector(found: dict[str, F32], draw: _Draw, n: int, width: int) -> None:
    draw.norm(found, "mm.post_fc_norm", width)
    shapes = {
        "model.fc": (width, n),
        "up": (2 * width, width),
        "gate": (2 * width, width),
        "down": (width, 2 * width),
    }
    for part, shape in shapes.items():
        found[f"mm.{part}.weight"] = draw.normal(shape, shape[1] ** -0.5)
    for token in ("boi", "eoi"):
        found[f"v.{token}"] = draw.normal((width,), 1.0)


def _add_layer(found: dict[str, F32], draw: _Draw, encoder: TinyEncoder, name: str) -> None:
    n, n_ff = encoder.n_embd, encoder.n_ff
    if encoder.kind in ("qwen3vl", "cogvlm"):
        draw.linear(found, f"{name}.attn_qkv", 3 * n, n)
    else:
        for part in ("attn_q", "attn_k", "attn_v"):
            draw.linear(found, f"{name}.{part}", n, n)
    draw.linear(found, f"{name}.attn_out", n, n)
    if encoder.kind == "pixtral":
        for part in ("ln1", "ln2"):
            found[f"{name}.{part}.weight"] = draw.scale(n)
        draw.linear(found, f"{name}.ffn_gate", n_ff, n)
        draw.linear(found, f"{name}.ffn_up", n_ff, n)
        draw.linear(found, f"{name}.ffn_down", n, n_ff)
        for part in [key for key in found if key.startswith(name) and "ln" not in key]:
            if part.endswith(".bias"):
                del found[part]
        return
    for part in ("ln1", "ln2"):
        draw.norm(found, f"{name}.{part}", n)
    # CLIP files name these two the wrong way round.
    up, down = ("ffn_down", "ffn_up") if encoder.kind == "clip" else ("ffn_up", "ffn_down")
    draw.linear(found, f"{name}.{up}", n_ff, n)
    draw.linear(found, f"{name}.{down}", n, n_ff)
    if encoder.kind == "internvl":
        for part in ("ls1", "ls2"):
            found[f"{name}.{part}.weight"] = draw.scale(n)
