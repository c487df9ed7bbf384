"""From anything that holds an image file to its bytes, as a stream.

    opened("photo.jpg")                            # a path; also a file: URL or an os.PathLike
    opened("data:image/png;base64,iVBORw0...")
    opened("iVBORw0KGgoAAAANSUhEUg...")            # bare base64
    opened(png_bytes)                              # or base64, or a data: URL, as bytes
    opened(open("photo.jpg", "rb"))                # or a BytesIO, or what else can be read
    opened("/dev/fd/63")                           # a pipe, as a shell's <(...) names it

Nothing is downloaded. A string without a scheme is a path if there is such a file; if there is
none, it is base64 if an image comes of that; else it is an error that names both.
"""

from __future__ import annotations

import base64
import io
import os
import re
import stat
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeAlias, Union
from urllib.parse import unquote_to_bytes
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cmg_gguf.errors import ImageError, shown
from cmg_gguf.prompt.formats import N_PREFIX, is_image

ImageSource: TypeAlias = Union[
    str,
    "os.PathLike[str]",
    bytes,
    bytearray,
    memoryview,
    IO[bytes],
    Image.Image,
    NDArray[np.uint8],
]
"""What `cmg_gguf.prompt.images.load_image` accepts."""

_URL_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_BASE64_TEXT = re.compile(rb"[A-Za-z0-9+/=_\s-]*")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def opened(source: object) -> tuple[BinaryIO, str]:
    """Return the encoded image as a stream at its start, and what to call it in messages.

    An open file is read from its start and then stands where it stood; one that cannot go back, as
    a pipe, is read to its end once.

    Raises:
        ImageError: the source is of another type, or cannot be read.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(source))
    if isinstance(source, os.PathLike):
        return _open_file(os.fsdecode(source))
    if callable(getattr(source, "read", None)):
        return _open_bytes(_read_all(source))
    if not isinstance(source, str):
        raise ImageError(
            f"{shown(source)} of type {type(source).__name__} is not an image source: give a "
            "path, a file: or data: URL, base64, bytes, an open file, a PIL image or an (H, W, 3) "
            "uint8 array"
        )
    start = source[:8].lower()
    if start.startswith("data:"):
        return _open_data_url(source)
    if start.startswith("file:"):
        return _open_file(path_of_url(source))
    if scheme := _URL_SCHEME.match(source):
        raise ImageError(
            f"{shown(source)} is a {scheme[1].lower()} URL and this library does not download: "
            "fetch the image yourself and give its path or bytes"
        )
    return _open_text(source)


def base64_bytes(text: bytes) -> bytes:
    """Return what base64 says, as browsers take it: white space anywhere, padding or none; and in
    the URL-safe alphabet as well.

    Raises:
        ValueError: it is no base64.
    """
    digits = b"".join(text.split()).translate(_URL_SAFE)
    if len(digits) % 4 == 0:
        digits = digits.removesuffix(b"=").removesuffix(b"=")
    return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)


def image_of_base64(text: bytes) -> bytes | None:
    """Return the image file whose base64 this is; None where no image comes of it."""
    if not _BASE64_TEXT.fullmatch(text):
        return None
    try:
        content = base64_bytes(text)
    except ValueError:
        return None
    return content if is_image(content[:N_PREFIX]) else None


def path_of_url(url: str) -> str:
    """Return the path of a `file:` URL; '?' and '#' belong to the path, as RFC 8089 has it.

    Raises:
        ImageError: it names another host.
    """
    path = url[len("file:") :]
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise ImageError(
                f"{shown(url)} names the host {shown(host)} and only local files are read: "
                "write file:///path"
            )
        path = slash + rest
    return url2pathname(path)


def _open_bytes(content: bytes) -> tuple[BinaryIO, str]:
    if content[:5].lower() == b"data:":
        return _open_data_url(content.decode("latin-1"))
    decoded = None if is_image(content[:N_PREFIX]) else image_of_base64(content)
    if decoded is not None:
        return io.BytesIO(decoded), f"base64 of {len(content)} bytes"
    return io.BytesIO(content), f"image of {len(content)} bytes"


def _open_text(text: str) -> tuple[BinaryIO, str]:
    """Open a string that is a path or bare base64."""
    try:
        return _open_file(text)
    except ImageError as exc:
        missing = isinstance(exc.__cause__, (OSError, ValueError))
        spelled = text.encode("ascii", "replace")
        if not (missing and text.strip() and _BASE64_TEXT.fullmatch(spelled)):
            raise
        decoded = image_of_base64(spelled)
        if decoded is None:
            reason = getattr(exc.__cause__, "strerror", None) or exc.__cause__
            raise ImageError(
                f"{shown(text)} of {len(text)} characters is neither a file that can be opened "
                f"({reason}) nor the base64 of an image: give a path, or the whole file's base64"
            ) from exc
        return io.BytesIO(decoded), f"base64 {shown(text)} of {len(text)} characters"


def _read_all(file: Any) -> bytes:
    """Return all that an open file holds, and leave it where it stood."""
    name = f"{type(file).__name__} {shown(getattr(file, 'name', ''))}".removesuffix(" ''")
    try:
        if getattr(file, "seekable", bool)():
            stood = file.tell()
            file.seek(0)
            content = file.read()
            file.seek(stood)
        else:
            content = file.read()
    # Whatever looks like a file may be given.
    except Exception as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ImageError(f"{name} cannot be read ({reason}): give a file that is open") from exc
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise ImageError(
            f'{name} gives {type(content).__name__} and not bytes: open it with open(path, "rb")'
        )
    return bytes(content)


def _open_file(path: str) -> tuple[BinaryIO, str]:
    name = f"image file {shown(path)}"
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISFIFO(mode):
            return io.BytesIO(_read_pipe(path)), f"pipe {shown(path)}"
        stream = _read(path) if stat.S_ISREG(mode) else None
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ImageError(f"{name} cannot be opened ({reason}): give a readable file") from exc
    if stream is None:
        raise ImageError(f"{name} is not a regular file: give the path of an image file")
    return stream, name


def _read(path: str) -> BinaryIO:
    return open(path, "rb")


def _read_pipe(path: str) -> bytes:
    """Return all that is written to a pipe; nothing, and at once, where nobody has it open."""
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(pipe, True)
    with os.fdopen(pipe, "rb") as stream:
        return stream.read()


def _open_data_url(url: str) -> tuple[BinaryIO, str]:
    name = f"data URL {shown(url)} of {len(url)} characters"
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageError(f"{name} has no comma: write data:image/png;base64,<data>")
    if header.rpartition(";")[2].strip().lower() != "base64":
        raise ImageError(f"{name} is not base64: write data:image/png;base64,<data>")
    try:
        content = base64_bytes(unquote_to_bytes(payload))
    except ValueError as exc:
        raise ImageError(f"{name} is not valid base64 ({exc}): encode the whole file") from exc
    return io.BytesIO(content), name
