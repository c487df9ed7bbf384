"""Images: every way to hold one gives the same pixels; what is no image gives one clear line."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngInfo

from cmg_gguf.errors import CMGError, ImageError
from cmg_gguf.prompt import images
from cmg_gguf.prompt.images import image_id, load_image

Pixels = NDArray[np.uint8]

WHITE = [255, 255, 255]


@pytest.fixture
def rgb() -> Pixels:
    """(3, 4, 3) uint8 without symmetry, so that turns, flips and swapped channels show."""
    return np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)


def encoded(image: Image.Image | NDArray[Any], fmt: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    pil = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    pil.save(stream, fmt, **options)
    return stream.getvalue()


def data_url(content: bytes, header: str = "data:image/png;base64") -> str:
    return f"{header},{base64.b64encode(content).decode()}"


def png(
    width: int,
    height: int,
    bit_depth: int = 8,
    colour: int = 2,
    extra: bytes = b"",
    pixels: bytes = b"",
) -> bytes:
    """A PNG written by hand, also one that no encoder would write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", extra) if extra else b"")
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


def refused(source: Any, **options: Any) -> str:
    """The one line of the ImageError that `source` gives."""
    with pytest.raises(ImageError) as info:
        load_image(source, **options)
    line = str(info.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


# --- every source -------------------------------------------------------------------------------


def sources_of(content: bytes, folder: Path) -> dict[str, Any]:
    path = folder / "a b#1%é.png"
    path.write_bytes(content)
    return {
        "str": str(path),
        "PathLike": path,
        "file url": path.as_uri(),
        "file url, host": "file://localhost" + quote(str(path)),
        "file url, one slash": "FILE:" + quote(str(path)),
        "file url, unquoted #": "file://" + quote(str(path), safe="/#"),
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "strided memoryview": memoryview(bytes(b for c in content for b in (c, 0)))[::2],
        "PIL": Image.open(io.BytesIO(content)),
        "data": data_url(content),
        "data, parameters": data_url(content, "DATA:image/png;name=a.png;charset=x;BASE64"),
        "data, no type": data_url(content, "data:;base64"),
        "data, wrong type": data_url(content, "data:image/jpeg;base64"),
        "data, lines": "data:image/png;base64,\n" + base64.encodebytes(content).decode(),
        "data, quoted": "data:image/png;base64," + quote(base64.b64encode(content), safe=""),
        "data, lax": "data:image/png;base64, " + lax(content),
        "base64": base64.b64encode(content).decode(),
        "base64, lax": lax(content),
        "base64, lines": base64.encodebytes(content).decode(),
        "base64 as bytes": base64.b64encode(content),
        "data as bytes": data_url(content).encode(),
        "BytesIO": io.BytesIO(content),
        "stream that cannot go back": OneWay(content),
    }


def lax(content: bytes) -> str:
    """URL-safe, unpadded, white space within."""
    digits = base64.urlsafe_b64encode(content).decode().rstrip("=")
    return "\t \r\n".join((digits[:7], digits[7:30], digits[30:], ""))


class OneWay(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def seek(self, *arguments: Any) -> int:
        raise io.UnsupportedOperation("seek")


def test_every_source_gives_the_same_new_writable_rgb_array(rgb: Pixels, tmp_path: Path) -> None:
    for name, source in sources_of(encoded(rgb), tmp_path).items():
        out = load_image(source)
        assert (out.dtype.name, out.flags.c_contiguous, out.flags.writeable) == ("uint8", 1, 1)
        np.testing.assert_array_equal(out, rgb, err_msg=name)


def test_an_open_file_is_read_from_its_start_and_stands_where_it_stood(rgb: Pixels) -> None:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG")  # and now it stands at its end
    for place in (file.tell(), 5, 0):
        file.seek(place)
        np.testing.assert_array_equal(load_image(file), rgb)
        assert file.tell() == place


@pytest.mark.parametrize("buffering", [0, -1])
def test_an_open_file_is_read(rgb: Pixels, tmp_path: Path, buffering: int) -> None:
    (tmp_path / "a.png").write_bytes(encoded(rgb))
    with (tmp_path / "a.png").open("rb", buffering) as file:
        for _ in range(2):
            np.testing.assert_array_equal(load_image(file), rgb)


def test_a_file_that_gives_no_bytes_is_refused_with_what_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert 'open(path, "rb")' in refused(io.StringIO("text"))
    with (tmp_path / "a.txt").open() as file:
        assert "a.txt" in refused(file)
    assert "closed file" in refused(file)
    with (tmp_path / "a.txt").open("ab") as written:
        assert "cannot be read" in refused(written)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    content = encoded(noise)  # more than a pipe holds
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb") as stream:
            stream.write(content)

    writer = threading.Thread(target=write)
    writer.start()
    np.testing.assert_array_equal(load_image(f"/dev/fd/{reading}"), noise)
    writer.join()
    os.close(reading)


def test_a_string_is_a_path_where_there_is_such_a_file(
    rgb: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("aGVsbG8").write_bytes(encoded(rgb))
    np.testing.assert_array_equal(load_image("aGVsbG8"), rgb)


@pytest.mark.parametrize("text", ["kitchen", "aGVsbG8=", "photos/kitchen", "A" * 100_000])
def test_a_string_that_is_neither_file_nor_image_is_refused_as_both(text: str) -> None:
    line = refused(text)
    assert "neither a file" in line
    assert "nor the base64 of an image" in line


def test_base64_that_is_cut_short_is_refused_as_damaged_base64(rgb: Pixels) -> None:
    line = refused(base64.b64encode(encoded(rgb)).decode()[:60])
    assert line.startswith("base64 'iVBORw0KGgo")
    assert "of 60 characters is damaged" in line


def test_a_text_format_is_no_base64_of_another() -> None:
    assert load_image(b"P1\n2 1\n1 0\n").tolist() == [[[0] * 3, [255] * 3]]


def test_grey_and_rgba_arrays_are_what_pillow_makes_of_them() -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (3, 5), np.uint8)
    np.testing.assert_array_equal(load_image(grey), np.stack([grey] * 3, axis=-1))
    np.testing.assert_array_equal(load_image(grey[..., None]), np.stack([grey] * 3, axis=-1))
    rgba = rng.integers(0, 256, (3, 5, 4), np.uint8)
    np.testing.assert_array_equal(load_image(rgba), load_image(Image.fromarray(rgba)))
    np.testing.assert_array_equal(load_image(rgba[:, ::-1]), load_image(rgba)[:, ::-1])
    clear = rgba * np.array([1, 1, 1, 0], np.uint8)
    assert (load_image(clear) == 255).all()


def test_heic_is_read_where_pillow_heif_is_installed(rgb: Pixels) -> None:
    heif = pytest.importorskip("pillow_heif")
    large = rgb.repeat(32, axis=0).repeat(32, axis=1)
    stream = io.BytesIO()
    heif.from_pillow(Image.fromarray(large)).save(stream, quality=-1, chroma=444)
    out = load_image(stream.getvalue())
    assert out.shape == large.shape
    assert np.abs(out.astype(int) - large).max() <= 8  # lossless but for YCbCr's rounding


@pytest.mark.parametrize("orientation", [3, 6])
def test_heic_is_turned_once(rgb: Pixels, orientation: int) -> None:
    heif = pytest.importorskip("pillow_heif")
    large = rgb.repeat(32, axis=0).repeat(32, axis=1)
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(large)
    heif.from_pillow(image).save(stream, quality=-1, chroma=444, exif=exif.tobytes())
    upright = np.rot90(large, {3: 2, 6: -1}[orientation])
    out = load_image(stream.getvalue())
    assert out.shape == upright.shape
    assert np.abs(out.astype(int) - upright).max() <= 8


def test_heic_without_pillow_heif_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    assert "pip install 'cmg-gguf[heif]'" in refused(b"\0\0\0\x18ftypheic" + bytes(100))


def test_an_array_of_any_layout_is_copied_to_a_contiguous_one(rgb: Pixels) -> None:
    for array in (rgb, rgb[:, ::-1], np.asfortranarray(rgb), rgb[..., ::-1]):
        out = load_image(array)
        np.testing.assert_array_equal(out, array)
        assert out.flags.c_contiguous
        assert not np.shares_memory(out, array)


def test_a_path_like_that_returns_bytes_is_read(rgb: Pixels, tmp_path: Path) -> None:
    class BytesPath:
        def __fspath__(self) -> bytes:
            return os.fsencode(tmp_path / "x.png")

    (tmp_path / "x.png").write_bytes(encoded(rgb))
    source: Any = BytesPath()
    np.testing.assert_array_equal(load_image(source), rgb)


def test_the_file_is_closed_whether_it_is_read_or_refused(rgb: Pixels, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encoded(rgb))
    bad.write_bytes(b"no image")
    load_image(good)
    refused(bad)  # an open file would be a ResourceWarning, which is an error in these tests


def test_the_callers_image_and_array_stay_as_they_are(rgb: Pixels) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = Image.fromarray(rgb).quantize(4)
    palette.info["transparency"] = 0
    turned = Image.open(io.BytesIO(encoded(rgb, "JPEG", exif=exif)))
    for image in (palette, turned, Image.fromarray(rgb).convert("RGBA")):
        image.load()
        before = (image.mode, image.size, dict(image.info), image.tobytes())
        load_image(image)[:] = 0
        assert (image.mode, image.size, dict(image.info), image.tobytes()) == before
    array = rgb.copy()
    load_image(array)[:] = 0
    np.testing.assert_array_equal(array, rgb)
    array.flags.writeable = False
    load_image(array)


# --- every mode ---------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(rgb: Pixels, orientation: int, fmt: str) -> None:
    upright = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, -1),
        7: np.rot90(rgb.transpose(1, 0, 2), 2),
        8: np.rot90(rgb, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if fmt == "WEBP" else {}
    content = encoded(rgb, fmt, exif=exif, **options)
    np.testing.assert_array_equal(load_image(content), upright)
    np.testing.assert_array_equal(load_image(Image.open(io.BytesIO(content))), upright)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"]
)
def test_broken_exif_does_not_cost_the_image(rgb: Pixels, exif: bytes) -> None:
    np.testing.assert_array_equal(load_image(encoded(rgb, exif=exif)), rgb)


@pytest.mark.parametrize("orientation", [0, 9, 4000])
def test_an_orientation_that_does_not_exist_is_no_turn(rgb: Pixels, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(load_image(encoded(rgb, exif=exif)), rgb)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_alpha_is_laid_on_white(mode: str) -> None:
    full = Image.new("RGBA" if mode != "PA" else "PA", (3, 1))
    if mode == "PA":
        full.putpalette([100, 100, 100])
        full.putdata([(0, 0), (0, 128), (0, 255)])
        image = full
    else:
        full.putdata([(100, 100, 100, 0), (100, 100, 100, 128), (100, 100, 100, 255)])
        straight = full if mode.startswith("RGB") else full.convert("LA")
        image = straight.convert(mode)
    out = load_image(image)
    assert out[0, 0].tolist() == WHITE
    assert np.abs(out[0, 1].astype(int) - 177).max() <= 1
    assert out[0, 2].tolist() == [100, 100, 100]


def test_a_transparent_palette_colour_of_a_png_or_gif_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    for fmt in ("PNG", "GIF"):
        out = load_image(encoded(image, fmt, transparency=0))
        assert out.tolist() == [[WHITE, [40, 50, 60]]], fmt


def test_a_palette_with_an_alpha_for_each_colour_is_laid_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 40, 50, 60])
    image.putdata([0, 1])
    out = load_image(encoded(image, transparency=bytes([51, 255])))
    assert out.tolist() == [[[204, 204, 204], [40, 50, 60]]]


