"""What llama.cpp tells about itself, its devices, and a projector file. For people to read."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp

import cmg_gguf.runtime.native  # noqa: F401  (loads the backends)

_UINT32, _STRING = 4, 8  # gguf_type


@dataclass(frozen=True)
class Device:
    """A device that llama.cpp can compute on. memory: bytes in all, 0 if it does not say."""

    name: str
    description: str
    backend: str
    memory: int


@dataclass(frozen=True)
class ProjectorFacts:
    """kind: of the projector ("mlp", ...). image_size: pixels a side of the encoder's own input."""

    kind: str
    image_size: int


def devices() -> list[Device]:
    """The devices, in llama.cpp's order."""
    count = _function("ggml_backend_dev_count", ctypes.c_size_t)
    get = _function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    return [_device(get(i)) for i in range(count())]


def features() -> str:
    """What its backends were compiled with, as llama.cpp puts it: "CPU : AVX2 = 1 | ..."."""
    text: bytes = llama_cpp.llama_print_system_info()
    return text.decode("utf-8", "replace").strip(" |")


def projector_facts(path: str | Path) -> ProjectorFacts:
    """Facts in the header of an mmproj file that `Projector` has accepted; "" and 0 if missing."""

    class InitParams(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    load = _function("gguf_init_from_file", ctypes.c_void_p, ctypes.c_char_p, InitParams)
    free = _function("gguf_free", None, ctypes.c_void_p)
    gguf = load(os.fsencode(path), InitParams(True, None))
    try:
        kinds = ("clip.projector_type", "clip.vision.projector_type")
        kind = _value(gguf, kinds, _STRING, "gguf_get_val_str", ctypes.c_char_p)
        sizes = ("clip.vision.image_size",)
        size = _value(gguf, sizes, _UINT32, "gguf_get_val_u32", ctypes.c_uint32)
        return ProjectorFacts((kind or b"").decode("utf-8", "replace"), size or 0)
    finally:
        free(gguf)


def _value(gguf: int, keys: Sequence[str], kind: int, reader: str, result: Any) -> Any:
    find = _function("gguf_find_key", ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p)
    kind_of = _function("gguf_get_kv_type", ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
    read = _function(reader, result, ctypes.c_void_p, ctypes.c_int64)
    for key in keys:
        index = find(gguf, key.encode())
        if index >= 0 and kind_of(gguf, index) == kind:
            return read(gguf, index)
    return None


def _device(handle: int) -> Device:
    def text(name: str, of: int) -> str:
        value: bytes = _function(name, ctypes.c_char_p, ctypes.c_void_p)(of)
        return value.decode("utf-8", "replace")

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    size_p = ctypes.POINTER(ctypes.c_size_t)
    memory = _function("ggml_backend_dev_memory", None, ctypes.c_void_p, size_p, size_p)
    memory(handle, ctypes.byref(free), ctypes.byref(total))
    registry = _function("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)(handle)
    return Device(
        name=text("ggml_backend_dev_name", handle),
        description=text("ggml_backend_dev_description", handle),
        backend=text("ggml_backend_reg_name", registry),
        memory=total.value,
    )


def _function(name: str, result: Any, *arguments: Any) -> Any:
    # libllama's own ggml: llama_cpp can have a second one loaded. A prototype of our own leaves
    # the signatures that others have set as they are.
    prototype = ctypes.CFUNCTYPE(result, *arguments)
    return prototype((name, llama_cpp.llama_cpp._lib))
