"""A device on a machine that has none: the host's memory, as if the CPU could not read it.

Everything that csrc does with a device's memory is done with it, by the CPU's backend.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from cmg_gguf import _core
from cmg_gguf.llama import native

_ANSWERS = {
    "ggml_backend_buffer_is_host": ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p),
    "ggml_backend_dev_supports_op": ctypes.CFUNCTYPE(
        ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p
    ),
}


def _addresses() -> dict[str, int]:
    handles = list(native._handles())
    names = [*_core.required_functions(), "ggml_cpu_fp16_to_fp32"]
    return {name: found for name in names if (found := native._address(name, handles))}


@contextmanager
def answering(*names: str) -> Iterator[None]:
    """While it is open, the extension is told "no" by these functions of ggml."""
    no = {name: _ANSWERS[name](lambda *_: False) for name in names}
    told = {
        name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in no.items()
    }
    usual = _addresses()
    _core.bind_api({**usual, **told})
    try:
        yield
    finally:
        _core.bind_api(usual)


def no_host_memory() -> AbstractContextManager[None]:
    """Buffers are a device's: influence is computed by a graph."""
    return answering("ggml_backend_buffer_is_host")