def test_a_transparent_colour_of_a_png_without_alpha_is_white() -> None:
    rgb8 = png(2, 1, extra=struct.pack(">HHH", 1, 2, 3), pixels=b"\0" + bytes([1, 2, 3, 4, 5, 6]))
    assert load_image(rgb8).tolist() == [[WHITE, [4, 5, 6]]]
    grey8 = png(2, 1, colour=0, extra=struct.pack(">H", 7), pixels=b"\0" + bytes([7, 8]))
    assert load_image(grey8).tolist() == [[WHITE, [8, 8, 8]]]
    grey1 = png(8, 1, 1, 0, extra=struct.pack(">H", 0), pixels=b"\0\x00")
    assert load_image(grey1).tolist() == [[WHITE] * 8]
    pixels = b"\0" + struct.pack(">HH", 257 * 7, 257 * 7 + 1)
    grey16 = png(2, 1, 16, 0, extra=struct.pack(">H", 257 * 7), pixels=pixels)
    assert load_image(grey16).tolist() == [[WHITE, [7, 7, 7]]]


def test_a_palette_without_transparency_gives_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert load_image(encoded(image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_one_bit_and_grey_images_are_grey_rgb() -> None:
    bits = Image.new("1", (2, 1))
    bits.putdata([0, 255])
    assert load_image(encoded(bits)).tolist() == [[[0, 0, 0], WHITE]]
    assert load_image(Image.new("L", (1, 1), 9)).tolist() == [[[9, 9, 9]]]


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "PPM", "memory I;16", "memory I;16B", "memory I"])
def test_sixteen_bit_grey_is_scaled_not_clipped(fmt: str) -> None:
    grey = np.array([[0, 128, 129, 32768, 65535]], np.uint16)
    source: Any
    if fmt == "PPM":
        source = b"P5 5 1 65535\n" + grey.astype(">u2").tobytes()
    elif fmt == "memory I":
        source = Image.fromarray(grey.astype(np.int32))
    elif fmt.startswith("memory"):
        mode = fmt.split()[1]
        order = ">u2" if mode.endswith("B") else "<u2"
        source = Image.frombytes(mode, (5, 1), grey.astype(order).tobytes())
    else:
        source = encoded(grey, fmt)
    out = load_image(source)
    assert out[..., 0].tolist() == [[0, 0, 1, 128, 255]]
    assert (out == out[..., :1]).all()


