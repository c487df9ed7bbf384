"""A random hybrid of 0.7 billion parameters as a GGUF pair: `benchmark_model.py`'s, with states.

    python scripts/benchmark_hybrid.py FOLDER      # writes the pair, prints both paths

The language model has the layers of Qwen3.5 2B, half as many: three gated delta nets, then one that
attends, 2048 wide. A sequence has a state of 9.5 MiB. Q4_0.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
from benchmark_model import Matrix, Pair, Weights, add_tokenizer, write_mmproj, write_tensors

VERSION = 1
N_LAYER, N_EMBD, N_FF, N_VOCAB = 12, 2048, 6144, 32_000
N_HEAD, N_HEAD_KV, HEAD_DIM = 8, 2, 256
EVERY = 4
"""One layer of so many attends, the last."""
N_STATE, N_GROUP, CONVOLVED = 128, 16, 4
N_MIXED = 3 * N_GROUP * N_STATE
Q4_0 = gguf.GGMLQuantizationType.Q4_0


def hybrid_pair(folder: Path, *, side: int = 24) -> Pair:
    """Paths of the pair in `folder`; what is not there yet is written. side: squared, the image
    tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    pair = Pair(
        folder / f"random-hybrid-v{VERSION}-q4_0.gguf",
        folder / f"random-mmproj-v1-{side * side}.gguf",
    )
    if not pair.llm.exists():
        _write_llm(pair.llm)
    if not pair.mmproj.exists():
        write_mmproj(pair.mmproj, side)
    return pair


def _write_llm(path: Path) -> None:
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "qwen35")
    writer.add_name("random hybrid")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_context_length(4096)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM // 4)
    writer.add_rope_dimension_sections([11, 11, 10, 0])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_full_attention_interval(EVERY)
    writer.add_ssm_conv_kernel(CONVOLVED)
    writer.add_ssm_state_size(N_STATE)
    writer.add_ssm_inner_size(N_GROUP * N_STATE)
    writer.add_ssm_time_step_rank(N_GROUP)
    writer.add_ssm_group_count(N_GROUP)
    add_tokenizer(writer)
    small = dict(_small())
    for name, values in small.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    label = f"writing {path.name}"
    write_tensors(writer, list(small.values()), list(_matrices()), Q4_0, label)
    part.replace(path)


def _small() -> Iterator[tuple[str, Weights]]:
    """Tensors that are no matrices, or too narrow to be quantised."""
    rng = np.random.default_rng(2)

    def ones(*shape: int, gain: float = 1.0) -> Weights:
        return np.full(shape, gain, np.float32)

    def random(*shape: int) -> Weights:
        drawn: Weights = rng.standard_normal(shape, dtype=np.float32)
        drawn *= np.float32(shape[-1] ** -0.5)
        return drawn

    yield "output_norm.weight", ones(N_EMBD)
    for il in range(N_LAYER):
        yield f"blk.{il}.attn_norm.weight", ones(N_EMBD)
        yield f"blk.{il}.post_attention_norm.weight", ones(N_EMBD)
        if _attends(il):
            yield f"blk.{il}.attn_q_norm.weight", ones(HEAD_DIM, gain=1.25)
            yield f"blk.{il}.attn_k_norm.weight", ones(HEAD_DIM, gain=1.25)
            continue
        yield f"blk.{il}.ssm_conv1d.weight", random(N_MIXED, CONVOLVED)
        yield f"blk.{il}.ssm_dt.bias", random(N_GROUP)
        yield f"blk.{il}.ssm_a", ones(N_GROUP, gain=-0.1)
        yield f"blk.{il}.ssm_alpha.weight", random(N_GROUP, N_EMBD)
        yield f"blk.{il}.ssm_beta.weight", random(N_GROUP, N_EMBD)
        yield f"blk.{il}.ssm_norm.weight", ones(N_STATE)


def _matrices() -> Iterator[Matrix]:
    yield Matrix("token_embd.weight", N_VOCAB, N_EMBD, gain=N_EMBD**0.5)
    yield Matrix("output.weight", N_VOCAB, N_EMBD, gain=3.0)
    n_values = N_GROUP * N_STATE
    for il in range(N_LAYER):
        if _attends(il):
            yield Matrix(f"blk.{il}.attn_q.weight", 2 * N_HEAD * HEAD_DIM, N_EMBD)
            yield Matrix(f"blk.{il}.attn_k.weight", N_HEAD_KV * HEAD_DIM, N_EMBD)
            yield Matrix(f"blk.{il}.attn_v.weight", N_HEAD_KV * HEAD_DIM, N_EMBD)
            yield Matrix(f"blk.{il}.attn_output.weight", N_EMBD, N_HEAD * HEAD_DIM, gain=2.0)
        else:
            yield Matrix(f"blk.{il}.attn_qkv.weight", N_MIXED, N_EMBD)
            yield Matrix(f"blk.{il}.attn_gate.weight", n_values, N_EMBD)
            yield Matrix(f"blk.{il}.ssm_out.weight", N_EMBD, n_values)
        yield Matrix(f"blk.{il}.ffn_gate.weight", N_FF, N_EMBD)
        yield Matrix(f"blk.{il}.ffn_up.weight", N_FF, N_EMBD)
        yield Matrix(f"blk.{il}.ffn_down.weight", N_EMBD, N_FF)


def _attends(il: int) -> bool:
    return il % EVERY == EVERY - 1


def main(arguments: Sequence[str]) -> int:
    """Exit status; writes the pair to the folder named."""
    if len(arguments) != 1:
        print("usage: benchmark_hybrid.py FOLDER", file=sys.stderr)
        return 2
    for path in hybrid_pair(Path(arguments[0])):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
