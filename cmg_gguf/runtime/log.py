"""llama.cpp's log: quiet unless asked for, and its last words put into our exceptions."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp
from llama_cpp import _logger, mtmd_cpp

_ERROR = 4  # GGML_LOG_LEVEL_ERROR; the table in llama_cpp._logger is of an older ggml


def set_verbose(verbose: bool) -> None:
    """Whether llama.cpp writes its log to stderr (for every user of llama_cpp in this process)."""
    _logger.set_verbose(verbose)
    mtmd_cpp.mtmd_helper_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


@contextmanager
def captured_errors() -> Iterator[list[str]]:
    """Collects what llama.cpp logs as errors inside the block, instead of printing it."""
    errors: list[str] = []
    verbose = _logger.logger.level <= logging.DEBUG

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            errors.append(" ".join(text.decode("utf-8", "replace").split()))
        elif verbose:
            _logger.llama_log_callback(level, text, None)

    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(collect, ctypes.c_void_p(0))
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
        mtmd_cpp.mtmd_helper_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
