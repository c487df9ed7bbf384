"""llama.cpp's log: quiet unless asked for, and its last words put into our exceptions."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import llama_cpp
from llama_cpp import _logger, mtmd_cpp

from cmg_gguf import _core
from cmg_gguf.llama.owned import address


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


@contextmanager
def captured_stderr(told: Callable[[str], str]) -> Iterator[None]:
    """For a call that prints to stderr and not to the log: told(text) is called with what this
    process printed meanwhile, and returns what of it is printed after all.

    Keep it short: what other threads print comes late. Where there is no stderr, told("").
    """
    with _printing, tempfile.TemporaryFile() as kept:
        try:
            usual = os.dup(_STDERR)
        except OSError:
            yield
            told("")
            return
        try:
            os.dup2(kept.fileno(), _STDERR)
            try:
                yield
            finally:
                os.dup2(usual, _STDERR)
                kept.seek(0)
                rest = told(kept.read().decode("utf-8", "surrogateescape"))
                with suppress(OSError):
                    os.write(usual, rest.encode("utf-8", "surrogateescape"))
        finally:
            os.close(usual)


_STDERR = 2
_printing = threading.Lock()


# mtmd has a log of its own, which from here on goes where llama_cpp sends the other.
_core.bind_log(
    [
        address(llama_cpp.llama_cpp._lib.llama_log_set),
        address(mtmd_cpp._libmtmd.mtmd_helper_log_set),
    ],
    address(_logger.llama_log_callback),
)
