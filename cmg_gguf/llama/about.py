"""What llama.cpp tells about itself, and its devices. For people to read."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import llama_cpp.llama_cpp

import cmg_gguf.llama.native  # noqa: F401  (loads the backends)

Kind = Literal["cpu", "gpu", "igpu", "accel"]
KINDS: tuple[Kind, ...] = ("cpu", "gpu", "igpu", "accel")
"""By ggml's numbers. An accel works in the host's memory, an igpu is part of the processor."""


@dataclass(frozen=True)
class Device:
    """A device that llama.cpp can compute on. memory, free: bytes, 0 if it does not say.
    splits_rows: whether rows of one product can lie on several of its backend's."""

    name: str
    description: str
    backend: str
    kind: Kind
    memory: int
    free: int
    splits_rows: bool = False


def library() -> Path:
    """The file of the libllama that is loaded."""
    return Path(llama_cpp.llama_cpp._lib._name)


def devices() -> list[Device]:
    """The devices, in llama.cpp's order."""
    count = _function("ggml_backend_dev_count", ctypes.c_size_t)
    get = _function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    return [_device(get(i)) for i in range(count())]


def device_handle(name: str) -> int:
    """The ggml_backend_dev_t of the device. Raises KeyError."""
    find = _function("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)
    handle: int | None = find(name.encode())
    if handle is None:
        raise KeyError(name)
    return handle


class _InitParams(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def takes(device: int, ggml_type: int, width: int, length: int) -> bool:
    """Whether the device, a ggml_backend_dev_t, computes on a (length, width) tensor. Some do not
    beyond a size of one tensor, however much memory they have."""
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    overhead = _function("ggml_tensor_overhead", ctypes.c_size_t)()
    memory = _function("ggml_init", pointer, _InitParams)(_InitParams(2 * overhead, None, True))
    new = _function("ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, count, count)
    supports = _function("ggml_backend_dev_supports_op", ctypes.c_bool, pointer, pointer)
    try:
        return bool(supports(device, new(memory, ggml_type, width, length)))
    finally:
        _function("ggml_free", None, pointer)(memory)


def free_memory() -> str:
    """What devices other than the CPU have left: "Vulkan0 has 1.2 of 8.0 GB free"; "" without."""
    return ", ".join(
        f"{device.name} has {device.free / 1e9:.1f} of {device.memory / 1e9:.1f} GB free"
        for device in devices()
        if device.kind != "cpu" and device.memory
    )


def features() -> str:
    """What its backends were compiled with, as llama.cpp puts it: "CPU : AVX2 = 1 | ..."."""
    text: bytes = llama_cpp.llama_print_system_info()
    return text.decode("utf-8", "replace").strip(" |")


def _device(handle: int) -> Device:
    def text(name: str, of: int) -> str:
        value: bytes = _function(name, ctypes.c_char_p, ctypes.c_void_p)(of)
        return value.decode("utf-8", "replace")

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    size_p = ctypes.POINTER(ctypes.c_size_t)
    memory = _function("ggml_backend_dev_memory", None, ctypes.c_void_p, size_p, size_p)
    memory(handle, ctypes.byref(free), ctypes.byref(total))
    registry = _function("ggml_backend_dev_backend_reg", ctypes.c_void_p, ctypes.c_void_p)(handle)
    extra = _function(
        "ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p
    )
    return Device(
        name=text("ggml_backend_dev_name", handle),
        description=text("ggml_backend_dev_description", handle),
        backend=text("ggml_backend_reg_name", registry),
        kind=KINDS[_function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)(handle)],
        memory=total.value,
        free=free.value,
        splits_rows=bool(extra(registry, b"ggml_backend_split_buffer_type")),
    )


def _function(name: str, result: Any, *arguments: Any) -> Any:
    # libllama's own ggml: llama_cpp can have a second one loaded. A prototype of our own leaves
    # the signatures that others have set as they are.
    prototype = ctypes.CFUNCTYPE(result, *arguments)
    return prototype((name, llama_cpp.llama_cpp._lib))
