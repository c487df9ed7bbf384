"""What llama.cpp allocated for us, and its end."""

from __future__ import annotations

import ctypes
from typing import Any

from cmg_gguf import _core


def owned(holder: object, pointer: Any, free: Any, *kept: object) -> _core.Owned:
    """Frees `pointer` by `free`, a function of llama.cpp's, when `holder` is dropped, or what is
    returned is, or that is closed, or before Python ends, the newest first. kept: alive until then.

    As `weakref.finalize`, but no Python code is run, in which a Ctrl-C would be lost. Who closes it
    while another thread does waits until it is freed.
    """
    return _core.Owned(holder, address(pointer), address(free), *kept)


def address(pointer: Any) -> int:
    """Of a ctypes pointer or function; 0 of null."""
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0
