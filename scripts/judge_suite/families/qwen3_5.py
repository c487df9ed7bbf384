"""Qwen3.5: a hybrid, in which every fourth layer attends and the others have a state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from judge_suite.checkpoint import HALF
from judge_suite.families import qwen2_vl, qwen3_vl
from judge_suite.family import CHATML, Family

TEXT: dict[str, Any] = {
    "num_hidden_layers": 8,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 2,
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    },
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def build(folder: Path) -> Any:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    return qwen2_vl.checkpoint(
        folder,
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        qwen3_vl.VISION,
        text=TEXT,
        preprocessor=qwen3_vl.PREPROCESSOR,
    )


FAMILIES = (
    Family(
        name="qwen3_5",
        build=build,
        inputs=qwen2_vl.patches(HALF, HALF),
        sizes=((160, 192), (128, 160)),
        pre="qwen35",
        llm_options=("--no-mtp",),
        **CHATML,
    ),
)
