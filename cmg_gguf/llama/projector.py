"""The image side of a model: mmproj file, image encoding, and prompts cut into segments."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import secrets
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import mtmd_cpp

from cmg_gguf.errors import BackendError, ImageError, ModelError, ProjectorError, PromptError
from cmg_gguf.llama.embeddings import Embeddings
from cmg_gguf.llama.header import read_architecture
from cmg_gguf.llama.log import captured_errors
from cmg_gguf.llama.model import Model
from cmg_gguf.prompt.segments import ImageSegment, Prompt, Segment, TextSegment


class Projector:
    """A loaded mmproj.

    handle: mtmd_context pointer. marker: the text that stands for an image in a prompt; random, so
    that no user text contains it. embeddings: encoded images, of which cache_bytes are kept.
    """

    def __init__(
        self,
        path: str | Path,
        model: Model,
        *,
        use_gpu: bool = True,
        n_threads: int = 0,
        cache_bytes: int = 0,
    ) -> None:
        """Raises ProjectorError for a missing, damaged, swapped or unfitting file."""
        path = Path(path)
        try:
            architecture = read_architecture(path, "mmproj")
        except ModelError as exc:
            raise ProjectorError(str(exc)) from exc
        if architecture not in ("clip", "mmproj"):
            raise ProjectorError(
                f"{path} is a language model ({architecture or 'unknown'}), not an image "
                "projector; give the mmproj file that belongs to the model"
            )
        self.path = path
        self.embeddings = Embeddings(cache_bytes)
        self.marker = f"<__image_{secrets.token_hex(16)}__>"
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = use_gpu
        params.print_timings = False
        params.warmup = False
        params.media_marker = self.marker.encode()
        if n_threads > 0:
            params.n_threads = n_threads
        with captured_errors() as errors:
            handle = mtmd_cpp.mtmd_init_from_file(os.fsencode(path), model.handle, params)
        if not handle:
            reason = errors[0] if errors else "no reason given"
            raise ProjectorError(
                f"{path} cannot be used with {model.path.name} (width {model.n_embd}): {reason}"
            )
        self.handle = handle
        self._n_embd = model.n_embd
        self._finalizer = weakref.finalize(self, _free, handle, model.keepalive)
        if not mtmd_cpp.mtmd_support_vision(handle):
            self.close()
            raise ProjectorError(f"{path} cannot see: it has no image encoder")

    def close(self) -> None:
        """Frees the image encoder."""
        self._finalizer()

    def tokenize(
        self,
        text: str,
        images: Sequence[npt.NDArray[np.uint8]],
        *,
        ids: Sequence[str] | None = None,
        add_bos: bool = True,
    ) -> Prompt:
        """Cuts a prompt at its image markers; images are not encoded yet.

        text: `self.marker` stands for one image each. images: (H, W, 3) uint8 RGB, in order. ids:
        the `image_id` of each, by which it is known when it is seen again; None = it is not.
        Raises PromptError if markers and images differ in number, ImageError for an image that the
        model's preprocessing refuses.
        """
        if (markers := text.count(self.marker)) != len(images):
            raise PromptError(
                f"the prompt has room for {markers} images and {len(images)} were given; "
                "every image needs one marker"
            )
        data = text.encode("utf-8", "replace")
        request = mtmd_cpp.mtmd_input_text(data, len(data), add_bos, True)
        bitmaps = [_bitmap(image, i) for i, image in enumerate(images)]
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        try:
            array = (mtmd_cpp.mtmd_bitmap_p_ctypes * max(1, len(bitmaps)))(*bitmaps)
            with captured_errors() as errors:
                code = mtmd_cpp.mtmd_tokenize(
                    self.handle, chunks, ctypes.byref(request), array, len(bitmaps)
                )
            if code != 0:
                sizes = ", ".join(f"{image.shape[1]}x{image.shape[0]}" for image in images)
                raise ImageError(
                    f"the model cannot take these images ({sizes} pixels): "
                    f"{errors[0] if errors else f'code {code}'}"
                )
            return Prompt(tuple(self._segments(chunks, ids)))
        finally:
            mtmd_cpp.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                mtmd_cpp.mtmd_bitmap_free(bitmap)

    def encode(
        self,
        prompt: Prompt,
        progress: Callable[[int, int], None] | None = None,
        *,
        first_row: int = 0,
    ) -> Prompt:
        """The prompt with its images encoded, but those ahead of row `first_row`.

        progress(done, total) counts the tokens of these images.
        """
        total = int(prompt.is_image[first_row:].sum())
        done = row = 0
        segments: list[Segment] = []
        for segment in prompt.segments:
            if isinstance(segment, ImageSegment) and segment.embd is None and row >= first_row:
                segment = dataclasses.replace(segment, embd=self._encoded(segment))
                done += segment.n_tokens
                if progress is not None:
                    progress(done, total)
            row += segment.n_tokens
            segments.append(segment)
        return Prompt(tuple(segments))

    def _encoded(self, image: ImageSegment) -> npt.NDArray[np.float32]:
        embd = self.embeddings.get(image.key)
        if embd is None:
            embd = self._embed(image)
            self.embeddings.put(image.key, embd)
        return embd

    def _embed(self, image: ImageSegment) -> npt.NDArray[np.float32]:
        with captured_errors() as errors:
            code = mtmd_cpp.mtmd_encode_chunk(self.handle, image.chunk.handle)
        pointer = mtmd_cpp.mtmd_get_output_embd(self.handle) if code == 0 else None
        if not pointer:
            reason = errors[0] if errors else f"code {code}"
            raise BackendError(f"an image of {image.n_tokens} tokens cannot be encoded: {reason}")
        shape = (image.n_tokens, self._n_embd)
        embd: npt.NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape).copy()
        if not np.isfinite(embd).all():
            raise BackendError("the image encoder gave values that are not finite")
        return embd

    def _segments(self, chunks: Any, ids: Sequence[str] | None) -> list[Segment]:
        segments: list[Segment] = []
        images: list[int | None] = []
        n_chunks: Counter[int] = Counter()
        for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
            chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
            if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                if count.value:
                    segments.append(TextSegment(np.array(tokens[: count.value], dtype=np.int32)))
                    images.append(None)
            else:
                # Which of the images, and which of the pieces that the model cuts it into.
                image = int(mtmd_cpp.mtmd_input_chunk_get_id(chunk))
                n_tokens = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
                n_pos = mtmd_cpp.mtmd_input_chunk_get_n_pos(chunk)
                key = None if ids is None else (ids[image], n_chunks[image], n_tokens, n_pos)
                n_chunks[image] += 1
                images.append(image)
                segments.append(
                    ImageSegment(
                        n_tokens=n_tokens,
                        n_pos=n_pos,
                        non_causal=mtmd_cpp.mtmd_decode_use_non_causal(self.handle, chunk),
                        chunk=_Chunk(chunk),
                        key=key,
                    )
                )
        return _with_insides(segments, images)


def _with_insides(segments: list[Segment], images: list[int | None]) -> list[Segment]:
    """The segments with the text between two of the same image marked as inside of it."""
    return [
        dataclasses.replace(segment, inside_picture=True)
        if isinstance(segment, TextSegment)
        and 0 < i < len(images) - 1
        and images[i - 1] is not None
        and images[i - 1] == images[i + 1]
        else segment
        for i, segment in enumerate(segments)
    ]


class _Chunk:
    """Our copy of an mtmd_input_chunk, freed with its last reference."""

    def __init__(self, borrowed: Any) -> None:
        self.handle = mtmd_cpp.mtmd_input_chunk_copy(borrowed)
        self._finalizer = weakref.finalize(self, mtmd_cpp.mtmd_input_chunk_free, self.handle)


def _bitmap(image: npt.NDArray[np.uint8], number: int) -> Any:
    height, width, _ = image.shape
    pixels = np.ascontiguousarray(image)
    bitmap = mtmd_cpp.mtmd_bitmap_init(
        width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    )
    if not bitmap:
        raise ImageError(f"no memory for an image of {width}x{height} pixels")
    mtmd_cpp.mtmd_bitmap_set_id(bitmap, str(number).encode())
    return bitmap


def _free(handle: Any, model: Model | None) -> None:
    mtmd_cpp.mtmd_free(handle)
