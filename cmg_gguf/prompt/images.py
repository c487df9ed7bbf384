"""From anything that holds an image to its pixels: (H, W, 3) uint8 RGB.

    rgb = load_image("photo.jpg")                        # path or file:// URL
    rgb = load_image("data:image/png;base64,iVBORw0...")
    rgb = load_image(png_bytes)                          # also a PIL image or a NumPy array
    key = image_id(rgb)                                  # the same pixels, the same key

Nothing is downloaded, and only raster formats are opened: Pillow would hand PostScript to an
external program. No state is shared between calls: threads do not wait for each other, and neither
warning filters nor Pillow's settings are changed.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, Union
from urllib.parse import unquote_to_bytes
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin
from PIL.ImageFile import ImageFile

from cmg_gguf.errors import ImageError, shown

ImageSource: TypeAlias = Union[
    str, "os.PathLike[str]", bytes, bytearray, memoryview, Image.Image, NDArray[np.uint8]
]
"""What `load_image` accepts."""

MAX_PIXELS = 64_000_000
"""Default limit of width * height."""

KEPT_PIXELS = 4096 * 4096
"""Larger images are scaled down to this or less. No image encoder in use sees as many pixels, and
photographs of 12 megapixels stay as they are."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
"""Formats that are opened, by Pillow's names, as far as this Pillow was built with them."""

