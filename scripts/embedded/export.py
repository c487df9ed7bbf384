"""GGUF files that llama.cpp takes for what they are: a llama model and a LLaVA mmproj."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from embedded.model import EPS, ROPE_BASE, Encoder, LanguageModel, Llava
from embedded.sizes import IMAGE, PATCH, Size
from embedded.tokenizer import BOS, CHAT_TEMPLATE, EOS, UNK, Tokenizer

NAME = "cmg-gguf tiny LLaVA"
N_CTX = 1024

Kind = Literal["f32", "f16", "q8_0"]
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def write_model(
    lm: LanguageModel, tokenizer: Tokenizer, size: Size, path: Path, matrices: Kind = "q8_0"
) -> None:
    """The language model. matrices: how these are stored."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(NAME)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(size.n_embd)
    writer.add_block_count(size.n_layer)
    writer.add_feed_forward_length(size.n_ff)
    writer.add_head_count(size.n_head)
    writer.add_head_count_kv(size.n_head)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_dimension_count(size.n_embd // size.n_head)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_file_type(FILE_TYPES[matrices])
    n_vocab = _add_tokenizer(writer, tokenizer)
    _add(writer, "token_embd.weight", lm.embed.weight[:n_vocab], matrices)
    _add(writer, "output_norm.weight", lm.norm.weight)
    _add(writer, "output.weight", lm.out.weight[:n_vocab], matrices)
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    names |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    for il, block in enumerate(lm.blocks):
        _add(writer, f"blk.{il}.attn_norm.weight", block.norm1.weight)
        _add(writer, f"blk.{il}.ffn_norm.weight", block.norm2.weight)
        for ours, theirs in names.items():
            _add(writer, f"blk.{il}.{theirs}.weight", getattr(block, ours).weight, matrices)
    _finish(writer)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> int:
    pieces = tokenizer.pieces
    n_vocab: int = pieces.vocab_size()
    kinds = []
    for i in range(n_vocab):
        kind = gguf.TokenType.NORMAL
        if pieces.is_unknown(i):
            kind = gguf.TokenType.UNKNOWN
        elif pieces.is_control(i):
            kind = gguf.TokenType.CONTROL
        elif pieces.is_byte(i):
            kind = gguf.TokenType.BYTE
        kinds.append(kind)
    writer.add_vocab_size(n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([pieces.id_to_piece(i).encode() for i in range(n_vocab)])
    writer.add_token_scores([pieces.get_score(i) for i in range(n_vocab)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNK)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    writer.add_chat_template(CHAT_TEMPLATE)
    return n_vocab


def write_projector(model: Llava, size: Size, path: Path) -> None:
    """Image encoder and projector; matrices as F16.

    llama.cpp's LLaVA graph leaves the last block out, so one more is written than is used; without
    a class token it takes every patch. Its feed-forward names are the wrong way round.
    """
    writer = gguf.GGUFWriter(str(path), "clip")
    writer.add_name(NAME)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", False)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for key, value in (
        ("image_size", IMAGE),
        ("patch_size", PATCH),
        ("embedding_length", size.v_embd),
        ("feed_forward_length", size.v_ff),
        ("block_count", size.v_layer + 1),
        ("projection_dim", size.n_embd),
        ("attention.head_count", size.v_head),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", EPS)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    _add_encoder(writer, model.encoder, size)
    _add_linear(writer, "mm.0", model.projector.first)
    _add_linear(writer, "mm.2", model.projector.second)
    _finish(writer)


def _add_encoder(writer: gguf.GGUFWriter, encoder: Encoder, size: Size) -> None:
    patch = encoder.patch.weight.reshape(size.v_embd, 3, PATCH, PATCH)
    _add(writer, "v.patch_embd.weight", patch, "f16")
    _add(writer, "v.position_embd.weight", encoder.position)
    _add_norm(writer, "v.pre_ln", encoder.pre)
    _add_norm(writer, "v.post_ln", encoder.post)
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_out"}
    names |= {"up": "ffn_down", "down": "ffn_up"}
    for il in range(size.v_layer + 1):
        block = encoder.blocks[min(il, size.v_layer - 1)]
        _add_norm(writer, f"v.blk.{il}.ln1", block.ln1)
        _add_norm(writer, f"v.blk.{il}.ln2", block.ln2)
        for ours, theirs in names.items():
            _add_linear(writer, f"v.blk.{il}.{theirs}", getattr(block, ours))


def _add_linear(writer: gguf.GGUFWriter, name: str, linear: nn.Linear) -> None:
    _add(writer, f"{name}.weight", linear.weight, "f16")
    _add(writer, f"{name}.bias", linear.bias)


def _add_norm(writer: gguf.GGUFWriter, name: str, norm: nn.LayerNorm) -> None:
    _add(writer, f"{name}.weight", norm.weight)
    _add(writer, f"{name}.bias", norm.bias)


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: Kind = "f32") -> None:
    array: NDArray[np.float32] = np.ascontiguousarray(tensor.detach().float().numpy())
    if kind == "f16":
        writer.add_tensor(name, array.astype(np.float16))
    elif kind == "q8_0":
        q8_0 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(array, q8_0), raw_dtype=q8_0)
    else:
        writer.add_tensor(name, array)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
