"""llama.cpp's log: quiet unless asked for, and its last words put into our exceptions."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp
from llama_cpp import _logger, mtmd_cpp

from cmg_gguf import _core


def set_verbose(verbose: bool) -> None:
    """Whether llama.cpp writes its log to stderr (for every user of llama_cpp in this process)."""
    _logger.set_verbose(verbose)


@contextmanager
def captured_errors() -> Iterator[list[str]]:
    """Collects what this thread has llama.cpp log as errors; the list is filled at the block's end.

    Blocks may be open in several threads, each for its own errors, and within each other, where
    the inner one has them. For every call that logs: see csrc/log.hpp for what becomes of the other
    lines, and csrc/bind_callbacks.cpp for what would happen to Ctrl-C else.
    """
    errors: list[str] = []
    capture = _core.LogCapture(_logger.logger.level <= logging.DEBUG)  # closes when dropped, too
    try:
        yield errors
    finally:
        errors += [" ".join(e.decode("utf-8", "replace").split()) for e in capture.close()]


def _address(function: object) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


# mtmd has a log of its own, which from here on goes where llama_cpp sends the other.
_core.bind_log(
    [
        _address(llama_cpp.llama_cpp._lib.llama_log_set),
        _address(mtmd_cpp._libmtmd.mtmd_helper_log_set),
    ],
    _address(_logger.llama_log_callback),
)
