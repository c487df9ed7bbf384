"""Whether devices compute on a KV cache of that size: llama.cpp does not ask before it does."""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import Any

import llama_cpp

from cmg_gguf.llama.about import device_handle, takes
from cmg_gguf.llama.model import Model


def too_large(model: Model, params: Any) -> str:
    """What is wrong where a layer's K or V is larger than what a device that may hold it computes
    on in one piece, whatever its memory: llama.cpp ends the process there. "" = nothing. By the
    sizes of the first layer."""
    placement = model.placement
    # The first that goes to a device is the output.
    if placement is None or placement.n_gpu_layers in (0, 1) or not params.offload_kqv:
        return ""
    n_ctx = params.n_ctx or llama_cpp.llama_model_n_ctx_train(model.handle)
    n_head = llama_cpp.llama_model_n_head(model.handle)
    n_head_kv = llama_cpp.llama_model_n_head_kv(model.handle)
    arch = model.metadata("general.architecture")
    for part, name, cache_type in (("K", "key", params.type_k), ("V", "value", params.type_v)):
        told = model.metadata(f"{arch}.attention.{name}_length")
        head = int(told) if told else llama_cpp.llama_model_n_embd(model.handle) // max(1, n_head)
        for device in placement.used():
            fits = partial(takes, device_handle(device.name), cache_type, n_head_kv * head)
            if fits(1) and not fits(n_ctx):
                most = bisect_left(range(1, n_ctx), True, key=lambda n: not fits(n))
                return (
                    f"{device.name} computes on no tensor as large as a layer's {part} of {n_ctx} "
                    f"cells; n_ctx={most} is the most, or keep the cache on the host "
                    "(offload_kqv=False, --no-kv-offload)"
                )
    return ""
