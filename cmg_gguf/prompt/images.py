"""From anything that holds an image to its pixels: (H, W, 3) uint8 RGB.

    rgb = load_image("photo.jpg")                        # path or file:// URL
    rgb = load_image("data:image/png;base64,iVBORw0...")
    rgb = load_image(png_bytes)                          # also a PIL image or a NumPy array
    key = image_id(rgb)                                  # the same pixels, the same key

Nothing is downloaded, and only raster formats are opened: Pillow would hand PostScript to an
external program.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, Union
from urllib.parse import unquote_to_bytes
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from cmg_gguf.errors import ImageError, shown

ImageSource: TypeAlias = Union[
    str, "os.PathLike[str]", bytes, bytearray, memoryview, Image.Image, NDArray[np.uint8]
]
"""What `load_image` accepts."""

MAX_PIXELS = 64_000_000
"""Default limit of width * height: 192 MB of RGB."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
"""Formats that are opened, by Pillow's names, as far as this Pillow was built with them."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_URL_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
# Warning filters belong to the process: two threads changing them at once leave them changed.
_WARNING_FILTERS = threading.Lock()


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return the pixels of `source` as a new C-contiguous (H, W, 3) uint8 RGB array.

    Args:
        source: a path, a `file:` URL, a base64 `data:` URL, the bytes of an image file, a PIL
            image, or an (H, W, 3) uint8 RGB array. It is never changed; a PIL image whose file is
            still open gets loaded, and gives the frame it stands on.
        max_pixels: largest width * height, >= 1, checked before anything is decoded. Pillow's own
            limit (`PIL.Image.MAX_IMAGE_PIXELS`) holds as well for what Pillow opens.

    EXIF orientation is applied and transparency is laid on white. Of an animation the first frame
    is taken. 16-bit grey (modes I;16 and I, 0 to 65535) is divided by 257; float grey (mode F) is
    read as 0 to 1 if no value is above 1, as 0 to 255 otherwise.

    Raises:
        ImageError: the source is of another type, is missing, empty, truncated, no image, too
            large, has no pixels, or has grey values outside these ranges.
    """
    if max_pixels < 1:
        raise ImageError(f"max_pixels={max_pixels} is out of range: it must be at least 1")
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        name = f"PIL image of mode {source.mode}"
        with _pillow(name):
            return _pixels(source, name, max_pixels)
    stream, name = _open(source)
    with stream, _pillow(name):
        if stream.seek(0, io.SEEK_END) == 0:
            raise ImageError(f"{name} is empty (0 bytes): give a whole image file")
        stream.seek(0)
        with Image.open(stream, formats=_formats()) as image:
            return _pixels(image, name, max_pixels)


def image_id(rgb: NDArray[np.uint8]) -> str:
    """Return the SHA-256 (64 hex digits) of the shape and pixels of an (H, W, 3) uint8 array.

    Memory layout does not enter: equal arrays have equal ids.

    Raises:
        ImageError: `rgb` has another shape or dtype.
    """
    _check_array(rgb)
    height, width, channels = rgb.shape
    digest = hashlib.sha256(f"{height}x{width}x{channels}:".encode())
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def _from_array(array: NDArray[Any], max_pixels: int) -> NDArray[np.uint8]:
    _check_array(array)
    _check_size(array.shape[1], array.shape[0], "array", max_pixels)
    return np.array(array, dtype=np.uint8, order="C")


def _check_array(array: NDArray[Any]) -> None:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ImageError(
            f"array of shape {array.shape} and dtype {array.dtype} is not an RGB image: "
            "give shape (H, W, 3) and dtype uint8"
        )


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height}): each side must be at least 1")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} = {width * height} pixels and the limit is "
            f"{max_pixels}: scale it down or raise max_pixels"
        )


