"""A random LLaVA of 1.1 billion parameters as a GGUF pair, for measuring speed and memory.

    python scripts/benchmark_model.py FOLDER q4_0      # writes the pair, prints both paths

The language model has TinyLlama's shape: 22 layers, 2048 wide, 32 heads on 4 KV heads, 32,000
tokens. The image encoder is as small as one can be: it makes 576 image tokens in no time. What the
model says means nothing; how long it takes is what a trained one of this shape takes.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

Quant = Literal["q4_0", "q8_0"]

VERSION = 1
"""Part of the file names: another recipe is another file."""

N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_VOCAB = 22, 2048, 32, 4, 5632, 32_000
HEAD_DIM = N_EMBD // N_HEAD
PATCH = 14
VIT_N_LAYER, VIT_N_EMBD, VIT_N_HEAD, VIT_N_FF = 2, 64, 2, 128
END_TOKEN = 2
SPACE = "\u2581"

Weights = NDArray[np.float32]


class Pair(NamedTuple):
    """The two files of a model."""

    llm: Path
    mmproj: Path


@dataclass(frozen=True)
class Matrix:
    """A random matrix of the language model: an input of unit RMS gives one of RMS `gain`."""

    name: str
    n_out: int
    n_in: int
    gain: float = 1.0


def benchmark_pair(folder: Path, quant: Quant, *, n_image_tokens: int = 576) -> Pair:
    """Paths of the pair in `folder`; what is not there yet is written, with progress on stderr.

    n_image_tokens: a square number. The same arguments give the same bytes.
    """
    side = math.isqrt(max(0, n_image_tokens))
    if side < 1 or side * side != n_image_tokens:
        raise ValueError(f"{n_image_tokens} image tokens: not a square, as 576 = 24 * 24 is")
    folder.mkdir(parents=True, exist_ok=True)
    pair = Pair(
        folder / f"random-1.1b-v{VERSION}-{quant}.gguf",
        folder / f"random-mmproj-v{VERSION}-{n_image_tokens}.gguf",
    )
    if not pair.llm.exists():
        _write_llm(pair.llm, quant)
    if not pair.mmproj.exists():
        write_mmproj(pair.mmproj, side)
    return pair


def cache_folder() -> Path:
    """The user's folder for files that can be made again, one of ours in it."""
    home = Path.home()
    base = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or base) / "cmg-gguf-bench"