def test_float_grey_is_read_as_0_to_1_or_as_0_to_255() -> None:
    unit = Image.fromarray(np.array([[0, 0.5, 1]], np.float32))
    assert load_image(unit)[0, :, 0].tolist() == [0, 128, 255]
    byte = Image.fromarray(np.array([[0, 99.6, 255]], np.float32))
    assert load_image(byte)[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("value", [256.0, -0.5, np.nan, np.inf])
def test_float_grey_out_of_range_is_refused_with_its_range(value: float) -> None:
    line = refused(Image.fromarray(np.array([[0, value]], np.float32)))
    assert "mode F is read as 0 to 255" in line


@pytest.mark.parametrize("value", [-1, 65536])
def test_integer_grey_out_of_range_is_refused_with_its_range(value: float) -> None:
    line = refused(Image.fromarray(np.array([[0, value]], np.int32)))
    assert str(value) in line
    assert "mode I is read as 0 to 65535" in line


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_other_colour_models_become_rgb(mode: str) -> None:
    if mode == "LAB" and not features.check("littlecms2"):
        pytest.skip("this Pillow has no LAB conversion")
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    lab = Image.new("LAB", (1, 1), (138, 209, 198))
    image = lab if mode == "LAB" else red.convert(mode)
    assert np.abs(load_image(image).astype(int) - [255, 0, 0]).max() <= 8


def test_a_cmyk_jpeg_is_not_inverted() -> None:
    image = Image.new("RGB", (16, 16), (255, 255, 0)).convert("CMYK")
    out = load_image(encoded(image, "JPEG", quality=95))
    assert np.abs(out.astype(int) - [255, 255, 0]).max() <= 8


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(fmt: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if fmt == "WEBP" else {}
    content = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert load_image(content)[0, 0].tolist() == [255, 0, 0]


def test_a_pil_animation_gives_the_frame_it_stands_on() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    image = Image.open(io.BytesIO(content))
    image.seek(1)
    assert load_image(image)[0, 0].tolist() == [0, 0, 255]
    assert image.tell() == 1


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http", "https", "HTTPS", "s3", "ftp"])
def test_other_urls_are_refused_and_the_line_says_what_to_do(scheme: str) -> None:
    line = refused(f"{scheme}://example.com/cat.png")
    assert "does not download" in line
    assert "path or bytes" in line
    assert "example.com" in line


def test_a_file_url_of_another_host_is_refused() -> None:
    assert "'server'" in refused("file://server/share/a.png")


def test_a_missing_file_a_folder_and_a_bad_name_are_refused_by_name(tmp_path: Path) -> None:
    assert "nowhere.png" in refused(tmp_path / "nowhere.png")
    assert "not a regular file" in refused(tmp_path)
    assert "not a regular file" in refused("")
    assert "cannot be opened" in refused("a\0b.png")
    assert "cannot be opened" in refused("line\nbreak.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_a_pipe_that_nobody_writes_to_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is empty (0 bytes)" in refused(tmp_path / "pipe")


def test_empty_sources_are_refused_as_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for source in (b"", bytearray(), memoryview(b""), tmp_path / "empty.png", "data:;base64,"):
        assert "is empty (0 bytes)" in refused(source)


@pytest.mark.parametrize("content", [b"x", b"<svg></svg>", b"%PDF-1.7\n", bytes(1000), b"\x89PNG"])
def test_bytes_that_are_no_image_are_refused_with_the_formats_that_are(content: bytes) -> None:
    line = refused(content)
    assert f"{len(content)} bytes" in line
    assert "PNG, JPEG" in line


def test_postscript_never_reaches_its_external_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: object, **options: object) -> NoReturn:
        pytest.fail("an external program was started")

    monkeypatch.setattr("subprocess.Popen", run)
    monkeypatch.setattr("subprocess.check_call", run)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    assert "no image" in refused(eps)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_a_truncated_file_is_refused(fmt: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(noise, fmt)
    for keep in (0.3, 0.6, 0.9):
        assert "bytes" in refused(content[: int(len(content) * keep)])


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "AVIF"])
def test_damaged_bytes_give_pixels_or_an_image_error_and_nothing_else(fmt: str) -> None:
    Image.init()
    if fmt not in Image.SAVE:
        pytest.skip(f"this Pillow has no {fmt}")
    rng = np.random.default_rng(2)
    size = (16, 16, 3)
    content = np.frombuffer(encoded(rng.integers(0, 256, size, dtype=np.uint8), fmt), np.uint8)
    for _ in range(60):
        bad = content.copy()
        where = rng.integers(0, min(len(bad), 200), 4)
        bad[where] = rng.integers(0, 256, 4)
        try:
            out = load_image(bad.tobytes(), max_pixels=10_000)
        except ImageError:
            continue
        assert (out.dtype.name, out.ndim, out.shape[2]) == ("uint8", 3, 3)


def test_the_error_keeps_what_pillow_said_as_its_cause() -> None:
    with pytest.raises(ImageError) as info:
        load_image(png(4, 4, pixels=b""))
    assert info.value.__cause__ is not None
    assert {CMGError, ValueError} < set(ImageError.mro())


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64;x=1,abcd", "not base64"),
        ("data:image/png;base64,a$b=", "not valid base64"),
        ("data:image/png;base64,abcde", "not valid base64"),
        ("data:image/png;base64,aGVs$bG8=", "not valid base64"),
        ("data:image/png;base64,aGVsbG8=", "no image"),
    ],
)
def test_a_bad_data_url_is_refused_for_its_own_reason(url: str, says: str) -> None:
    assert says in refused(url)


