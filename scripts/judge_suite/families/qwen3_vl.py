"""Qwen3-VL: layers of the encoder also speak to the first layers of the decoder (deepstack)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from judge_suite.checkpoint import HALF, Tensors
from judge_suite.families import qwen2_vl
from judge_suite.family import CHATML, Family

PREPROCESSOR = {
    **qwen2_vl.PREPROCESSOR,
    "image_mean": HALF,
    "image_std": HALF,
    "patch_size": 16,
}
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "out_hidden_size": 128,
    "patch_size": 16,
    "num_position_embeddings": 64,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def _build(folder: Path, kind: str) -> Any:
    import transformers

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    return qwen2_vl.checkpoint(
        folder,
        getattr(transformers, f"{kind}Config"),
        getattr(transformers, f"{kind}ForConditionalGeneration"),
        {**VISION, "deepstack_visual_indexes": [0, 1, 2]},
        text={
            "head_dim": 32,
            "num_hidden_layers": 12,  # so that pairs fork above those that read more of the image
            "rope_parameters": {**rope, "mrope_section": [6, 5, 5]},
            **(EXPERTS if kind.endswith("Moe") else {}),
        },
        preprocessor=PREPROCESSOR,
        change=_experts_as_on_the_hub,
    )


def _experts_as_on_the_hub(tensors: Tensors) -> Tensors:
    """An expert's matrices are the other way round there."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor
        for name, tensor in tensors.items()
    }


def _family(name: str, kind: str) -> Family:
    return Family(
        name=name,
        build=partial(_build, kind=kind),
        inputs=qwen2_vl.patches(HALF, HALF),
        sizes=((160, 192), (128, 160)),
        **CHATML,
    )


FAMILIES = (_family("qwen3_vl", "Qwen3VL"), _family("qwen3_vl_moe", "Qwen3VLMoe"))
