"""What a GGUF file says it is, read before llama.cpp loads it: wrong files get a clear answer."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp

from cmg_gguf.errors import ModelError
from cmg_gguf.llama.log import captured_errors

_UINT32, _BOOL, _STRING = 4, 7, 8  # gguf_type


@dataclass(frozen=True)
class ProjectorFacts:
    """kind: of the projector ("mlp", ...). image_size: pixels a side of the encoder's own input."""

    kind: str
    image_size: int


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def gguf_library() -> ctypes.CDLL:
    """The functions of gguf.h that this package calls."""
    # libllama's own ggml: llama_cpp can have a second one loaded, with a log of its own.
    lib: ctypes.CDLL = llama_cpp.llama_cpp._lib
    signatures: dict[str, tuple[list[Any], Any]] = {
        "gguf_init_from_file": ([ctypes.c_char_p, _InitParams], ctypes.c_void_p),
        "gguf_free": ([ctypes.c_void_p], None),
        "gguf_find_key": ([ctypes.c_void_p, ctypes.c_char_p], ctypes.c_int64),
        "gguf_get_kv_type": ([ctypes.c_void_p, ctypes.c_int64], ctypes.c_int),
        "gguf_get_val_str": ([ctypes.c_void_p, ctypes.c_int64], ctypes.c_char_p),
        "gguf_get_val_u32": ([ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint32),
        "gguf_get_val_bool": ([ctypes.c_void_p, ctypes.c_int64], ctypes.c_bool),
        "gguf_find_tensor": ([ctypes.c_void_p, ctypes.c_char_p], ctypes.c_int64),
        "gguf_get_meta_size": ([ctypes.c_void_p], ctypes.c_size_t),
        "gguf_get_meta_data": ([ctypes.c_void_p, ctypes.c_void_p], None),
        "gguf_set_arr_data": (
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t],
            None,
        ),
        "gguf_get_n_tensors": ([ctypes.c_void_p], ctypes.c_int64),
        "gguf_get_data_offset": ([ctypes.c_void_p], ctypes.c_size_t),
        "gguf_get_tensor_offset": ([ctypes.c_void_p, ctypes.c_int64], ctypes.c_size_t),
        "gguf_get_tensor_size": ([ctypes.c_void_p, ctypes.c_int64], ctypes.c_size_t),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, result
    return lib


def read_architecture(path: Path, what: str) -> str:
    """`general.architecture` of a GGUF file ("llama", "clip", ...); "" if it has none.

    what: "model" or "mmproj", for the message. Raises ModelError for a missing, empty, truncated
    or non-GGUF file.
    """
    try:
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "does not exist"
            raise ModelError(f"{what} file {path} {problem}; give the path of a .gguf file")
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as exc:
        raise ModelError(f"{what} file {path} cannot be read: {exc.strerror}") from exc
    if magic != b"GGUF":
        raise ModelError(
            f"{what} file {path} is no GGUF file: it begins with {magic!r}, not b'GGUF'"
        )
    lib = gguf_library()
    with captured_errors() as errors:
        gguf = lib.gguf_init_from_file(os.fsencode(path), _InitParams(True, None))
    if not gguf:
        raise ModelError(
            f"{what} file {path} is damaged or truncated ({'; '.join(errors)}); download it again"
        )
    try:
        _check_size(lib, gguf, path, what)
        key = lib.gguf_find_key(gguf, b"general.architecture")
        return "" if key < 0 else lib.gguf_get_val_str(gguf, key).decode("utf-8", "replace")
    finally:
        lib.gguf_free(gguf)


def projector_facts(path: str | Path) -> ProjectorFacts:
    """Facts in the header of an mmproj file that `Projector` has accepted; "" and 0 if missing."""
    with open_header(path) as header:
        kind = header.text("clip.projector_type") or header.text("clip.vision.projector_type")
        return ProjectorFacts(kind, header.number("clip.vision.image_size"))


class Header:
    """The header of a GGUF file, without its tensors' data. handle: gguf_context pointer."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._lib = gguf_library()

    def text(self, key: str) -> str:
        """ "" if there is no such key."""
        value: bytes = self._value(key, _STRING, self._lib.gguf_get_val_str) or b""
        return value.decode("utf-8", "replace")

    def number(self, key: str) -> int:
        """0 if there is no such key."""
        return int(self._value(key, _UINT32, self._lib.gguf_get_val_u32) or 0)

    def flag(self, key: str) -> bool:
        """False if there is no such key."""
        return bool(self._value(key, _BOOL, self._lib.gguf_get_val_bool))

    def has_key(self, key: str) -> bool:
        return int(self._lib.gguf_find_key(self.handle, key.encode())) >= 0

    def has_tensor(self, name: str) -> bool:
        return int(self._lib.gguf_find_tensor(self.handle, name.encode())) >= 0

    def _value(self, key: str, kind: int, read: Any) -> Any:
        index = self._lib.gguf_find_key(self.handle, key.encode())
        found = index >= 0 and self._lib.gguf_get_kv_type(self.handle, index) == kind
        return read(self.handle, index) if found else None


@contextmanager
def open_header(path: str | Path) -> Iterator[Header]:
    """The header of a file that `read_architecture` has accepted."""
    lib = gguf_library()
    handle = lib.gguf_init_from_file(os.fsencode(path), _InitParams(True, None))
    try:
        yield Header(handle)
    finally:
        lib.gguf_free(handle)


def _check_size(lib: ctypes.CDLL, gguf: int, path: Path, what: str) -> None:
    """llama.cpp checks this for models alone: a cut mmproj would load with noise for weights."""
    ends = [
        lib.gguf_get_tensor_offset(gguf, i) + lib.gguf_get_tensor_size(gguf, i)
        for i in range(lib.gguf_get_n_tensors(gguf))
    ]
    needed = lib.gguf_get_data_offset(gguf) + max(ends, default=0)
    if (size := path.stat().st_size) < needed:
        raise ModelError(
            f"{what} file {path} is truncated: it has {size} bytes and its tensors end at "
            f"{needed}; download it again"
        )
