"""Prompts as llama.cpp's mtmd cuts them: runs of text tokens, and images in one or more pieces.

    chunks = cut(mtmd, source)                # nobody looks at a pixel
    chunks = cut(mtmd, source, pixels_of=0)   # image 0 can be encoded

Into which pieces an image is cut, with which text around and between them, depends on its size
alone. So only the images that are to be encoded are ever read and resized: for a photo of 12
megapixels that is half a second.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import mtmd_cpp

from cmg_gguf.arrays import IntArray
from cmg_gguf.errors import ImageError, UnsupportedError
from cmg_gguf.llama.log import captured_errors
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.owned import Owned, making

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""(H, W, 3) RGB."""

HAS_PARTS = hasattr(mtmd_cpp, "mtmd_tokenize_from_parts")
"""Whether mtmd is given a prompt's parts as they are: since llama-cpp-python 0.3.36."""

Part: TypeAlias = tuple[str, bool]
"""A text, and whether special tokens are looked for in it."""


_copy_chunk = making(mtmd_cpp.mtmd_input_chunk_copy, mtmd_cpp.mtmd_input_chunk_free)
_init_chunks = making(mtmd_cpp.mtmd_input_chunks_init, mtmd_cpp.mtmd_input_chunks_free)
_init_bitmap = making(mtmd_cpp.mtmd_bitmap_init, mtmd_cpp.mtmd_bitmap_free)


@dataclass(frozen=True, eq=False)
class Mtmd:
    """An mtmd_context. handle: its pointer. marker: what it takes for an image. kind: of projector.
    model: whose vocabulary texts are in."""

    handle: Any
    marker: str
    kind: str
    model: Model


@dataclass(frozen=True, eq=False)
class Source:
    """What a prompt is made from. parts: in order, None stands for the next of the images."""

    parts: tuple[Part | None, ...]
    images: tuple[Pixels, ...]
    add_bos: bool


class Chunk:
    """Our copy of an mtmd_input_chunk, freed with its last reference.

    handle: its pointer. image: which of the prompt's images it is, or is a piece of. n_tokens,
    n_pos: what it takes in the prompt.
    """

    def __init__(self, borrowed: Any) -> None:
        self._owned = _copy_chunk(borrowed)
        self.handle = self._owned.pointer
        self.image = int(mtmd_cpp.mtmd_input_chunk_get_id(borrowed) or b"0")
        self.n_tokens: int = mtmd_cpp.mtmd_input_chunk_get_n_tokens(borrowed)
        self.n_pos: int = mtmd_cpp.mtmd_input_chunk_get_n_pos(borrowed)


def cut(context: Mtmd, source: Source, *, pixels_of: int | None = None) -> list[IntArray | Chunk]:
    """The prompt in order; text as (n,) int32 tokens, n > 0.

    pixels_of: the image whose chunks can be encoded. Raises
    ImageError for an image that the model's preprocessing refuses.
    """
    bitmaps = [_bitmap(image, i, i == pixels_of) for i, image in enumerate(source.images)]
    pointers = [bitmap.pointer for bitmap in bitmaps]
    return (at_once if HAS_PARTS else one_by_one)(context, source, pointers)


def at_once(context: Mtmd, source: Source, bitmaps: Sequence[Any]) -> list[IntArray | Chunk]:
    """The prompt in order, cut by mtmd. bitmaps: one mtmd_bitmap pointer an image."""
    parts = _parts(source.parts, bitmaps)
    pointers = (ctypes.POINTER(mtmd_cpp.mtmd_input_part) * max(1, len(parts)))(
        *(ctypes.pointer(part) for part in parts)
    )
    return _tokenized(
        source,
        lambda chunks: mtmd_cpp.mtmd_tokenize_from_parts(
            context.handle, chunks, pointers, len(parts), source.add_bos
        ),
    )


