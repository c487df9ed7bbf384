"""A tiny random LLaVA as a GGUF pair, written in about a second.

    python tests/tiny_llava.py FOLDER      # writes the pair, prints both paths on two lines

The weights are random but not careless. They are scaled so that what the tests look at is there
to be seen: the image changes the logits, attention over image tokens is neither uniform nor
one-hot, greedy text goes on without repeating one token, and logits have an RMS of about 3.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray
from tiny_encoder import TinyEncoder, write_encoder
from tiny_states import add_delta_net, add_mamba2, add_state_shape
from tiny_vocabulary import (
    MAX_GRID,
    N_BYTES,
    N_SPECIAL,
    add_byte_pairs,
    add_pieces,
    byte_pairs,
    vocabulary,
)

Arch = Literal[
    "llama",
    "gemma3",
    "gemma4",
    "lfm2",
    "qwen35",
    "granitehybrid",
    "qwen2vl",
    "qwen3vl",
    "qwen3vlmoe",
]
STATEFUL = "qwen35", "granitehybrid"
SECTIONED: dict[str, Literal["qwen2vl", "qwen3vl"]] = {
    "qwen2vl": "qwen2vl",
    "qwen3vl": "qwen3vl",
    "qwen3vlmoe": "qwen3vl",
}
"""Models with M-RoPE, and their image encoders."""
CONVOLVED = 3
"""Rows that a short convolution of "lfm2" looks at, its own the last."""


@dataclass(frozen=True)
class TinyConfig:
    """The shape of a tiny pair. `n_embd / n_head` is the head size, an even number.

    For a Q8_0 KV cache the head size must be a multiple of 32: `n_embd=128, n_head=4`.

    Attributes:
        n_expert: feed-forward experts of each layer of "llama" and "qwen3vlmoe", 2 of them used; 0
            for one network.
        n_deepstack: first layers of "qwen3vl" and "qwen3vlmoe" behind which more of an image is
            added.
        sliding_window: positions a windowed layer sees, own included; "gemma3" only.
        swa_pattern: every `swa_pattern`-th layer of "gemma3" is global, the others are windowed.
        attending: layers with attention of a hybrid: "lfm2", whose others have a short convolution,
            and those of `tiny_states`.
        image_size, patch_size: pixels; the image becomes `n_image_tokens` tokens.
        mmproj_n_embd: output width of the projector; None for `n_embd`. Any other value makes
            a pair that does not fit together.
        tokenizer: "llama" is SentencePiece; "gpt2" is byte pairs, with chatml's special tokens.
        longest_edge: 0 for LLaVA's projector, which makes every image one square. Else SmolVLM's
            ("idefics3"): the longer edge gets this many pixels, and the image is cut into tiles of
            `image_size`, row by row, with text between them and a small view of all behind.
        any_resolution: Kimi-VL's projector, which takes pictures of any size: 4 patches a token,
            of its own accord 8 to 1024 tokens a picture.
    """

    arch: Arch = "llama"
    n_layer: int = 6
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 128
    n_expert: int = 0
    n_deepstack: int = 0
    n_ctx: int = 2048
    seed: int = 0
    sliding_window: int = 32
    swa_pattern: int = 3
    attending: tuple[int, ...] = (1, 3, 4)
    image_size: int = 56
    patch_size: int = 14
    vit_n_layer: int = 2
    vit_n_embd: int = 32
    vit_n_head: int = 2
    vit_n_ff: int = 64
    mmproj_n_embd: int | None = None
    tokenizer: Literal["llama", "gpt2"] = "llama"
    longest_edge: int = 0
    any_resolution: bool = False

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"n_embd {self.n_embd} over n_head {self.n_head} must be even")
        if self.n_head % self.n_head_kv:
            raise ValueError(f"n_head {self.n_head} must be a multiple of {self.n_head_kv}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size}: no multiple of {self.patch_size}")
        if self.longest_edge > MAX_GRID * self.image_size:
            raise ValueError(f"longest_edge {self.longest_edge}: over {MAX_GRID} tiles a row")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def n_image_tokens(self) -> int:
        """Of an image, or of a tile of it, for which four patches make one token."""
        merged = self.longest_edge or self.any_resolution or self.arch in SECTIONED
        return self.n_patches // 4 if merged else self.n_patches


class TinyPair(NamedTuple):
    """The two files of a pair."""

    llm: Path
    mmproj: Path


def write_pair(folder: Path | str, config: TinyConfig = TinyConfig()) -> TinyPair:
    """Paths of `llm.gguf` and `mmproj.gguf`, written to `folder`, which is made if missing.

    The same config gives the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pair = TinyPair(folder / "llm.gguf", folder / "mmproj.gguf")
    _write_llm(pair.llm, config)
    if config.arch in SECTIONED:
        write_encoder(pair.mmproj, _sectioned_encoder(config))
    else:
        _write_mmproj(pair.mmproj, config)
    return pair


