"""The formats of image files that are opened, and which one a file has.

Only raster formats: Pillow would hand PostScript to an external program. HEIC is opened where
`pillow-heif` is installed, which is imported with the first such file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

from PIL import Image, JpegImagePlugin
from PIL.ImageFile import ImageFile

from cmg_gguf.errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "HEIF")
"""By Pillow's names, as far as this Pillow was built with them."""

N_PREFIX = 16
"""Bytes of a file's start that tell its format."""

_HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
_HEIF_SUFFIXES = {".heic", ".heif", ".hif"}


def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case and with their dot, of files that have these formats.

    Those of HEIC are among them also where it cannot be opened: so that it is told, not missed.
    """
    Image.init()
    kinds = Image.registered_extensions().items()
    opened = {suffix for suffix, kind in kinds if kind in FORMATS and kind in Image.OPEN}
    return frozenset(opened | _HEIF_SUFFIXES)


def is_image(prefix: bytes) -> bool:
    """Return whether a file that starts so, with `N_PREFIX` bytes, has one of the formats."""
    return _is_heif(prefix) or next(_factories(prefix), None) is not None


def identified(stream: BinaryIO, name: str) -> ImageFile:
    """Return the image, nothing decoded: `PIL.Image.open` less its warnings about whole files.

    Raises:
        ImageError: it has none of the formats.
    """
    prefix = stream.read(N_PREFIX)
    for kind, factory in _factories(prefix):
        # These mean "of another format", as they do to Pillow.
        with suppress(SyntaxError, IndexError, TypeError, struct.error):
            stream.seek(0)
            image: ImageFile = _Jpeg(stream, "") if kind == "JPEG" else factory(stream, "")
            return image
    if _is_heif(prefix) and "HEIF" not in Image.OPEN:
        raise ImageError(
            f"{name} is HEIC, which is read where pillow-heif is installed: pip install "
            "'cmg-gguf[heif]', or save it as JPEG"
        )
    raise ImageError(
        f"{name} is no image, or of a format that is not read: give one of {', '.join(_formats())}"
    )


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG whose resolution is not looked for: broken EXIF, which may hold it, gives warnings."""

    def _read_dpi_from_exif(self) -> None:
        pass


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _factories(prefix: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the formats that a file may have which starts so, and what opens each."""
    if _is_heif(prefix):
        _register_heif()
    for kind in _formats():
        factory, accept = Image.OPEN[kind]
        with suppress(SyntaxError, IndexError, TypeError, struct.error):
            if accept is None or accept(prefix) is True:
                yield kind, factory


def _is_heif(prefix: bytes) -> bool:
    return prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF_BRANDS


def _register_heif() -> None:
    """Let Pillow open HEIC, as far as that is installed. Twice is once."""
    if "HEIF" in Image.OPEN:
        return
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
