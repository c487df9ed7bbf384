"""Binds `_core` to the llama.cpp that llama-cpp-python has loaded, or says at import why not.

Nothing of ggml is linked into this package. The addresses of the functions it calls are taken from
the handles that llama_cpp holds, so the same wheel serves CPU, CUDA and Metal builds, and versions
other than the one whose headers it was built with: see `cmg_gguf.llama.versions`.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
from llama_cpp._ctypes_extensions import load_shared_library

from cmg_gguf import _core
from cmg_gguf.llama import openmp
from cmg_gguf.llama.versions import NEWEST_TESTED, OLDEST, REMEDY, check_version, untested


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
    check_version(llama_cpp.__version__)
    handles = list(_handles())
    names = [*_core.required_functions(), "ggml_cpu_fp16_to_fp32"]
    try:
        _core.bind_api({n: address for n in names if (address := _address(n, handles))})
    except RuntimeError as exc:
        raise ImportError(
            f"{exc}. llama-cpp-python {llama_cpp.__version__} is installed; {OLDEST} to "
            f"{NEWEST_TESTED} were tested: {REMEDY}"
        ) from exc
    if told := untested(llama_cpp.__version__):
        warnings.warn(told, stacklevel=2)
    llama_cpp.llama_backend_init()


_bind()
openmp.restore()
