"""Files below one folder, whatever a client writes to get out of it.

read_below(Path("/pictures"), "cats/1.jpg", max_bytes=1 << 20)
read_below(Path("/pictures"), "file:///pictures/cats/1.jpg", max_bytes=1 << 20)
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from cmg_gguf.errors import ImageError, shown
from cmg_gguf.prompt.sources import path_of_url

_ELSEWHERE = re.compile(
    r"[\0-\x1f\x7f\\]|\A//|\A[A-Za-z]:|\A[A-Za-z][A-Za-z0-9+.-]+:|(\A|/)\.\.(/|\Z)"
)
"""Control characters, a path that is Windows' or another machine's, other schemes, a way up."""

_MAX_PATH = 4096
"""Characters. Links could make each part cost more than the one before."""


def read_below(folder: Path, name: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """All that a regular file holds which is below `folder` once symbolic links are followed.

    folder: absolute, without symbolic links. name: a path, from there or absolute, or a file: URL,
    whose percent-encoding is read once.

    Raises ImageError, which says why: not for who asks.
    """
    text = os.fspath(name)
    path = path_of_url(text) if text[:5].lower() == "file:" else text
    if not 0 < len(path) <= _MAX_PATH or _ELSEWHERE.search(path):
        raise ImageError(f"{shown(text)} is no path below {folder}")
    try:
        real = (folder / path).resolve(strict=True)
        if not real.is_relative_to(folder):
            raise ImageError(f"{shown(text)} is {real}, which is not below {folder}")
        return _read(folder, real.relative_to(folder).parts, max_bytes)
    except (OSError, ValueError, RuntimeError) as exc:  # RuntimeError: links in a circle
        raise ImageError(f"{shown(text)} cannot be read: {exc}") from exc


def _read(folder: Path, parts: Sequence[str], max_bytes: int) -> bytes:
    """What the file holds. No part may be a symbolic link: one was put there just now."""
    with ExitStack() as opened:
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        opened.callback(os.close, at)
        for part in parts[:-1]:
            at = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            opened.callback(os.close, at)
        name = parts[-1] if parts else "."
        # Looked at before it is opened: opening a device or a pipe may already do something.
        _check_regular(os.stat(name, dir_fd=at, follow_symlinks=False), max_bytes)
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=at)
        with os.fdopen(file, "rb") as stream:
            _check_regular(os.fstat(file), max_bytes)
            content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ImageError(f"it grew over {max_bytes} bytes")
    return content


def _check_regular(status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("it is no regular file")
    if status.st_size > max_bytes:
        raise ImageError(f"it has {status.st_size} bytes and the limit is {max_bytes}")
