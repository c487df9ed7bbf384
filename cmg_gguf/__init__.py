"""Cross-Modal Guidance for GGUF vision-language models, over an unmodified llama-cpp-python.

from cmg_gguf import Guidance, GuidedVLM

vlm = GuidedVLM("llava-v1.5-7b.Q4_K_M.gguf", "mmproj-f16.gguf")
reply = vlm.generate("Is there a fork?", ["kitchen.jpg"], guidance=Guidance(alpha=1.0))
print(reply.text, reply.n_changed)
"""

from cmg_gguf.errors import (
    BackendError,
    CMGError,
    ContextLengthError,
    GuidanceError,
    ImageError,
    ModelError,
    ProjectorError,
    PromptError,
    SamplingError,
    UnsupportedError,
)
from cmg_gguf.generation import Piece, Reply, Seconds, Token
from cmg_gguf.guidance import (
    AttentionMass,
    CumulativeMass,
    Guidance,
    LayerRange,
    LayerSet,
    LowestCosine,
    MeanStd,
    TopRatio,
)
from cmg_gguf.handler import CMGChatHandler
from cmg_gguf.sampling import Sampling
from cmg_gguf.vlm import GuidedVLM, Stream

__version__ = "0.1.0"

__all__ = [
    "AttentionMass",
    "BackendError",
    "CMGChatHandler",
    "CMGError",
    "ContextLengthError",
    "CumulativeMass",
    "Guidance",
    "GuidanceError",
    "GuidedVLM",
    "ImageError",
    "LayerRange",
    "LayerSet",
    "LowestCosine",
    "MeanStd",
    "ModelError",
    "Piece",
    "ProjectorError",
    "PromptError",
    "Reply",
    "Sampling",
    "SamplingError",
    "Seconds",
    "Stream",
    "Token",
    "TopRatio",
    "UnsupportedError",
    "__version__",
]
