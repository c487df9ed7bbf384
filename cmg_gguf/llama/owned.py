"""What llama.cpp allocates for us, and its end.

load = making(llama_cpp.llama_model_load_from_file, llama_cpp.llama_model_free)
model = load(path, params)   # Owned; false for null
model.pointer
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from cmg_gguf import _core

Owned = _core.Owned
"""What was allocated. pointer: its address; 0 = it is freed, or was null, and it is false then.

It is freed where this object is dropped or closed, before the `holder` of `hold(holder, *kept)` is,
and before Python ends, the newest first. kept: alive until then. No Python code is run for it, in
which a Ctrl-C would be lost. Who closes it while another thread does waits until it is freed.
"""


def making(make: Any, free: Any) -> Callable[..., Owned]:
    """`make`, a function of llama.cpp's, with what it returns as `Owned`, for `free` to free.

    No Python code runs between the two: what an interrupt comes upon is freed.
    """
    made = type(make)(address(make))
    made.argtypes, made.restype = make.argtypes, ctypes.c_void_p
    made.errcheck = _core.owner(address(free))
    return made  # type: ignore[no-any-return]


def address(pointer: Any) -> int:
    """Of a ctypes pointer or function; 0 of null."""
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0
