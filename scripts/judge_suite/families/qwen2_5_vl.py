"""Qwen2.5-VL: Qwen2-VL with an encoder most of whose layers see a window of the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from judge_suite.families import qwen2_vl


def build(folder: Path) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": 128,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
    }
    return qwen2_vl.checkpoint(folder, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision)


FAMILIES = tuple(replace(one, name="qwen2_5_vl", build=build) for one in qwen2_vl.FAMILIES)
