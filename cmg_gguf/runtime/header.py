"""What a GGUF file says it is, read before llama.cpp loads it: wrong files get a clear answer."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp._ctypes_extensions
import llama_cpp._ggml

from cmg_gguf.errors import ModelError
from cmg_gguf.runtime.log import captured_errors


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _gguf() -> ctypes.CDLL:
    lib = llama_cpp._ctypes_extensions.load_shared_library(
        "ggml-base", llama_cpp._ggml.libggml_base_path
    )
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    lib.gguf_find_key.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    lib.gguf_find_key.restype = ctypes.c_int64
    lib.gguf_get_val_str.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    lib.gguf_get_val_str.restype = ctypes.c_char_p
    return lib  # type: ignore[no-any-return]


def read_architecture(path: Path, what: str) -> str:
    """`general.architecture` of a GGUF file ("llama", "clip", ...); "" if it has none.

    what: "model" or "mmproj", for the message. Raises ModelError for a missing, empty, truncated
    or non-GGUF file.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(f"{what} file {path} {problem}; give the path of a .gguf file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as exc:
        raise ModelError(f"{what} file {path} cannot be read: {exc.strerror}") from exc
    if magic != b"GGUF":
        raise ModelError(
            f"{what} file {path} is no GGUF file: it begins with {magic!r}, not b'GGUF'"
        )
    lib = _gguf()
    with captured_errors() as errors:
        gguf = lib.gguf_init_from_file(str(path).encode(), _InitParams(True, None))
    if not gguf:
        raise ModelError(
            f"{what} file {path} is damaged or truncated ({_last(errors)}); download it again"
        )
    try:
        key = lib.gguf_find_key(gguf, b"general.architecture")
        return "" if key < 0 else lib.gguf_get_val_str(gguf, key).decode("utf-8", "replace")
    finally:
        lib.gguf_free(gguf)


def _last(errors: list[str]) -> str:
    return errors[-1] if errors else "no reason given"