def test_a_long_data_url_is_not_repeated_in_the_message() -> None:
    assert len(refused("data:image/png;base64," + "A" * 100_000)) < 500


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros(4, np.uint8), "(4,)"),
        (np.zeros((4, 4, 2), np.uint8), "(4, 4, 2)"),
        (np.zeros((3, 4, 5), np.uint8), "(3, 4, 5)"),
        (np.zeros((4, 4), np.bool_), "bool"),
        (np.zeros((4, 4, 4), np.float64), "float64"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 3), np.uint16), "uint16"),
        (np.zeros((4, 4, 3), np.int8), "int8"),
        (np.zeros((1, 4, 4, 3), np.uint8), "(1, 4, 4, 3)"),
        (np.array(None), "object"),
    ],
)
def test_another_array_is_refused_by_shape_and_dtype(array: NDArray[Any], says: str) -> None:
    line = refused(array)
    assert says in line
    assert "(H, W, 3) and dtype uint8" in line
    with pytest.raises(ImageError, match="dtype uint8"):
        image_id(array)


@pytest.mark.parametrize("source", [None, 3, ["a.png"], {"url": "a.png"}, open])
def test_another_type_is_refused_by_name(source: Any) -> None:
    assert type(source).__name__ in refused(source)


def test_images_without_pixels_are_refused() -> None:
    for shape in ((0, 4, 3), (4, 0, 3), (0, 0, 3)):
        assert "has no pixels" in refused(np.zeros(shape, np.uint8))
    assert "has no pixels (0 x 4)" in refused(Image.new("RGB", (0, 4)))
    refused(png(0, 4))


