"""The image side of a model: mmproj file, image encoding, and prompts cut into segments."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
from llama_cpp import llama_cpp, mtmd_cpp

from cmg_gguf import _core
from cmg_gguf.arrays import FloatArray
from cmg_gguf.errors import BackendError, ModelError, ProjectorError, PromptError
from cmg_gguf.llama.chunks import Chunk, Mtmd, Part, Pixels, Source, cut, is_inside
from cmg_gguf.llama.embeddings import Embeddings
from cmg_gguf.llama.header import projector_facts, read_architecture
from cmg_gguf.llama.legacy import lacks_layer, repaired
from cmg_gguf.llama.log import captured_errors
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.owned import making
from cmg_gguf.llama.placement import Placement
from cmg_gguf.llama.views import View, ViewError, coordinates, levels, view_of
from cmg_gguf.prompt.segments import ImageSegment, Prompt, Segment, TextSegment
from cmg_gguf.prompt.specials import split_specials

Encoder = Literal["mended", "stock"]
"""Whether the image encoder is put right where llama.cpp's is not, see csrc/encoder_mend.hpp."""

SHAPES = tuple((round(4096 * 2 ** (i / 32)), round(4096 / 2 ** (i / 32))) for i in range(-96, 97))
"""Width and height of large pictures, of all shapes up to 64 to 1."""
TRIED = 64, 64
"""Pixels of the pictures that show what black and white are to the encoder."""
MOST_SIZES = 64
"""Sizes of pictures for which it is kept what the encoder is given of them."""

_init = making(mtmd_cpp.mtmd_init_from_file, mtmd_cpp.mtmd_free)


