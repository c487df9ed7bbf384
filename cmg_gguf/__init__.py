"""Cross-Modal Guidance for GGUF vision-language models, over an unmodified llama-cpp-python.

from cmg_gguf import Guidance, GuidedVLM

vlm = GuidedVLM("llava-v1.5-7b.Q4_K_M.gguf", "mmproj-f16.gguf")
reply = vlm.generate("Is there a fork?", ["kitchen.jpg"], guidance=Guidance(alpha=1.0))
print(reply.text, reply.n_changed)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import cmg_gguf.llama.openmp  # noqa: F401  (before anything that loads OpenMP)

if TYPE_CHECKING:
    from cmg_gguf.errors import (
        BackendError,
        CaptionError,
        CMGError,
        ContextLengthError,
        EvaluationError,
        GuidanceError,
        HubConnectionError,
        HubError,
        HubNameError,
        ImageError,
        ModelError,
        ProjectorError,
        PromptError,
        SamplingError,
        UnsupportedError,
    )
    from cmg_gguf.evidence import EvidenceModel
    from cmg_gguf.guidance import (
        AttentionMass,
        CumulativeMass,
        Disagreement,
        Guidance,
        LayerRange,
        LayerSet,
        LowestCosine,
        MeanStd,
        TopRatio,
    )
    from cmg_gguf.handler import CMGChatHandler
    from cmg_gguf.heat.maps import Heat
    from cmg_gguf.reply import Evidence, Piece, Reply, Seconds, Token, Word
    from cmg_gguf.request import Contrast, Request
    from cmg_gguf.sampling import Sampling
    from cmg_gguf.stream import Stream
    from cmg_gguf.vlm import GuidedVLM

__version__ = "0.1.0"

__all__ = [
    "AttentionMass",
    "BackendError",
    "CMGChatHandler",
    "CMGError",
    "CaptionError",
    "ContextLengthError",
    "Contrast",
    "CumulativeMass",
    "Disagreement",
    "EvaluationError",
    "Evidence",
    "EvidenceModel",
    "Guidance",
    "GuidanceError",
    "GuidedVLM",
    "Heat",
    "HubConnectionError",
    "HubError",
    "HubNameError",
    "ImageError",
    "LayerRange",
    "LayerSet",
    "LowestCosine",
    "MeanStd",
    "ModelError",
    "Outcome",
    "Piece",
    "ProjectorError",
    "PromptError",
    "Reply",
    "Request",
    "Sampling",
    "SamplingError",
    "Seconds",
    "Stream",
    "Token",
    "TopRatio",
    "UnsupportedError",
    "Word",
    "__version__",
    "caption",
]

# What is imported on first use, llama.cpp with it: `cmg-gguf --help` needs none. Light ones first.
_MODULES = (
    "errors",
    "evidence",
    "guidance",
    "sampling",
    "heat.maps",
    "reply",
    "request",
    "stream",
    "many",
    "vlm",
    "handler",
    "captioning",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = getattr(importlib.import_module(f"cmg_gguf.{module}"), name, None)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