# --- limits -------------------------------------------------------------------------------------


def test_the_pixel_limit_is_exact_and_named_for_every_source(rgb: Pixels) -> None:
    for source in (rgb, encoded(rgb), Image.fromarray(rgb), data_url(encoded(rgb))):
        load_image(source, max_pixels=12)
        line = refused(source, max_pixels=11)
        assert "12 pixels" in line
        assert "limit is 11" in line
        assert "max_pixels" in line


def test_the_limit_is_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: object) -> NoReturn:
        pytest.fail("decoded an image that is over the limit")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", decode, raising=False)
    assert "9000 x 9000 = 81000000 pixels" in refused(png(9000, 9000))


@pytest.mark.parametrize("side", [10_000, 20_000, 2**31 - 1])
def test_pillows_own_bomb_warning_and_error_are_image_errors(side: int) -> None:
    assert "limit" in refused(png(side, side))
    assert "limit" in refused(png(side, side), max_pixels=10_000)


def test_pillows_own_limit_holds_where_none_is_asked_for(
    rgb: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 11)
    line = refused(encoded(rgb))
    assert "12 pixels and the limit is 11" in line
    assert "raise PIL.Image.MAX_IMAGE_PIXELS" in line
    load_image(encoded(rgb), max_pixels=12)  # and what was asked for holds by itself
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 4)
    load_image(encoded(rgb), max_pixels=12)  # and wherever Pillow looks at its own once more