class Weights:
    """Draws float32 tensors; the shapes are NumPy's, (n_out, n_in) for a matrix."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def matrix(self, n_out: int, n_in: int, gain: float = 1.0) -> NDArray[np.float32]:
        """An input of unit RMS gives an output of RMS `gain`."""
        return self.normal((n_out, n_in), gain / np.sqrt(n_in))

    def normal(self, shape: tuple[int, ...], std: float) -> NDArray[np.float32]:
        return (self._rng.standard_normal(shape) * std).astype(np.float32)

    def norm(self, n: int, gain: float = 1.0) -> NDArray[np.float32]:
        """A norm's scale, uneven, so that a test would notice if it were left out."""
        return (gain * self._rng.uniform(0.8, 1.2, n)).astype(np.float32)


def _write_llm(path: Path, config: TinyConfig) -> None:
    writer = gguf.GGUFWriter(path, config.arch)
    writer.add_name(f"tiny-random-llava-{config.arch}")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(_head_counts(config))
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    if config.n_expert:
        writer.add_expert_count(config.n_expert)
        writer.add_expert_used_count(2)
        if config.arch == "qwen3vlmoe":
            writer.add_expert_feed_forward_length(config.n_ff)
    if config.arch == "gemma3":
        writer.add_rope_freq_base(1e6)
        writer.add_rope_freq_base_swa(1e4)
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(config.swa_pattern)
    if config.arch == "gemma4":
        _add_gemma4_shape(writer, config)
    if config.arch == "lfm2":
        writer.add_shortconv_l_cache(CONVOLVED)
    if config.arch in SECTIONED:
        _add_sections(writer, config)
    if config.arch in STATEFUL:
        add_state_shape(writer, config)
    if config.tokenizer == "gpt2":
        add_byte_pairs(writer)
    else:
        add_pieces(writer, tiles=config.longest_edge > 0)
    weights = Weights(config.seed)
    _add_embeddings(writer, weights, config)
    for il in range(config.n_layer):
        if config.arch.startswith("gemma"):
            _add_gemma3_layer(writer, weights, config, il)
        elif config.arch == "lfm2":
            _add_lfm2_layer(writer, weights, config, il)
        elif config.arch in STATEFUL:
            _add_stateful_layer(writer, weights, config, il)
        else:
            _add_llama_layer(writer, weights, config, il)
    _finish(writer)


