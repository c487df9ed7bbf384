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
    mtmd_cpp.mtmd_helper_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


@contextmanager
def captured_errors() -> Iterator[list[str]]:
    """Collects what llama.cpp logs as errors inside the block; the list is filled at its end.

    For every call that logs: see csrc/bind_callbacks.cpp for what would happen to Ctrl-C else.
    """
    errors: list[str] = []
    _core.log_begin(_logger.logger.level <= logging.DEBUG)
    _set_log(ctypes.cast(_core.log_callback(), llama_cpp.llama_log_callback))
    try:
        yield errors
    finally:
        _set_log(_logger.llama_log_callback)
        errors += [" ".join(e.decode("utf-8", "replace").split()) for e in _core.log_errors()]


def _set_log(callback: object) -> None:
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(callback, ctypes.c_void_p(0))
