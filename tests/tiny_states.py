"""Layers with a state, for tiny random models: they attend to nothing, and carry on what they read.

"qwen35" has gated delta nets, "granitehybrid" Mamba 2; either has a short convolution before them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np

if TYPE_CHECKING:
    from tiny_llava import TinyConfig, Weights

CONVOLVED = 4
"""Rows that the convolution looks at, its own the last."""
N_STATE = 16
"""Width of a head's state."""
N_HEAD, N_GROUP = 4, 2
"""Heads, and groups of them that share keys, of a gated delta net."""
HEAD_DIM = 16
"""Of a head of Mamba 2."""


def add_state_shape(writer: gguf.GGUFWriter, config: TinyConfig) -> None:
    """Metadata of the layers with a state."""
    qwen = config.arch == "qwen35"
    n_inner = N_HEAD * N_STATE if qwen else 2 * config.n_embd
    writer.add_ssm_conv_kernel(CONVOLVED)
    writer.add_ssm_state_size(N_STATE)
    writer.add_ssm_inner_size(n_inner)
    writer.add_ssm_time_step_rank(N_HEAD if qwen else n_inner // HEAD_DIM)
    writer.add_ssm_group_count(N_GROUP if qwen else 1)
    if qwen:
        n = config.head_dim // 2
        writer.add_rope_dimension_sections([n - 2 * (n // 3), n // 3, n // 3, 0])
        recurrent = [il not in config.attending for il in range(config.n_layer)]
        writer.add_array("qwen35.attention.recurrent_layers", recurrent)


def add_delta_net(writer: gguf.GGUFWriter, weights: Weights, config: TinyConfig, il: int) -> None:
    """A gated delta net: a state that each row corrects towards its own keys and values."""
    n_embd, n_values, n_keys = config.n_embd, N_HEAD * N_STATE, N_GROUP * N_STATE
    tensors = {
        "attn_qkv.weight": weights.matrix(2 * n_keys + n_values, n_embd),
        "attn_gate.weight": weights.matrix(n_values, n_embd),
        "ssm_conv1d.weight": weights.normal((2 * n_keys + n_values, CONVOLVED), CONVOLVED**-0.5),
        "ssm_dt.bias": weights.normal((N_HEAD,), 0.5),
        "ssm_a": -weights.norm(N_HEAD, 0.2),
        "ssm_beta.weight": weights.matrix(N_HEAD, n_embd),
        "ssm_alpha.weight": weights.matrix(N_HEAD, n_embd),
        "ssm_norm.weight": weights.norm(N_STATE),
        "ssm_out.weight": weights.matrix(n_embd, n_values),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(f"blk.{il}.{name}", tensor)


def add_mamba2(writer: gguf.GGUFWriter, weights: Weights, config: TinyConfig, il: int) -> None:
    """Mamba 2: a state that decays by as much as each row says."""
    n_embd, n_inner = config.n_embd, 2 * config.n_embd
    n_head, n_mixed = n_inner // HEAD_DIM, n_inner + 2 * N_STATE
    tensors = {
        "ssm_in.weight": weights.matrix(n_inner + n_mixed + n_head, n_embd),
        "ssm_conv1d.weight": weights.normal((n_mixed, CONVOLVED), CONVOLVED**-0.5),
        "ssm_conv1d.bias": weights.normal((n_mixed,), 0.05),
        "ssm_dt.bias": weights.normal((n_head,), 0.5),
        "ssm_a": -weights.norm(n_head, 0.2)[:, np.newaxis],
        "ssm_d": weights.norm(n_head)[:, np.newaxis],
        "ssm_norm.weight": weights.norm(n_inner)[np.newaxis],
        "ssm_out.weight": weights.matrix(n_embd, n_inner),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(f"blk.{il}.{name}", tensor)