class Projector:
    """A loaded mmproj.

    model: the language model it belongs to. marker: the text that stands for an image in a prompt;
    random, so that no user text contains it. embeddings: encoded images, of which cache_bytes are
    kept. encoder: "stock" leaves llama.cpp's as it is. Several threads may ask, one is served.
    """

    def __init__(
        self,
        path: str | Path,
        model: Model,
        *,
        use_gpu: bool = True,
        n_threads: int = 0,
        cache_bytes: int = 0,
        encoder: Encoder = "mended",
        image_min_tokens: int | None = None,
        image_max_tokens: int | None = None,
    ) -> None:
        """image_min_tokens, image_max_tokens: see `cmg_gguf.llama.resolution`; None = the model's.

        Raises ProjectorError for a missing, damaged, swapped or unfitting file."""
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
        self.kind = projector_facts(path).kind
        self._mend = _core.EncoderMend(self.kind) if encoder == "mended" else None
        self._probe = _core.EncoderProbe(self._mend)
        self._views: dict[tuple[int, int], list[View] | str] = {}
        self._is_legacy = self._mend is not None and lacks_layer(path)
        # By tokens and positions of an image: its shape decides what its graph is.
        self._mended: dict[tuple[int, int], set[str]] = {}
        placement = model.placement or Placement()
        params = self._params(use_gpu and placement.on_device, n_threads)
        placement.fill_encoder(params)
        params.image_min_tokens = -1 if image_min_tokens is None else image_min_tokens
        params.image_max_tokens = -1 if image_max_tokens is None else image_max_tokens
        whole = repaired(path) if self._is_legacy else nullcontext(path)
        with whole as file, captured_errors() as errors:
            made = _init(os.fsencode(file), model.handle, params)
        if not made:
            reason = errors[0] if errors else "no reason given"
            raise ProjectorError(
                f"{path} cannot be used with {model.path.name} (width {model.n_embd}): {reason}"
            )
        self.model = model
        self._lock = threading.Lock()
        made.hold(self, model.keepalive, self._probe)
        self._owned = made
        self._shares_positions = mtmd_cpp.mtmd_decode_use_mrope(made.pointer)
        if not mtmd_cpp.mtmd_support_vision(made.pointer):
            self.close()
            raise ProjectorError(f"{path} cannot see: it has no image encoder")

    @property
    def handle(self) -> Any:
        """mtmd_context pointer. Raises ModelError if it is closed."""
        if not self._owned:
            raise ModelError("this image encoder is closed; open the model again")
        return self._owned.pointer

    @property
    def _mtmd(self) -> Mtmd:
        return Mtmd(self.handle, self.marker, self.kind, self.model)

    @property
    def mended(self) -> frozenset[str]:
        """What has been put right.

        "layer": in the file, see `cmg_gguf.llama.legacy`. "class token", "places", "rows",
        "activation", "cleared": in the graphs that ran so far, see csrc/encoder_mend.hpp.
        """
        own = {"layer"} if self._is_legacy else set()
        return frozenset(own.union(*self._mended.values()))

    def mended_in(self, prompt: Prompt) -> frozenset[str]:
        """What has been put right for the images of a prompt, also where they are kept and were
        encoded for another; none where there are none."""
        images = [s for s in prompt.segments if isinstance(s, ImageSegment)]
        found = [self._mended.get((image.n_tokens, image.n_pos), set()) for image in images]
        own = {"layer"} if images and self._is_legacy else set()
        return frozenset(own.union(*found))

    @property
    def is_mended(self) -> bool:
        """Whether the image encoder is put right where it has to be."""
        return self._mend is not None

    def forget(self) -> None:
        """Lets all kept images go."""
        with self._lock:
            self.embeddings.clear()

    def close(self) -> None:
        """Frees the image encoder."""
        self._owned.close()

    def tokenize(
        self,
        text: str,
        images: Sequence[Pixels],
        *,
        ids: Sequence[str] | None = None,
        add_bos: bool = True,
        seams: Sequence[int] = (),
        salt: str | None = None,
    ) -> Prompt:
        """Cuts a prompt at its image markers. Of the images only the sizes are looked at.

        text: `self.marker` stands for one image each. images: (H, W, 3) uint8 RGB, in order; they
        must stay as they are until they are encoded. ids: the `image_id` of each, by which it is
        known when it is seen again; None = it is not. seams: offsets in the text over which no
        special token reaches, see `split_specials`. salt: see `Prompt`. Raises PromptError if
        markers and images differ in number, ImageError for an image that the model's preprocessing
        refuses.
        """
        if (markers := text.count(self.marker)) != len(images):
            raise PromptError(
                f"the prompt has room for {markers} images and {len(images)} were given; "
                "every image needs one marker"
            )
        source = Source(self._parts(text, seams), tuple(images), add_bos)
        with self._lock:
            chunks = cut(self._mtmd, source)
        n_pieces: Counter[int] = Counter()
        segments: list[Segment] = []
        for i, chunk in enumerate(chunks):
            if isinstance(chunk, Chunk):
                piece = n_pieces[chunk.image]
                n_pieces[chunk.image] += 1
                segments.append(self._image(chunk, piece, source, ids))
            else:
                segments.append(TextSegment(chunk, inside_picture=is_inside(chunks, i)))
        return Prompt(tuple(segments), salt)

    def pieces_of(self, width: int, height: int) -> list[ImageSegment]:
        """What a picture of this size becomes, in order; several where it is cut into tiles.
        Nothing is computed."""
        pixels: Pixels = np.broadcast_to(np.uint8(0), (height, width, 3))
        segments = self.tokenize(self.marker, [pixels], add_bos=False).segments
        return [segment for segment in segments if isinstance(segment, ImageSegment)]

    def views(self, width: int, height: int) -> list[View]:
        """What the encoder is given of a picture of this size, one for each of `pieces_of`.

        Measured once for each size, as `cmg_gguf.llama.views` does it: takes as long as preparing
        such a picture. Raises ViewError where that is no plain part of the picture.
        """
        size = width, height
        with self._lock:
            if size not in self._views:
                if len(self._views) >= MOST_SIZES:
                    self._views.pop(next(iter(self._views)))
                self._views[size] = self._measured(size)
            found = self._views[size]
        if isinstance(found, str):
            raise ViewError(found)
        return found

    def rows_at_once(self) -> int:
        """Rows that the model's pictures need in one decode, as a multiple of 64, for any shape up
        to 64 to 1; 1 where a picture may be decoded in parts. Nothing is computed."""
        most = 1
        for width, height in SHAPES:
            images = self.pieces_of(width, height)
            most = max([most, *(image.needs_ubatch for image in images)])
            if not any(image.non_causal for image in images):
                break
        # Between two of the shapes can lie one of a few tokens more.
        return most if most == 1 else -(-most // 64) * 64

    def encode(
        self,
        prompt: Prompt,
        progress: Callable[[int, int], None] | None = None,
        *,
        first_row: int = 0,
    ) -> Prompt:
        """The prompt with its images encoded, but those ahead of row `first_row`.

        progress(done, total) counts the tokens of these images. Raises BackendError.
        """
        encoding = PromptEncoding(self, prompt, first_row)
        while not encoding.is_done:
            encoding.encode_next()
            if progress is not None:
                progress(encoding.done, encoding.total)
        return encoding.prompt

    def _params(self, use_gpu: bool, n_threads: int) -> Any:
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = use_gpu
        params.print_timings = False
        params.warmup = False
        params.media_marker = self.marker.encode()
        if n_threads > 0:
            params.n_threads = n_threads
        params.cb_eval = ctypes.cast(
            self._probe.callback, llama_cpp.ggml_backend_sched_eval_callback
        )
        params.cb_eval_user_data = self._probe.user_data
        return params

    def _measured(self, size: tuple[int, int]) -> list[View] | str:
        try:
            black, white = (self._given(np.full((*TRIED, 3), c, np.uint8)) for c in (0, 255))
            known, seen = levels(black, white), self._given(coordinates(*size))
            views = [view_of(one, known, size) for one in seen]
            if all(view.is_padding for view in views):
                raise ViewError("nothing of it reaches the image encoder")
            return views
        except (ViewError, RuntimeError) as exc:
            return str(exc)

    def _given(self, pixels: Pixels) -> list[FloatArray]:
        """(3, height, width) each: what the encoder is given of a picture."""
        found = []
        for chunk in cut(self._mtmd, Source((None,), (pixels,), False), pixels_of=0):
            if isinstance(chunk, Chunk):
                try:  # a probe that an interrupt left behind would keep pictures from the encoder
                    self._probe.begin()
                    with captured_errors():
                        mtmd_cpp.mtmd_encode_chunk(self.handle, chunk.handle)
                finally:
                    self._probe.end()
                found.append(self._probe.pixels()[0])
        return found

    def _parts(self, text: str, seams: Sequence[int]) -> tuple[Part | None, ...]:
        parts: list[Part | None] = []
        start = 0
        for run in text.split(self.marker):
            inside = [seam - start for seam in seams if start <= seam < start + len(run)]
            parts += [*split_specials(run, inside, self.model.specials), None]
            start += len(run) + len(self.marker)
        return tuple(parts[:-1])

    def _image(
        self, chunk: Chunk, piece: int, source: Source, ids: Sequence[str] | None
    ) -> ImageSegment:
        # Which picture, and which of the pieces that the model cuts it into.
        key = None if ids is None else (ids[chunk.image], piece, chunk.n_tokens, chunk.n_pos)
        return ImageSegment(
            n_tokens=chunk.n_tokens,
            n_pos=chunk.n_pos,
            non_causal=mtmd_cpp.mtmd_decode_use_non_causal(self.handle, chunk.handle),
            shares_positions=self._shares_positions,
            chunk=chunk,
            key=key,
            source=(source, piece),
        )

    def embedded(self, image: ImageSegment, read: _Read) -> FloatArray:
        """(n_tokens, n_embd) float32 of an image, kept or encoded. read: its prompt's pixels."""
        with self._lock:
            embd = self.embeddings.get(image.key)
            if embd is None:
                source, piece = image.source
                pieces = read.pieces(self._mtmd, source, image.chunk.image)
                embd = self._embed(pieces[piece])
                self.embeddings.put(image.key, embd)
        return embd

    def _embed(self, chunk: Chunk) -> FloatArray:
        with captured_errors() as errors:
            code = self._run(chunk)
        pointer = mtmd_cpp.mtmd_get_output_embd(self.handle) if code == 0 else None
        if not pointer:
            reason = errors[0] if errors else f"code {code}"
            raise BackendError(f"an image of {chunk.n_tokens} tokens cannot be encoded: {reason}")
        shape = (chunk.n_tokens, self.model.n_embd)
        embd: FloatArray = np.ctypeslib.as_array(pointer, shape).copy()
        if not np.isfinite(embd).all():
            raise BackendError("the image encoder gave values that are not finite")
        return embd

    def _run(self, chunk: Chunk) -> int:
        if self._mend is None:
            return int(mtmd_cpp.mtmd_encode_chunk(self.handle, chunk.handle))
        self._mend.begin()
        code = int(mtmd_cpp.mtmd_encode_chunk(self.handle, chunk.handle))
        try:
            self._mend.end()
        except RuntimeError as exc:
            raise BackendError(
                f'the image encoder\'s graph cannot be mended ({exc}); with encoder="stock" it is '
                "left as llama.cpp has it"
            ) from exc
        self._mended.setdefault((chunk.n_tokens, chunk.n_pos), set()).update(self._mend.mended)
        return code


class PromptEncoding:
    """A prompt whose images are encoded one at a time.

    prompt: as far as that is done. done, total: image tokens.
    """

    def __init__(self, projector: Projector, prompt: Prompt, first_row: int = 0) -> None:
        """first_row: images ahead of it are left as they are."""
        starts = np.cumsum([0, *(segment.n_tokens for segment in prompt.segments)])
        self._projector, self._read, self._prompt = projector, _Read(), prompt
        self._segments = list(prompt.segments)
        self._left = [
            i
            for i, segment in enumerate(prompt.segments)
            if isinstance(segment, ImageSegment) and segment.embd is None and starts[i] >= first_row
        ]
        self.done, self.total = 0, sum(self._segments[i].n_tokens for i in self._left)

    @property
    def is_done(self) -> bool:
        """Whether all images are encoded."""
        return not self._left

    @property
    def prompt(self) -> Prompt:
        return dataclasses.replace(self._prompt, segments=tuple(self._segments))

    def encode_next(self) -> None:
        """Encodes the next image. Raises BackendError."""
        image = self._segments[self._left[0]]
        assert isinstance(image, ImageSegment)
        embd = self._projector.embedded(image, self._read)
        self._segments[self._left.pop(0)] = dataclasses.replace(image, embd=embd, source=None)
        self.done += image.n_tokens


class _Read:
    """The pieces of the picture whose pixels were read last: its tiles are encoded in a row."""

    def __init__(self) -> None:
        self._of: tuple[Source, int] | None = None
        self._pieces: list[Chunk] = []

    def pieces(self, context: Mtmd, source: Source, image: int) -> list[Chunk]:
        if self._of != (source, image):
            chunks = cut(context, source, pixels_of=image)
            self._pieces = [c for c in chunks if isinstance(c, Chunk) and c.image == image]
            self._of = source, image
        return self._pieces
