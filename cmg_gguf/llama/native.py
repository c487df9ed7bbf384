"""Binds `_core` to the llama.cpp that llama-cpp-python has loaded, or says at import why not.

Nothing of ggml is linked into this package. The addresses of the functions it calls are taken from
the handles that llama_cpp holds, so the same wheel serves CPU, CUDA and Metal builds.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
from llama_cpp._ctypes_extensions import load_shared_library

from cmg_gguf import _core

TESTED = ((0, 3, 36), (0, 3, 37))  # at least, below
REMEDY = 'pip install "llama-cpp-python>=0.3.36,<0.3.37" --force-reinstall'


def _check_version() -> None:
    found = tuple(int(x) for x in re.findall(r"\d+", llama_cpp.__version__)[:3])
    if not TESTED[0] <= found < TESTED[1]:
        raise ImportError(
            f"llama-cpp-python {llama_cpp.__version__} is outside the tested range: {REMEDY}"
        )


def _handles() -> Iterator[ctypes.CDLL]:
    """libllama, whose handle also finds what it is linked to; then, for Windows, where it does
    not, the ggml libraries themselves. Elsewhere loading those by path would be a second copy."""
    yield llama_cpp.llama_cpp._lib
    if sys.platform != "win32":
        return
    folder = Path(llama_cpp.__file__).parent / "lib"
    for name in ("ggml", "ggml-base", "ggml-cpu"):
        with contextlib.suppress(FileNotFoundError, RuntimeError):
            yield load_shared_library(name, folder)


def _address(name: str, handles: list[ctypes.CDLL]) -> int:
    for handle in handles:
        with contextlib.suppress(AttributeError):
            return ctypes.cast(getattr(handle, name), ctypes.c_void_p).value or 0
    return 0


def _bind() -> None:
    _check_version()
    handles = list(_handles())
    names = [*_core.required_functions(), "ggml_cpu_fp16_to_fp32"]
    try:
        _core.bind_api({n: address for n in names if (address := _address(n, handles))})
    except RuntimeError as exc:
        raise ImportError(f"{exc}. Rebuild against the installed version: {REMEDY}") from exc
    llama_cpp.llama_backend_init()


_bind()