def one_by_one(context: Mtmd, source: Source, bitmaps: Sequence[Any]) -> list[IntArray | Chunk]:
    """The same, where mtmd looks for special tokens in all texts or none: it is given the images
    alone. Raises UnsupportedError where it matters to an image which of several it is."""
    if len(source.images) > 1 and context.kind == "hunyuanvl":
        raise UnsupportedError(
            f"{len(source.images)} images in one prompt: a {context.kind} model can take more than "
            "one since llama-cpp-python 0.3.36; give one, or update it"
        )
    marker = context.marker.encode()
    given = mtmd_cpp.mtmd_input_text(
        text=marker, text_len=len(marker), add_special=False, parse_special=True
    )
    left = iter(bitmaps)
    found: list[IntArray | Chunk] = []
    for part in source.parts:
        if part is None:
            one = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(next(left))
            found += _tokenized(
                source,
                lambda chunks, one=one: mtmd_cpp.mtmd_tokenize(  # type: ignore[misc]
                    context.handle, chunks, ctypes.byref(given), one, 1
                ),
            )
        else:
            text, special = part
            found.append(context.model.tokenize(text, special=special))
    if source.add_bos:
        first, last = context.model.around
        found = [first, *found, last]
    return _joined(found)


def _joined(found: Sequence[IntArray | Chunk]) -> list[IntArray | Chunk]:
    """Texts that follow each other as one; without empty ones."""
    joined: list[IntArray | Chunk] = []
    for one in found:
        before = joined[-1] if joined else None
        if isinstance(one, Chunk) or isinstance(before, Chunk) or before is None:
            if isinstance(one, Chunk) or len(one):
                joined.append(one)
        else:
            joined[-1] = np.concatenate([before, one])
    return joined


def _tokenized(source: Source, tokenize: Callable[[Any], int]) -> list[IntArray | Chunk]:
    """What `tokenize` fills an mtmd_input_chunks with."""
    chunks = _init_chunks()
    with captured_errors() as errors:
        code = tokenize(chunks.pointer)
    if code != 0:
        sizes = ", ".join(f"{image.shape[1]}x{image.shape[0]}" for image in source.images)
        raise ImageError(
            f"the model cannot take these images ({sizes} pixels): "
            f"{errors[0] if errors else f'code {code}'}"
        )
    return _copied(chunks.pointer)


def is_inside(chunks: Sequence[IntArray | Chunk], i: int) -> bool:
    """Whether the text that is chunk i stands between two pieces of the same image."""
    around = chunks[max(0, i - 1) : i + 2 : 2]
    images = {chunk.image for chunk in around if isinstance(chunk, Chunk)}
    return len(around) == 2 and len(images) == 1 and all(isinstance(c, Chunk) for c in around)


def image_positions(chunk: Chunk, position: int, *, shared: bool) -> IntArray:
    """Where the rows of an image lie that begins at `position`, as RoPE takes it.

    shared: whether rows share positions (M-RoPE): then (4, n_tokens) int32: time, row, column and a
    fourth; else (1, n_tokens).
    """
    if not shared:
        return np.arange(position, position + chunk.n_tokens, dtype=np.int32)[np.newaxis]
    tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_image(chunk.handle)
    found = (mtmd_cpp.mtmd_decoder_pos * chunk.n_tokens)()
    mtmd_cpp.mtmd_helper_image_get_decoder_pos(tokens, llama_cpp.llama_pos(position), found)
    fields = np.ctypeslib.as_array(found)
    return np.array([fields[name] for name in ("t", "y", "x", "z")]).astype(np.int32)


def _parts(parts: Sequence[Part | None], bitmaps: Sequence[Any]) -> list[Any]:
    """mtmd_input_part structures, which keep alive what they point to."""
    left = iter(bitmaps)
    made = []
    for part in parts:
        if part is None:
            made.append(mtmd_cpp.mtmd_input_part(None, next(left)))
        else:
            text, special = part
            data = text.encode("utf-8", "replace")
            given = mtmd_cpp.mtmd_input_text(data, len(data), False, special)
            made.append(mtmd_cpp.mtmd_input_part(ctypes.pointer(given), None))
    return made


def _copied(chunks: Any) -> list[IntArray | Chunk]:
    found: list[IntArray | Chunk] = []
    for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) != mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
            found.append(Chunk(chunk))
            continue
        count = ctypes.c_size_t()
        tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        if count.value:
            found.append(np.array(tokens[: count.value], dtype=np.int32))
    return found


def _bitmap(image: Pixels, number: int, with_pixels: bool) -> Owned:
    height, width, _ = image.shape
    pixels = np.ascontiguousarray(image) if with_pixels else None
    data = None if pixels is None else pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmap = _init_bitmap(width, height, data)
    if not bitmap:
        raise ImageError(f"no memory for an image of {width}x{height} pixels")
    mtmd_cpp.mtmd_bitmap_set_id(bitmap.pointer, str(number).encode())
    return bitmap