@pytest.mark.parametrize("limit", ["12", 12.0, True, -5])
def test_a_pixel_limit_that_is_none_is_refused(rgb: Pixels, limit: Any) -> None:
    assert f"max_pixels={limit!r} is out of range" in refused(rgb, max_pixels=limit)


@pytest.mark.slow
def test_a_phones_photograph_of_108_megapixels_is_read_by_default() -> None:
    photo = Image.new("RGB", (12_000, 9_000), (200, 40, 40))
    photo.paste((40, 40, 200), (6_000, 0, 12_000, 9_000))
    data = io.BytesIO()
    photo.save(data, "JPEG")
    out = load_image(data.getvalue())
    assert out.shape == (2_250, 3_000, 3)  # halved while it is decoded, and by the mean once more
    for column, colour in ((750, (200, 40, 40)), (2250, (40, 40, 200))):
        assert np.abs(out[1000, column].astype(int) - colour).max() <= 2


def test_of_a_jpeg_that_is_scaled_while_it_is_decoded_a_quarter_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cmg_gguf.prompt.images.KEPT_PIXELS", 64 * 64)
    data = io.BytesIO()
    Image.new("RGB", (200, 100), (200, 40, 40)).save(data, "JPEG")
    photo = data.getvalue()
    assert load_image(photo, max_pixels=5_000).shape == (25, 50, 3)
    line = refused(photo, max_pixels=4_999)
    assert "20000 pixels and the limit is 19996" in line
    assert "raise max_pixels (--max-pixels), now 4999" in line
    refused(png(200, 100), max_pixels=19_999)  # which no decoder scales


def test_a_bomb_in_a_data_url_or_file_is_refused_by_that_name(tmp_path: Path) -> None:
    bomb = png(20_000, 20_000)
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert "bomb.png" in refused(tmp_path / "bomb.png")
    assert "data URL" in refused(data_url(bomb))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_pixel_is_refused(rgb: Pixels, limit: int) -> None:
    assert f"max_pixels={limit}" in refused(rgb, max_pixels=limit)


# --- large images -------------------------------------------------------------------------------


@pytest.fixture
def kept_100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of more than 100 pixels are scaled down, and bands hold few rows."""
    monkeypatch.setattr(images, "KEPT_PIXELS", 100)
    monkeypatch.setattr(images, "_BAND_PIXELS", 64)


def whole(source: Any) -> Pixels:
    """What `load_image` gives where nothing is scaled down."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "KEPT_PIXELS", 10**9)
        return load_image(source)


def box_mean(full: Pixels, factor: int) -> NDArray[np.float64]:
    """The mean of each factor x factor square, and of what is left of one at the edges."""
    rows = [full[top : top + factor] for top in range(0, len(full), factor)]
    columns = range(0, full.shape[1], factor)
    return np.array(
        [[r[:, left : left + factor].mean(axis=(0, 1)) for left in columns] for r in rows]
    )


def large(mode: str, height: int = 30, width: int = 26) -> Image.Image:
    rng = np.random.default_rng(3)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode == "F":
        return Image.fromarray(rng.random((height, width), dtype=np.float32))
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    if mode == "P":
        palette = noise.convert("RGB").quantize(16)
        palette.info["transparency"] = bytes(range(0, 256, 16))
        return palette
    return noise if mode == "RGBA" else noise.convert("RGB").convert(mode)


@pytest.mark.usefixtures("kept_100")
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "I;16", "F", "RGBA", "LA", "CMYK"])
def test_a_large_image_becomes_the_box_mean_of_its_pixels_on_white(mode: str) -> None:
    source = large(mode)
    out = load_image(source)
    assert out.shape == (10, 9, 3)  # 30 x 26 by 3: by 2 it would have 15 x 13 = 195 pixels
    assert np.abs(out - box_mean(whole(source), 3)).max() <= 1
    if mode not in ("F", "CMYK"):
        np.testing.assert_array_equal(load_image(encoded(source)), out)


