"""One module for each kind of image encoder; what is special to an architecture is there."""

from __future__ import annotations

from judge_suite.families import (
    gemma3,
    gemma4,
    glm4v,
    granite_vision,
    internvl,
    lfm2_vl,
    llama4,
    llava,
    minicpmv,
    pixtral,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_vl,
    smolvlm,
)
from judge_suite.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in (
        llava,
        internvl,
        llama4,
        pixtral,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        smolvlm,
        gemma3,
        gemma4,
        glm4v,
        qwen3_5,
        minicpmv,
        lfm2_vl,
        granite_vision,
    )
    for family in module.FAMILIES
}
FAST = ("llava", "qwen2_vl", "pixtral")