def _add_gemma4_shape(writer: gguf.GGUFWriter, config: TinyConfig) -> None:
    """The last two layers read the caches of the two below them: windowed, global."""
    windowed = [(il + 1) % 2 == 1 for il in range(config.n_layer)]
    writer.add_rope_freq_base(1e6)
    writer.add_rope_freq_base_swa(1e4)
    writer.add_sliding_window(config.sliding_window)
    writer.add_array("gemma4.attention.sliding_window_pattern", windowed)
    writer.add_final_logit_softcapping(0.0)  # else llama.cpp takes 30
    writer.add_uint32("gemma4.attention.shared_kv_layers", 2)
    writer.add_uint32("gemma4.embedding_length_per_layer_input", 0)
    writer.add_uint32("gemma4.attention.key_length_swa", config.head_dim)
    writer.add_uint32("gemma4.attention.value_length_swa", config.head_dim)
    writer.add_uint32("gemma4.rope.dimension_count_swa", config.head_dim)
    writer.add_tensor("rope_freqs.weight", np.ones(config.head_dim // 2, np.float32))


def _add_sections(writer: gguf.GGUFWriter, config: TinyConfig) -> None:
    """Which of a head's pairs turn with the time, the row and the column."""
    n = config.head_dim // 2
    writer.add_rope_dimension_sections([n - 2 * (n // 3), n // 3, n // 3, 0])
    if config.n_deepstack:
        writer.add_num_deepstack_layers(config.n_deepstack)


def _sectioned_encoder(config: TinyConfig) -> TinyEncoder:
    return TinyEncoder(
        SECTIONED[config.arch],
        width=config.n_embd,
        n_deepstack=config.n_deepstack,
        image_size=config.image_size,
        patch_size=config.patch_size,
        seed=config.seed + 1,
    )


def _head_counts(config: TinyConfig) -> int | list[int]:
    """Of keys; a layer with none has no attention."""
    if config.arch not in ("lfm2", "granitehybrid"):
        return config.n_head_kv
    return [config.n_head_kv if il in config.attending else 0 for il in range(config.n_layer)]


def _add_embeddings(writer: gguf.GGUFWriter, weights: Weights, config: TinyConfig) -> None:
    """Input and output embeddings.

    Each output row points away from the same token's input: a token speaks against its own
    repetition, which else is where greedy text on random weights ends. Specials and bytes get
    small rows: their logits stay near 0 where the others have an RMS of 3, so that greedy text
    neither stops nor leaves valid UTF-8.
    """
    pieces = vocabulary(tiles=config.longest_edge > 0)
    if config.tokenizer == "gpt2":
        pieces = byte_pairs()[0]
    n_vocab, n_embd = len(pieces), config.n_embd
    tokens = weights.normal((n_vocab, n_embd), 1.0)
    output = weights.matrix(n_vocab, n_embd, gain=2.4) - tokens * np.float32(1.8 / n_embd**0.5)
    output[: N_SPECIAL + N_BYTES] *= 0.1
    # Gemma multiplies token embeddings by sqrt(n_embd), but not image embeddings.
    scale = np.float32(n_embd**-0.5 if config.arch.startswith("gemma") else 1.0)
    writer.add_tensor("token_embd.weight", tokens * scale)
    norm = "token_embd_norm" if config.arch == "lfm2" else "output_norm"
    writer.add_tensor(f"{norm}.weight", weights.norm(n_embd))
    writer.add_tensor("output.weight", output)


def _add_llama_layer(
    writer: gguf.GGUFWriter, weights: Weights, config: TinyConfig, il: int
) -> None:
    # Scores have a standard deviation of 1.5 * 1.5: peaked, not one-hot.
    _add_projections(writer, weights, config, il=il, qk_gain=1.5, out_gain=2.0)
    writer.add_tensor(f"blk.{il}.attn_norm.weight", weights.norm(config.n_embd))
    writer.add_tensor(f"blk.{il}.ffn_norm.weight", weights.norm(config.n_embd))
    for name in ("attn_q_norm", "attn_k_norm") if config.arch.startswith("qwen3vl") else ():
        writer.add_tensor(f"blk.{il}.{name}.weight", weights.norm(config.head_dim, gain=1.25))


def _add_gemma3_layer(
    writer: gguf.GGUFWriter, weights: Weights, config: TinyConfig, il: int
) -> None:
    # The CPU looks GELU up in an F16 table below 10: with gates far above that, what tests
    # compare does not drown in rounding. A norm follows, so the size itself is of no effect.
    _add_projections(writer, weights, config, il=il, gate_gain=1000.0)
    # gemma4 does not divide scores by sqrt(head_dim): its norms do.
    gain = 1.25 * (config.head_dim**-0.25 if config.arch == "gemma4" else 1.0)
    for name in ("attn_q_norm", "attn_k_norm"):
        writer.add_tensor(f"blk.{il}.{name}.weight", weights.norm(config.head_dim, gain=gain))
    gains = {"attn_norm": 1.0, "post_attention_norm": 0.8, "ffn_norm": 1.0, "post_ffw_norm": 0.5}
    for name, gain in gains.items():
        writer.add_tensor(f"blk.{il}.{name}.weight", weights.norm(config.n_embd, gain=gain))


def _add_lfm2_layer(writer: gguf.GGUFWriter, weights: Weights, config: TinyConfig, il: int) -> None:
    """A hybrid's: attention in some layers, in the others a convolution over the newest rows."""
    n_embd, attends = config.n_embd, il in config.attending
    _add_feed_forward(writer, weights, config, il)
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.{il}.{name}.weight", weights.norm(n_embd))
    if attends:
        _add_attention(writer, weights, config, il, out_gain=2.0)
        for name in ("attn_q_norm", "attn_k_norm"):
            writer.add_tensor(f"blk.{il}.{name}.weight", weights.norm(config.head_dim, gain=1.25))
        return
    tensors = {
        "conv": weights.normal((n_embd, CONVOLVED), CONVOLVED**-0.5),
        "in_proj": weights.matrix(3 * n_embd, n_embd),
        "out_proj": weights.matrix(n_embd, n_embd),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(f"blk.{il}.shortconv.{name}.weight", tensor)


def _add_stateful_layer(
    writer: gguf.GGUFWriter, weights: Weights, config: TinyConfig, il: int
) -> None:
    """A hybrid's: attention in some layers, in the others a state."""
    qwen = config.arch == "qwen35"
    _add_feed_forward(writer, weights, config, il)
    for name in ("attn_norm", "post_attention_norm" if qwen else "ffn_norm"):
        writer.add_tensor(f"blk.{il}.{name}.weight", weights.norm(config.n_embd))
    if il not in config.attending:
        (add_delta_net if qwen else add_mamba2)(writer, weights, config, il)
        return
    # The queries of "qwen35" bring a gate of their width along.
    widths = 2 if qwen else 1
    gain = 1.0 if qwen else 1.5
    _add_attention(writer, weights, config, il, qk_gain=gain, out_gain=2.0, q_widths=widths)
    for name in ("attn_q_norm", "attn_k_norm") if qwen else ():
        writer.add_tensor(f"blk.{il}.{name}.weight", weights.norm(config.head_dim, gain=1.25))


def _add_projections(
    writer: gguf.GGUFWriter,
    weights: Weights,
    config: TinyConfig,
    *,
    il: int,
    qk_gain: float = 1.0,
    out_gain: float = 1.0,
    gate_gain: float = 1.0,
) -> None:
    _add_attention(writer, weights, config, il, qk_gain=qk_gain, out_gain=out_gain)
    if config.n_expert:
        _add_experts(writer, weights, config, il)
    else:
        _add_feed_forward(writer, weights, config, il, gate_gain=gate_gain)


def _add_attention(
    writer: gguf.GGUFWriter,
    weights: Weights,
    config: TinyConfig,
    il: int,
    *,
    qk_gain: float = 1.0,
    out_gain: float = 1.0,
    q_widths: int = 1,
) -> None:
    n_embd = config.n_embd
    n_kv = config.n_head_kv * config.head_dim
    tensors = {
        "attn_q": weights.matrix(q_widths * n_embd, n_embd, qk_gain),
        "attn_k": weights.matrix(n_kv, n_embd, qk_gain),
        "attn_v": weights.matrix(n_kv, n_embd),
        "attn_output": weights.matrix(n_embd, n_embd, out_gain),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(f"blk.{il}.{name}.weight", tensor)


def _add_feed_forward(
    writer: gguf.GGUFWriter,
    weights: Weights,
    config: TinyConfig,
    il: int,
    *,
    gate_gain: float = 1.0,
) -> None:
    n_embd, n_ff = config.n_embd, config.n_ff
    tensors = {
        "ffn_gate": weights.matrix(n_ff, n_embd, gate_gain),
        "ffn_up": weights.matrix(n_ff, n_embd),
        "ffn_down": weights.matrix(n_embd, n_ff),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(f"blk.{il}.{name}.weight", tensor)


def _add_experts(writer: gguf.GGUFWriter, weights: Weights, config: TinyConfig, il: int) -> None:
    n_embd, n_ff, n = config.n_embd, config.n_ff, config.n_expert
    shapes = {"gate": (n, n_ff, n_embd), "up": (n, n_ff, n_embd), "down": (n, n_embd, n_ff)}
    writer.add_tensor(f"blk.{il}.ffn_gate_inp.weight", weights.matrix(n, n_embd))
    for name, shape in shapes.items():
        tensor = weights.normal(shape, shape[-1] ** -0.5)
        writer.add_tensor(f"blk.{il}.ffn_{name}_exps.weight", tensor)


def _write_mmproj(path: Path, config: TinyConfig) -> None:
    writer = gguf.GGUFWriter(path, "clip")
    width = config.n_embd if config.mmproj_n_embd is None else config.mmproj_n_embd
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", _projector_type(config))
    writer.add_bool("clip.use_gelu", False)  # false means quick-GELU, CLIP's own
    # LLaVA's graph skips the last block; that block need not even be in the file.
    all_run = config.longest_edge or config.any_resolution
    n_blocks = config.vit_n_layer + (0 if all_run else 1)
    writer.add_uint32("clip.vision.block_count", n_blocks)
    if config.longest_edge:
        writer.add_uint32("clip.vision.preproc_image_size", config.longest_edge)
    if all_run:
        writer.add_uint32("clip.vision.projector.scale_factor", 2)
    writer.add_uint32("clip.vision.image_size", config.image_size)
    writer.add_uint32("clip.vision.patch_size", config.patch_size)
    writer.add_uint32("clip.vision.embedding_length", config.vit_n_embd)
    writer.add_uint32("clip.vision.feed_forward_length", config.vit_n_ff)
    writer.add_uint32("clip.vision.projection_dim", width)
    writer.add_uint32("clip.vision.attention.head_count", config.vit_n_head)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    weights = Weights(config.seed + 1)
    _add_vit_stem(writer, weights, config)
    for il in range(n_blocks):
        _add_vit_layer(writer, weights, config, il)
    if config.longest_edge:
        matrix = weights.matrix(width, 4 * config.vit_n_embd, 2.0)
        writer.add_tensor("mm.model.fc.weight", matrix)
    elif config.any_resolution:
        writer.add_tensor("mm.input_norm.weight", weights.norm(config.vit_n_embd))
        writer.add_tensor("mm.input_norm.bias", weights.normal((config.vit_n_embd,), 0.05))
        _add_linear(writer, weights, "mm.1", (width, 4 * config.vit_n_embd))
        _add_linear(writer, weights, "mm.2", (width, width), gain=2.0)
    else:
        _add_linear(writer, weights, "mm.0", (width, config.vit_n_embd))
        _add_linear(writer, weights, "mm.2", (width, width), gain=2.0)
    _finish(writer)


def _projector_type(config: TinyConfig) -> str:
    if config.any_resolution:
        return "kimivl"
    return "idefics3" if config.longest_edge else "mlp"


def _add_vit_stem(writer: gguf.GGUFWriter, weights: Weights, config: TinyConfig) -> None:
    """Patch and position embeddings; without a class embedding, which would cost patch 0."""
    n, patch = config.vit_n_embd, config.patch_size
    # Pixels are in [-1, 1]; what a patch shows must weigh more than where it is.
    kernel = weights.normal((n, 3, patch, patch), 3.0 / patch)
    writer.add_tensor("v.patch_embd.weight", kernel)
    writer.add_tensor("v.position_embd.weight", weights.normal((config.n_patches, n), 0.5))
    for name in ("pre_ln", "post_ln"):
        writer.add_tensor(f"v.{name}.weight", weights.norm(n))
        writer.add_tensor(f"v.{name}.bias", weights.normal((n,), 0.05))


def _add_vit_layer(writer: gguf.GGUFWriter, weights: Weights, config: TinyConfig, il: int) -> None:
    n, n_ff = config.vit_n_embd, config.vit_n_ff
    for name in ("ln1", "ln2"):
        writer.add_tensor(f"v.blk.{il}.{name}.weight", weights.norm(n))
        writer.add_tensor(f"v.blk.{il}.{name}.bias", weights.normal((n,), 0.05))
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        _add_linear(writer, weights, f"v.blk.{il}.{name}", (n, n))
    # Files of older models name these two the wrong way round.
    into, back = ("ffn_up", "ffn_down") if config.any_resolution else ("ffn_down", "ffn_up")
    _add_linear(writer, weights, f"v.blk.{il}.{into}", (n_ff, n))
    _add_linear(writer, weights, f"v.blk.{il}.{back}", (n, n_ff))


def _add_linear(
    writer: gguf.GGUFWriter,
    weights: Weights,
    name: str,
    shape: tuple[int, int],
    *,
    gain: float = 1.0,
) -> None:
    writer.add_tensor(f"{name}.weight", weights.matrix(*shape, gain))
    writer.add_tensor(f"{name}.bias", weights.normal(shape[:1], 0.05))


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(arguments: Sequence[str]) -> int:
    """Exit status; writes the default pair to the one folder named."""
    if len(arguments) != 1:
        print("usage: tiny_llava.py FOLDER", file=sys.stderr)
        return 2
    for path in write_pair(arguments[0]):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