@pytest.mark.usefixtures("kept_100")
def test_the_range_of_float_grey_is_that_of_all_rows() -> None:
    grey = np.ones((90, 1), np.float32)
    grey[-1] = 200
    assert load_image(Image.fromarray(grey))[[0, -1], 0, 0].tolist() == [1, 200]
    grey[-1] = np.nan
    assert "from nan to nan" in refused(Image.fromarray(grey))


@pytest.mark.usefixtures("kept_100")
def test_colour_under_full_transparency_does_not_bleed_into_a_large_image() -> None:
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[::2] = [200, 100, 50, 255]  # between rows of transparent black
    mean = [(255 + 200) / 2, (255 + 100) / 2, (255 + 50) / 2]
    assert np.abs(load_image(encoded(pixels)) - mean).max() <= 0.5


@pytest.mark.usefixtures("kept_100")
def test_an_image_at_the_limit_is_untouched_and_one_above_it_is_not() -> None:
    noise = np.random.default_rng(4).integers(0, 256, (11, 10, 3), dtype=np.uint8)
    for at_limit in (noise[:10], encoded(noise[:10])):
        np.testing.assert_array_equal(load_image(at_limit), noise[:10])
    for above in (noise, encoded(noise), Image.fromarray(noise)):
        assert load_image(above).shape == (6, 5, 3)


@pytest.mark.usefixtures("kept_100")
def test_every_source_of_a_large_image_has_one_id_and_loading_twice_changes_nothing() -> None:
    noise = np.array(large("RGB"))
    first = load_image(noise)
    for source in (encoded(noise), Image.fromarray(noise), np.asfortranarray(noise), first):
        assert image_id(load_image(source)) == image_id(first)


@pytest.mark.usefixtures("kept_100")
def test_a_large_jpeg_file_has_an_id_of_its_own_that_is_the_same_from_every_place(
    tmp_path: Path,
) -> None:
    """It is scaled while it is decoded; a PIL image of it is decoded whole, and not changed."""
    y, x = np.mgrid[:40, :36]
    smooth = np.stack([y * 6, x * 7, (x + y) * 3], -1).astype(np.uint8)
    content = encoded(smooth, "JPEG", quality=95)
    (tmp_path / "large.jpg").write_bytes(content)
    files = [load_image(source) for source in (content, tmp_path / "large.jpg", data_url(content))]
    opened = Image.open(io.BytesIO(content))
    decoded = load_image(opened)
    assert opened.size == (36, 40)
    assert len({image_id(pixels) for pixels in files}) == 1
    assert image_id(decoded) == image_id(load_image(whole(content))) != image_id(files[0])
    assert np.abs(decoded.astype(int) - files[0]).max() <= 16


@pytest.mark.usefixtures("kept_100")
@pytest.mark.parametrize("shape", [(1, 1001), (1001, 1), (3, 700), (150, 150)])
def test_no_shape_keeps_more_than_the_limit(shape: tuple[int, int]) -> None:
    height, width, _ = load_image(np.zeros((*shape, 3), np.uint8)).shape
    assert height * width <= 100


