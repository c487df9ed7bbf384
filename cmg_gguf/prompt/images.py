"""From anything that holds an image to its pixels: (H, W, 3) uint8 RGB.

    rgb = load_image("photo.jpg")    # what else may hold one: `cmg_gguf.prompt.sources`
    rgb = load_image(array)          # (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8
    key = image_id(rgb)              # the same pixels, the same key

Which formats are opened: `cmg_gguf.prompt.formats`. No state is shared between calls: threads do
not wait for each other, and neither warning filters nor Pillow's settings are changed.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin

from cmg_gguf.errors import ImageError
from cmg_gguf.prompt.formats import identified
from cmg_gguf.prompt.limits import MAX_PIXELS, check_size, checked_max_pixels
from cmg_gguf.prompt.sources import ImageSource as ImageSource
from cmg_gguf.prompt.sources import opened

KEPT_PIXELS = 4096 * 4096
"""Larger images are scaled down to this or less. No image encoder in use sees as many pixels, and
photographs of 12 megapixels stay as they are."""

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
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
# Pixels are converted by so many at a time: beside the decoded image there is no second one.
_BAND_PIXELS = 1 << 20


def load_image(source: ImageSource, *, max_pixels: int | None = None) -> NDArray[np.uint8]:
    """Return the pixels of `source` as a new C-contiguous (H, W, 3) uint8 RGB array.

    Args:
        source: what `cmg_gguf.prompt.sources.opened` takes, a PIL image, or a uint8 array: (H, W)
            or (H, W, 1) grey, (H, W, 3) RGB, (H, W, 4) RGBA. It is never changed; a PIL image whose
            file is still open gets loaded, and gives the frame it stands on.
        max_pixels: largest width * height, >= 1, checked before anything is decoded. Of a JPEG
            file that is scaled while it is decoded, a quarter counts: 256 megapixels by default.
            None = `MAX_PIXELS`, and for files Pillow's own limit as well
            (`PIL.Image.MAX_IMAGE_PIXELS`).

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
    limits = {"max_pixels": checked_max_pixels(max_pixels) or MAX_PIXELS}
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, Image.Image):
        name = f"PIL image of mode {source.mode}"
        with _pillow(name):
            return _pixels(source, name, limits)
    if max_pixels is None and Image.MAX_IMAGE_PIXELS is not None:
        limits["PIL.Image.MAX_IMAGE_PIXELS"] = Image.MAX_IMAGE_PIXELS
    stream, name = opened(source)
    with stream, _pillow(name):
        if stream.seek(0, io.SEEK_END) == 0:
            raise ImageError(f"{name} is empty (0 bytes): give a whole image file")
        stream.seek(0)
        with identified(stream, name) as image:
            width, height = image.size
            factor = _factor(width, height)
            image.draft(None, (max(1, width // factor), max(1, height // factor)))
            # Nothing is decoded yet. A progressive file's coefficients are kept all the same.
            share = 1 if image.size == (width, height) else 4
            check_size(width, height, name, limits, share)
            return _pixels(image, name, limits)


def image_id(rgb: NDArray[np.uint8]) -> str:
    """Return the SHA-256 (64 hex digits) of the shape and pixels of an (H, W, 3) uint8 array.

    Memory layout does not enter: equal arrays have equal ids.

    Raises:
        ImageError: `rgb` has another shape or dtype.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ImageError(f"{_array_name(rgb)} is not RGB: give shape (H, W, 3) and dtype uint8")
    height, width, channels = rgb.shape
    digest = hashlib.sha256(f"{height}x{width}x{channels}:".encode())
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def _from_array(array: NDArray[Any], limits: dict[str, int]) -> NDArray[np.uint8]:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or array.shape[2:] in ((3,), (4,))):
        raise ImageError(
            f"{_array_name(array)} is not an image: give shape (H, W, 3) and dtype uint8, or "
            "(H, W) for grey, (H, W, 4) for RGBA"
        )
    height, width = array.shape[:2]
    check_size(width, height, "array", limits)
    if array.ndim == 3 and array.shape[2] == 3 and _factor(width, height) == 1:
        return np.array(array, dtype=np.uint8, order="C")

    def rows(top: int, bottom: int) -> Image.Image:
        band = Image.fromarray(np.ascontiguousarray(array[top:bottom]))
        return _on_white(band) if band.mode == "RGBA" else band.convert("RGB")

    return _joined((width, height), rows)


def _array_name(array: NDArray[Any]) -> str:
    return f"array of shape {array.shape} and dtype {array.dtype}"


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
    check_size(*image.size, name, limits)
    image.load()
    # An ICO or TIFF can turn out otherwise than its header said.
    check_size(*image.size, name, limits)
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
    pixels = min(_BAND_PIXELS, Image.MAX_IMAGE_PIXELS or _BAND_PIXELS)  # crops are held to it too
    step = max(1, pixels // (width * factor)) * factor
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