# How the upright image is seen from the stored one, by EXIF orientation: views, nothing is copied.
_STORED: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}
_URL_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
# Pixels are converted by so many at a time: beside the decoded image there is no second one.
_BAND_PIXELS = 1 << 20


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return the pixels of `source` as a new C-contiguous (H, W, 3) uint8 RGB array.

    Args:
        source: a path, a `file:` URL, a base64 `data:` URL, the bytes of an image file, a PIL
            image, or an (H, W, 3) uint8 RGB array. It is never changed; a PIL image whose file is
            still open gets loaded, and gives the frame it stands on.
        max_pixels: largest width * height, >= 1, checked before anything is decoded. Pillow's own
            limit (`PIL.Image.MAX_IMAGE_PIXELS`) holds as well for files.

    An image above `KEPT_PIXELS` is scaled down by the least whole factor that brings it to this or
    below: each pixel is the mean of a square, within one level of 255. A JPEG file is scaled by 2,
    4 or 8 while it is decoded, in half the time and memory, and by the mean for the rest: not quite
    the pixels, nor the `image_id`, of the same JPEG as a PIL image, which is decoded whole.

    EXIF orientation is applied and transparency is laid on white. Of an animation the first frame
    is taken. 16-bit grey (modes I;16 and I, 0 to 65535) is divided by 257; float grey (mode F) is
    read as 0 to 1 if no value is above 1, as 0 to 255 otherwise.

    Threads may call this at once; a PIL image whose file is still open belongs to one of them. What
    Pillow warns about (a damaged TIFF tag, say) takes the way that the warning filters give it.

    Raises:
        ImageError: the source is of another type, is missing, empty, truncated, no image, too
            large, has no pixels, has grey values outside these ranges, or gives a warning that the
            caller's filters make an error.
    """
    if max_pixels < 1:
        raise ImageError(f"max_pixels={max_pixels} is out of range: it must be at least 1")
    limits = {"max_pixels": max_pixels}
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, Image.Image):
        name = f"PIL image of mode {source.mode}"
        with _pillow(name):
            return _pixels(source, name, limits)
    if Image.MAX_IMAGE_PIXELS is not None:
        limits["PIL.Image.MAX_IMAGE_PIXELS"] = Image.MAX_IMAGE_PIXELS
    stream, name = _open(source)
    with stream, _pillow(name):
        if stream.seek(0, io.SEEK_END) == 0:
            raise ImageError(f"{name} is empty (0 bytes): give a whole image file")
        stream.seek(0)
        with _identified(stream, name) as image:
            width, height = image.size
            _check_size(width, height, name, limits)
            factor = _factor(width, height)
            image.draft(None, (max(1, width // factor), max(1, height // factor)))
            return _pixels(image, name, limits)


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


def _from_array(array: NDArray[Any], limits: dict[str, int]) -> NDArray[np.uint8]:
    _check_array(array)
    height, width = array.shape[:2]
    _check_size(width, height, "array", limits)
    if _factor(width, height) == 1:
        return np.array(array, dtype=np.uint8, order="C")
    return _joined((width, height), lambda top, bottom: Image.fromarray(array[top:bottom]))


def _check_array(array: NDArray[Any]) -> None:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ImageError(
            f"array of shape {array.shape} and dtype {array.dtype} is not an RGB image: "
            "give shape (H, W, 3) and dtype uint8"
        )


def _check_size(width: int, height: int, name: str, limits: dict[str, int]) -> None:
    """Raise if there are no pixels, or more than one of `limits`, which has a setting's name."""
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width} x {height}): each side must be at least 1")
    for setting, limit in limits.items():
        if width * height > limit:
            raise ImageError(
                f"{name} has {width} x {height} = {width * height} pixels and the limit is "
                f"{limit}: scale it down or raise {setting}"
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


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG whose resolution is not looked for: broken EXIF, which may hold it, gives warnings."""

    def _read_dpi_from_exif(self) -> None:
        pass


def _identified(stream: BinaryIO, name: str) -> ImageFile:
    """Return the image, nothing decoded: `PIL.Image.open` less its warnings about whole files."""
    prefix = stream.read(16)
    for kind in _formats():
        factory, accept = Image.OPEN[kind]
        # These mean "of another format", as they do to Pillow.
        with suppress(SyntaxError, IndexError, TypeError, struct.error):
            if accept is None or accept(prefix) is True:
                stream.seek(0)
                return _Jpeg(stream, "") if kind == "JPEG" else factory(stream, "")
    raise ImageError(
        f"{name} is no image, or of a format that is not read: give one of {', '.join(_formats())}"
    )


@contextmanager
def _pillow(name: str) -> Iterator[None]:
    """Turn all that Pillow raises within into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as exc:
        raise ImageError(
            f"{name} is over Pillow's limit ({_line(exc)}): scale it down or raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from exc
    # Decoders fed with foreign bytes raise nearly every type there is.
    except Exception as exc:
        raise ImageError(
            f"{name} is damaged, truncated or unsupported ({_line(exc)}): "
            "save it anew as PNG or JPEG"
        ) from exc


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


def _factor(width: int, height: int) -> int:
    """Return the least by which both sides, rounded up, are divided to have `KEPT_PIXELS`."""
    factor = 1
    while -(-width // factor) * -(-height // factor) > KEPT_PIXELS:
        factor += 1
    return factor


def _pixels(image: Image.Image, name: str, limits: dict[str, int]) -> NDArray[np.uint8]:
    _check_size(*image.size, name, limits)
    image.load()
    # An ICO or TIFF can turn out otherwise than its header said.
    _check_size(*image.size, name, limits)
    to_rgb = _conversion(image, name)
    return _joined(image.size, lambda *band: to_rgb(_rows(image, *band)), _orientation(image))


def _rows(image: Image.Image, top: int, bottom: int) -> Image.Image:
    return image.crop((0, top, image.width, bottom))


def _joined(
    size: tuple[int, int], rows: Callable[[int, int], Image.Image], orientation: int = 1
) -> NDArray[np.uint8]:
    """Return the (H, W, 3) pixels of `rows(top, bottom)`, scaled down and then turned upright."""
    width, height = size
    factor = _factor(width, height)
    sides = (-(-height // factor), -(-width // factor))
    upright = np.empty((*(sides[::-1] if 5 <= orientation <= 8 else sides), 3), np.uint8)
    stored = _STORED[orientation](upright) if orientation in _STORED else upright
    for top, bottom in _bands(size, factor):
        band = rows(top, bottom).reduce(factor)
        stored[top // factor : -(-bottom // factor)] = np.asarray(band)
    return upright


def _bands(size: tuple[int, int], factor: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the first row of each band and the row after its last."""
    width, height = size
    step = max(1, _BAND_PIXELS // (width * factor)) * factor
    for top in range(0, height, step):
        yield top, min(top + step, height)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of a loaded image: a PNG may have its EXIF last."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # load() has turned it, and some versions of Pillow leave the tag
    info = image.info
    # A broken EXIF block says nothing about the pixels, which are whole. Where Pillow reads one it
    # warns: what was read would depend on the process's warning filters.
    with suppress(Exception):
        old_png = "".join(info.get("Raw profile type exif", "").split("\n")[3:])
        tag = _exif_orientation(info.get("exif") or bytes.fromhex(old_png))
        if tag is not None:
            return tag
    for key in ("XML:com.adobe.xmp", "xmp"):
        xmp = info.get(key, b"")
        if found := _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp):
            return int(found[1])
    return 1


def _exif_orientation(exif: bytes) -> int | None:
    """Return the orientation in the first directory, laid out as in TIFF 6.0: 12 bytes a tag."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}[tiff[:2]]
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for at in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, at)
        if tag == ExifTags.Base.Orientation:
            (value,) = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], tiff, at + 8)
            return int(value)
    return None


def _conversion(image: Image.Image, name: str) -> Callable[[Image.Image], Image.Image]:
    """Return what makes RGB of any rows of `image`."""
    if image.mode == "F" or image.mode.split(";")[0] == "I":
        return _deep_grey(image, name)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or (
        image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info
    ):
        return _on_white
    return lambda rows: rows.convert("RGB")


def _on_white(rows: Image.Image) -> Image.Image:
    straight = rows.convert("LA") if rows.mode == "La" else rows
    rgba = straight.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _deep_grey(image: Image.Image, name: str) -> Callable[[Image.Image], Image.Image]:
    """Return what scales grey of more than 8 bits to 0..255, never clipping, and repeats it."""
    grey = (np.asarray(_rows(image, *band)) for band in _bands(image.size))
    ranges = np.array([(float(rows.min()), float(rows.max())) for rows in grey])
    low, high = ranges[:, 0].min(), ranges[:, 1].max()
    limit = 255 if image.mode == "F" else 65535
    if not (low >= 0 and high <= limit):
        raise ImageError(
            f"{name} has grey values from {low:g} to {high:g} and mode {image.mode} is read as "
            f"0 to {limit}: scale it to 8 bits first"
        )
    unit = np.float32(255 if high <= 1 else 1) if image.mode == "F" else None

    def to_rgb(rows: Image.Image) -> Image.Image:
        grey = np.asarray(rows)  # (H, W) uint16, int32 or float32
        scaled = np.rint(grey * unit) if unit else (grey.astype(np.uint32) + 128) // 257
        levels = scaled.astype(np.uint8)
        if "transparency" in image.info:
            levels[grey == image.info["transparency"]] = 255
        return Image.fromarray(levels).convert("RGB")

    return to_rgb
