"""Which layers attend, how large the state of others is, where each lies, as one token shows it."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import llama_cpp

from cmg_gguf import _core
from cmg_gguf.errors import BackendError
from cmg_gguf.llama.log import captured_errors
from cmg_gguf.llama.owned import making


class Shown(NamedTuple):
    """attending: layers that attend to the rows before, ascending. state_bytes: memory of one
    sequence's state."""

    attending: tuple[int, ...]
    state_bytes: int


def shown_layers(model: Any, n_layer: int) -> Shown:
    """What one token shows, decoded in a small context of its own. model: llama_model pointer.

    Raises BackendError if that cannot be done.
    """
    patch = _core.GraphPatch(n_layer)
    state_bytes = _decode_one(model, _params(patch))
    return Shown(tuple(patch.attended_layers), state_bytes)


def layer_places(model: Any, n_layer: int, *, offload_kqv: bool) -> _core.LayerPlaces:
    """On which devices weights and KV cells of each layer lie. model: llama_model pointer.

    Nothing is computed. Raises BackendError if a small context cannot be made.
    """
    places = _core.LayerPlaces(n_layer)
    params = _params(places)
    params.offload_kqv = offload_kqv
    _decode_one(model, params)
    return places


_init = making(llama_cpp.llama_init_from_model, llama_cpp.llama_free)


def _decode_one(model: Any, params: Any) -> int:
    """Decodes one token; bytes of a state behind it."""
    state_bytes = 0
    with captured_errors() as errors:
        context = _init(model, params)
        if context:
            token = (llama_cpp.llama_token * 1)(0)
            batch = llama_cpp.llama_batch_get_one(token, 1)
            code = llama_cpp.llama_decode(context.pointer, batch)
            state_bytes = llama_cpp.llama_state_seq_get_size_ext(
                context.pointer, 0, llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
            )
    if not context or code != 0:
        raise BackendError(
            "llama.cpp cannot decode one token, which would show the layers of this model: "
            f"{errors[0] if errors else 'no reason given'}"
        )
    return state_bytes


def _params(asked: _core.GraphPatch | _core.LayerPlaces) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 8
    params.n_seq_max = 1
    params.kv_unified = True
    params.no_perf = True
    params.cb_eval = ctypes.cast(asked.callback, llama_cpp.ggml_backend_sched_eval_callback)
    params.cb_eval_user_data = asked.user_data
    return params