@pytest.mark.parametrize("fmt", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_turned_image_is_the_turned_small_one(
    orientation: int, fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "KEPT_PIXELS", 80)
    small = np.arange(0, 240, 3, dtype=np.uint8).reshape(8, 10)
    source = Image.fromarray(np.kron(small, np.ones((16, 16), np.uint8))).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = load_image(encoded(source, fmt, exif=exif, **({"quality": 100} if fmt == "JPEG" else {})))
    upright = {
        1: small,
        2: small[:, ::-1],
        3: small[::-1, ::-1],
        4: small[::-1],
        5: small.T,
        6: np.rot90(small, -1),
        7: np.rot90(small.T, 2),
        8: np.rot90(small, 1),
    }[orientation]
    assert out.shape == (*upright.shape, 3)
    assert np.abs(out.astype(int) - upright[..., np.newaxis]).max() <= 3


def test_a_large_jpeg_is_decoded_small_and_close_to_the_box_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    y, x = np.mgrid[:320, :240]
    waves = np.stack([127 + 100 * np.sin(x / 9), 127 + 100 * np.cos(y / 7), (x + y) / 3], -1)
    content = encoded(waves.astype(np.uint8), "JPEG", quality=95)
    full = load_image(content)
    sizes: list[tuple[int, int]] = []
    core: Any = vars(Image)["core"]
    new = core.new

    def counted(mode: str, size: tuple[int, int]) -> Any:
        sizes.append(size)
        return new(mode, size)

    for limit, factor in ((320 * 240 // 4, 2), (320 * 240 // 16, 4), (320 * 240 // 144, 12)):
        monkeypatch.setattr(images, "KEPT_PIXELS", limit)
        monkeypatch.setattr(core, "new", counted)
        out = load_image(content)
        assert max(width * height for width, height in sizes) <= 320 * 240 // min(factor, 8) ** 2
        sizes.clear()
        # By 12 is by 8 while decoding and by 2 after it.
        error = np.abs(out - box_mean(full, 16 if factor == 12 else factor))
        assert error.mean() <= 1.5
        assert error.max() <= 12


# --- threads and warnings -----------------------------------------------------------------------


def test_a_small_image_is_loaded_while_another_thread_is_inside_its_decoder(
    rgb: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()
    load = ImageFile.load

    def load_slowly(self: ImageFile) -> Any:
        if self.size == (50, 50):
            entered.set()
            assert leave.wait(10)
        return load(self)

    monkeypatch.setattr(ImageFile, "load", load_slowly)
    content = encoded(np.full((50, 50, 3), 7, np.uint8))
    large: list[Pixels] = []
    small: list[Pixels] = []
    slow = threading.Thread(target=lambda: large.append(load_image(content)))
    quick = threading.Thread(target=lambda: small.append(load_image(encoded(rgb))))
    slow.start()
    assert entered.wait(10)
    quick.start()
    quick.join(10)
    arrived = len(small), len(large)
    leave.set()
    slow.join()
    quick.join()
    assert arrived == (1, 0)
    np.testing.assert_array_equal(small[0], rgb)
    assert (large[0] == 7).all()


def test_many_threads_get_their_own_pixels_or_their_own_error(rgb: Pixels) -> None:
    before = list(warnings.filters)
    failures: list[str] = []

    def work(number: int) -> None:
        mine = rgb + np.uint8(number)
        good = [encoded(mine, fmt) for fmt in ("PNG", "BMP", "TIFF", "PPM")]
        bad = {bytes(number + 1): f"of {number + 1} bytes is no image"}
        bad[png(10_000 + number, 10_000)] = f"has {10_000 + number} x 10000"
        bad[encoded(mine)[: 50 + number]] = f"of {50 + number} bytes is damaged"
        for _ in range(20):
            if not all(np.array_equal(load_image(content), mine) for content in good):
                failures.append(f"thread {number} got other pixels")
            for content, says in bad.items():
                try:
                    load_image(content)
                    failures.append(f"thread {number}: nothing raised, not {says!r}")
                except ImageError as exc:
                    if says not in str(exc):
                        failures.append(f"thread {number}: {exc}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(warnings.filters) == before


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_pixels_do_not_depend_on_the_warning_filters(rgb: Pixels, action: Any) -> None:
    entry = struct.pack("<HHII", 0x010F, 2, 99, 9999) + struct.pack("<HHIHH", 0x0112, 3, 1, 3, 0)
    broken = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entry  # a maker's name that lies outside; no end
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        np.testing.assert_array_equal(load_image(encoded(rgb, exif=broken)), rgb[::-1, ::-1])
        jpeg = encoded(rgb, "JPEG", quality=100, subsampling=0, exif=broken)
        plain = encoded(rgb, "JPEG", quality=100, subsampling=0)
        np.testing.assert_array_equal(load_image(jpeg), load_image(plain)[::-1, ::-1])
        assert "has 10000 x 10000" in refused(png(10_000, 10_000))


def test_an_orientation_in_xmp_is_applied_where_exif_has_none(rgb: Pixels) -> None:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    np.testing.assert_array_equal(load_image(encoded(rgb, pnginfo=info)), rgb[::-1, ::-1])


# --- identity -----------------------------------------------------------------------------------


def test_image_id_is_the_hash_of_shape_and_pixels_not_of_layout(rgb: Pixels) -> None:
    assert image_id(rgb) == hashlib.sha256(b"3x4x3:" + rgb.tobytes()).hexdigest()
    assert image_id(np.asfortranarray(rgb)) == image_id(rgb) == image_id(rgb.copy())
    assert image_id(rgb.reshape(4, 3, 3)) != image_id(rgb)
    other = rgb.copy()
    other[2, 3, 2] ^= 1
    assert image_id(other) != image_id(rgb)


def test_image_id_is_the_same_for_every_source_of_the_same_pixels(
    rgb: Pixels, tmp_path: Path
) -> None:
    sources = sources_of(encoded(rgb), tmp_path).values()
    assert {image_id(load_image(source)) for source in sources} == {image_id(rgb)}