def _open(source: object) -> tuple[BinaryIO, str]:
    """Return the encoded image as a stream, and what to call it in messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        content = bytes(source)
        return io.BytesIO(content), f"image of {len(content)} bytes"
    if isinstance(source, os.PathLike):
        return _open_file(os.fsdecode(source))
    if not isinstance(source, str):
        raise ImageError(
            f"{shown(source)} of type {type(source).__name__} is not an image source: give a "
            "path, a file: or data: URL, bytes, a PIL image or an (H, W, 3) uint8 array"
        )
    start = source[:8].lower()
    if start.startswith("data:"):
        return _open_data_url(source)
    if start.startswith("file:"):
        return _open_file(_path_of_url(source))
    if scheme := _URL_SCHEME.match(source):
        raise ImageError(
            f"{shown(source)} is a {scheme[1].lower()} URL and this library does not download: "
            "fetch the image yourself and give its path or bytes"
        )
    return _open_file(source)


def _open_file(path: str) -> tuple[BinaryIO, str]:
    name = f"image file {shown(path)}"
    try:
        regular = stat.S_ISREG(Path(path).stat().st_mode)
        stream = _read(path) if regular else None
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ImageError(f"{name} cannot be opened ({reason}): give a readable file") from exc
    if stream is None:
        raise ImageError(f"{name} is not a regular file: give the path of an image file")
    return stream, name


def _read(path: str) -> BinaryIO:
    return open(path, "rb")


def _path_of_url(url: str) -> str:
    """Return the path of a `file:` URL; '?' and '#' belong to the path, as RFC 8089 has it."""
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


def _open_data_url(url: str) -> tuple[BinaryIO, str]:
    name = f"data URL {shown(url)} of {len(url)} characters"
    header, comma, payload = url.partition(",")
    if not comma:
        raise ImageError(f"{name} has no comma: write data:image/png;base64,<data>")
    if header.rpartition(";")[2].strip().lower() != "base64":
        raise ImageError(f"{name} is not base64: write data:image/png;base64,<data>")
    try:
        content = base64.b64decode(b"".join(unquote_to_bytes(payload).split()), validate=True)
    except ValueError as exc:
        raise ImageError(f"{name} is not valid base64 ({exc}): encode the whole file") from exc
    return io.BytesIO(content), name


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _pillow(name: str) -> Iterator[None]:
    """Turn all that Pillow raises within into an ImageError, and silence what it warns about."""
    with _WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except ImageError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as exc:
            raise ImageError(
                f"{name} is over Pillow's limit ({_line(exc)}): scale it down or raise "
                "PIL.Image.MAX_IMAGE_PIXELS"
            ) from exc
        except UnidentifiedImageError as exc:
            raise ImageError(
                f"{name} is no image, or of a format that is not read: "
                f"give one of {', '.join(_formats())}"
            ) from exc
        # Decoders fed with foreign bytes raise nearly every type there is.
        except Exception as exc:
            raise ImageError(
                f"{name} is damaged, truncated or unsupported ({_line(exc)}): "
                "save it anew as PNG or JPEG"
            ) from exc


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


def _pixels(image: Image.Image, name: str, max_pixels: int) -> NDArray[np.uint8]:
    _check_size(*image.size, name, max_pixels)
    image.load()
    # An ICO or TIFF can turn out otherwise than its header said.
    _check_size(*image.size, name, max_pixels)
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F" or image.mode.split(";")[0] == "I":
        return _from_deep_grey(image, name)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or (
        image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info
    ):
        return _on_white(image)
    return np.array(image.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of a loaded image: a PNG may have its EXIF last."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # load() has turned it, and some versions of Pillow leave the tag
    # A broken EXIF block says nothing about the pixels, which are whole.
    with suppress(Exception):
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _on_white(image: Image.Image) -> NDArray[np.uint8]:
    straight = image.convert("LA") if image.mode == "La" else image
    rgba = straight.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return np.array(Image.alpha_composite(white, rgba).convert("RGB"))


def _from_deep_grey(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """Scale grey of more than 8 bits to 0..255, never clipping, and repeat it thrice."""
    grey = np.asarray(image)  # (H, W) uint16, int32 or float32
    low, high = float(grey.min()), float(grey.max())
    limit = 255 if image.mode == "F" else 65535
    if not (low >= 0 and high <= limit):
        raise ImageError(
            f"{name} has grey values from {low:g} to {high:g} and mode {image.mode} is read as "
            f"0 to {limit}: scale it to 8 bits first"
        )
    if image.mode == "F":
        levels = np.rint(grey * np.float32(255 if high <= 1 else 1)).astype(np.uint8)
    else:
        levels = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:
        levels[grey == image.info["transparency"]] = 255
    return np.repeat(levels[:, :, np.newaxis], 3, axis=2)