@dataclass(frozen=True)
class Request:
    """A prompt of known length: text, an image, text. Its first token opens the sequence."""

    n_before: int
    n_image_tokens: int
    n_after: int

    def text(self, marker: str) -> str:
        """The prompt with `marker` for the image; every word is one token."""
        return _words(0, self.n_before - 1) + marker + _words(1000, self.n_after)

    def image(self) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 random pixels, of the size that the encoder takes."""
        size = PATCH * math.isqrt(self.n_image_tokens)
        return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


def _words(first: int, n: int) -> str:
    return " ".join(f"w{first + i}" for i in range(n))


def _vocabulary() -> list[str]:
    """The words w0, w1, ... and what they are merged from; each starts with a shorter one."""
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    letters = [SPACE, "w", *"0123456789", f"{SPACE}w"]
    n_words = N_VOCAB - len(special) - len(letters)
    return special + letters + [f"{SPACE}w{i}" for i in range(n_words)]


def _write_llm(path: Path, quant: Quant) -> None:
    qtype = gguf.GGMLQuantizationType[quant.upper()]
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_name("random 1.1B")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"])
    writer.add_context_length(4096)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer)
    norms = ["output_norm.weight"]
    for il in range(N_LAYER):
        norms += [f"blk.{il}.attn_norm.weight", f"blk.{il}.ffn_norm.weight"]
    ones = np.ones(N_EMBD, np.float32)
    for name in norms:
        writer.add_tensor_info(name, ones.shape, ones.dtype, ones.nbytes)
    matrices = list(_matrices())
    write_tensors(writer, [ones] * len(norms), matrices, qtype, f"writing {path.name}")
    part.replace(path)


def write_tensors(
    writer: Any,
    small: Sequence[Weights],
    matrices: Sequence[Matrix],
    qtype: gguf.GGMLQuantizationType,
    label: str,
) -> None:
    """Writes the file: `small`, of which the writer has been told, then random matrices."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    for m in matrices:
        shape = (m.n_out, m.n_in // block * block_bytes)
        writer.add_tensor_info(m.name, shape, np.dtype(np.uint8), int(np.prod(shape)), qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in small:
        writer.write_tensor_data(values)
    rng = np.random.default_rng(0)
    # One matrix at a time: the whole model never stands in memory.
    for m in _tracked(matrices, label):
        writer.write_tensor_data(quantize(_normal(rng, (m.n_out, m.n_in), m.gain), qtype))
    writer.close()


def _matrices() -> Iterator[Matrix]:
    # A row of the embedding is an "output" of a one-hot input: unit RMS needs this gain.
    yield Matrix("token_embd.weight", N_VOCAB, N_EMBD, gain=N_EMBD**0.5)
    yield Matrix("output.weight", N_VOCAB, N_EMBD, gain=3.0)
    n_kv = N_HEAD_KV * HEAD_DIM
    for il in range(N_LAYER):
        # Attention scores with a standard deviation of 1.5 * 1.5: peaked, not one-hot.
        yield Matrix(f"blk.{il}.attn_q.weight", N_EMBD, N_EMBD, gain=1.5)
        yield Matrix(f"blk.{il}.attn_k.weight", n_kv, N_EMBD, gain=1.5)
        yield Matrix(f"blk.{il}.attn_v.weight", n_kv, N_EMBD)
        yield Matrix(f"blk.{il}.attn_output.weight", N_EMBD, N_EMBD)
        yield Matrix(f"blk.{il}.ffn_gate.weight", N_FF, N_EMBD)
        yield Matrix(f"blk.{il}.ffn_up.weight", N_FF, N_EMBD)
        yield Matrix(f"blk.{il}.ffn_down.weight", N_EMBD, N_FF)


def add_tokenizer(writer: Any) -> None:
    kind = gguf.TokenType
    pieces = _vocabulary()
    n_plain = len(pieces) - 259
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_types(
        [kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256 + [kind.NORMAL] * n_plain
    )
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(n_plain)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(END_TOKEN)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def write_mmproj(path: Path, side: int) -> None:
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", False)
    # LLaVA's graph skips the last block.
    writer.add_uint32("clip.vision.block_count", VIT_N_LAYER + 1)
    writer.add_uint32("clip.vision.image_size", side * PATCH)
    writer.add_uint32("clip.vision.patch_size", PATCH)
    writer.add_uint32("clip.vision.embedding_length", VIT_N_EMBD)
    writer.add_uint32("clip.vision.feed_forward_length", VIT_N_FF)
    writer.add_uint32("clip.vision.projection_dim", N_EMBD)
    writer.add_uint32("clip.vision.attention.head_count", VIT_N_HEAD)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    rng = np.random.default_rng(1)
    kernel = rng.standard_normal((VIT_N_EMBD, 3, PATCH, PATCH), dtype=np.float32)
    writer.add_tensor("v.patch_embd.weight", kernel * np.float32(3.0 / PATCH))
    positions = rng.standard_normal((side * side, VIT_N_EMBD), dtype=np.float32)
    writer.add_tensor("v.position_embd.weight", positions * np.float32(0.5))
    for name in ("pre_ln", "post_ln"):
        _add_norm(writer, f"v.{name}")
    for il in range(VIT_N_LAYER + 1):
        _add_vit_layer(writer, rng, f"v.blk.{il}")
    _add_linear(writer, rng, "mm.0", (N_EMBD, VIT_N_EMBD))
    _add_linear(writer, rng, "mm.2", (N_EMBD, N_EMBD))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


def _add_vit_layer(writer: Any, rng: np.random.Generator, block: str) -> None:
    n = VIT_N_EMBD
    for name in ("ln1", "ln2"):
        _add_norm(writer, f"{block}.{name}")
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        _add_linear(writer, rng, f"{block}.{name}", (n, n))
    # CLIP files name these two the wrong way round.
    _add_linear(writer, rng, f"{block}.ffn_down", (VIT_N_FF, n))
    _add_linear(writer, rng, f"{block}.ffn_up", (n, VIT_N_FF))


def _add_norm(writer: Any, name: str) -> None:
    writer.add_tensor(f"{name}.weight", np.ones(VIT_N_EMBD, np.float32))
    writer.add_tensor(f"{name}.bias", np.zeros(VIT_N_EMBD, np.float32))


def _add_linear(writer: Any, rng: np.random.Generator, name: str, shape: tuple[int, int]) -> None:
    writer.add_tensor(f"{name}.weight", _normal(rng, shape, 1.0))
    writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))


def _normal(rng: np.random.Generator, shape: tuple[int, int], gain: float) -> Weights:
    values: Weights = rng.standard_normal(shape, dtype=np.float32)
    values *= np.float32(gain / shape[1] ** 0.5)
    return values


def _tracked(matrices: Sequence[Matrix], label: str) -> Iterable[Matrix]:
    return track(matrices, description=label, console=Console(stderr=True))


def main(arguments: Sequence[str]) -> int:
    """Exit status; writes the pair to the folder named."""
    if len(arguments) != 2 or arguments[1] not in get_args(Quant):
        print(f"usage: benchmark_model.py FOLDER {'|'.join(get_args(Quant))}", file=sys.stderr)
        return 2
    quant: Quant = "q4_0" if arguments[1] == "q4_0" else "q8_0"
    for path in benchmark_pair(Path(arguments[0]), quant):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
