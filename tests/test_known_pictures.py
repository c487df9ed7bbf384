"""Pictures are read when they are encoded, and only then: counting and knowing them is free."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llama_cpp import mtmd_cpp as mtmd
from numpy.typing import NDArray
from prompts import picture
from support import Tiny
from tiny_llava import TinyConfig

from cmg_gguf.errors import ImageError
from cmg_gguf.llama import chunks
from cmg_gguf.llama.projector import Projector
from cmg_gguf.prompt.segments import ImageSegment, Prompt

TILED = TinyConfig(longest_edge=112)
IMAGE = "<__media__>"
PROMPTS = {
    "alone": (IMAGE, [(56, 56)]),
    "before": (f"Look at {IMAGE}", [(56, 56)]),
    "behind": (f"{IMAGE} what is there?", [(112, 30)]),
    "around": (f"Look at {IMAGE}\nwhat is there?</s>", [(7, 500)]),
    "two": (f"a {IMAGE} b {IMAGE} c", [(60, 100), (100, 60)]),
    "in a row": (f"{IMAGE}{IMAGE}{IMAGE}", [(56, 56), (1, 1), (300, 200)]),
    "none": ("What is there?", []),
    "nothing": ("", []),
}
Described = list[tuple[Any, ...]]


@pytest.fixture(params=["llama", "tiled"])
def tiny(request: pytest.FixtureRequest, open_tiny: Callable[[TinyConfig], Tiny]) -> Tiny:
    return open_tiny(TinyConfig() if request.param == "llama" else TILED)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the pictures whose pixels mtmd is given."""
    numbers: list[int] = []
    bitmap = chunks._bitmap

    def noted(image: chunks.Pixels, number: int, with_pixels: bool) -> Any:
        if with_pixels:
            numbers.append(number)
        return bitmap(image, number, with_pixels)

    monkeypatch.setattr(chunks, "_bitmap", noted)
    return numbers


def noise(*size: int) -> NDArray[np.uint8]:
    height, width = size
    return np.random.default_rng(size).integers(0, 256, (height, width, 3), np.uint8)


def fresh(tiny: Tiny, text: str, images: list[NDArray[np.uint8]]) -> Described:
    """What mtmd makes of a prompt, with all the pixels; image embeddings as bytes."""
    projector = tiny.projector
    data = text.replace(IMAGE, projector.marker).encode()
    bitmaps = []
    for i, image in enumerate(images):
        pixels = image.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmaps.append(mtmd.mtmd_bitmap_init(image.shape[1], image.shape[0], pixels))
        mtmd.mtmd_bitmap_set_id(bitmaps[-1], str(i).encode())
    request = mtmd.mtmd_input_text(
        text=data, text_len=len(data), add_special=True, parse_special=True
    )
    array = (mtmd.mtmd_bitmap_p_ctypes * max(1, len(bitmaps)))(*bitmaps)
    made = mtmd.mtmd_input_chunks_init()
    found: Described = []
    args = (projector.handle, made, ctypes.byref(request), array, len(bitmaps))
    assert mtmd.mtmd_tokenize(*args) == 0
    for i in range(mtmd.mtmd_input_chunks_size(made)):
        chunk = mtmd.mtmd_input_chunks_get(made, i)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            count = ctypes.c_size_t()
            tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            found.append(("text", tokens[: count.value]))
            continue
        n_tokens = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        assert mtmd.mtmd_encode_chunk(projector.handle, chunk) == 0
        embd = mtmd.mtmd_get_output_embd(projector.handle)
        rows = np.ctypeslib.as_array(embd, (n_tokens, tiny.model.n_embd)).tobytes()
        image = mtmd.mtmd_input_chunk_get_id(chunk)
        found.append(("image", int(image), n_tokens, mtmd.mtmd_input_chunk_get_n_pos(chunk), rows))
    mtmd.mtmd_input_chunks_free(made)
    for bitmap in bitmaps:
        mtmd.mtmd_bitmap_free(bitmap)
    return found


def described(prompt: Prompt) -> Described:
    found: Described = []
    for segment in prompt.segments:
        if isinstance(segment, ImageSegment):
            rows = np.asarray(segment.embd).tobytes()
            found.append(("image", segment.chunk.image, segment.n_tokens, segment.n_pos, rows))
        else:
            found.append(("text", segment.tokens.tolist()))
    return found


def tokenized(
    projector: Projector, text: str, images: list[NDArray[np.uint8]], **more: Any
) -> Prompt:
    return projector.tokenize(text.replace(IMAGE, projector.marker), images, **more)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_cut_and_encoded_as_mtmd_does_with_all_pixels(tiny: Tiny, name: str) -> None:
    text, sizes = PROMPTS[name]
    images = [noise(*size) for size in sizes]
    prompt = tiny.projector.encode(tokenized(tiny.projector, text, images))
    assert described(prompt) == fresh(tiny, text, images)


def test_the_same_picture_twice_is_two_pictures(tiny: Tiny) -> None:
    images = [picture(3)] * 2
    prompt = tiny.projector.encode(tokenized(tiny.projector, f"{IMAGE}{IMAGE}a", images))
    found = described(prompt)
    assert found == fresh(tiny, f"{IMAGE}{IMAGE}a", images)
    assert {row[1] for row in found if row[0] == "image"} == {0, 1}


def test_counting_a_picture_reads_no_pixel(tiny: Tiny, read: list[int]) -> None:
    prompt = tokenized(tiny.projector, f"a {IMAGE} b {IMAGE}", [picture(1), picture(2)])
    assert prompt.n_image_tokens > 0
    assert read == []
    tiny.projector.encode(prompt)
    assert read == [0, 1]  # once, whatever the number of tiles


def test_pictures_whose_cells_are_there_are_not_read(tiny: Tiny, read: list[int]) -> None:
    prompt = tokenized(tiny.projector, f"a {IMAGE} b {IMAGE} c", [picture(1), picture(2)])
    behind_first = int(np.diff(prompt.in_picture.astype(int)).argmin()) + 1
    encoded = tiny.projector.encode(prompt, first_row=behind_first)
    assert read == [1]
    assert tiny.projector.encode(encoded).n_tokens == prompt.n_tokens
    assert read == [1, 0]


def test_a_known_picture_is_not_read_again(tiny: Tiny, read: list[int]) -> None:
    projector = Projector(
        tiny.projector.path, tiny.model, use_gpu=False, n_threads=1, cache_bytes=2**20
    )
    first = projector.encode(tokenized(projector, f"{IMAGE} a", [picture(1)], ids=["one"]))
    assert read == [0]
    # The pixels are not looked at: these are others under the same name.
    again = tokenized(projector, f"{IMAGE} b {IMAGE} c", [picture(2), picture(2)], ids=["one"] * 2)
    rows = [s.embd for s in projector.encode(again).segments if isinstance(s, ImageSegment)]
    known = [s.embd for s in first.segments if isinstance(s, ImageSegment)]
    np.testing.assert_array_equal(rows, known * 2)
    assert read == [0]


def test_pixels_are_let_go_once_they_are_encoded(tiny: Tiny) -> None:
    image = noise(50, 50)
    alive = weakref.ref(image)
    prompt = tokenized(tiny.projector, f"{IMAGE} a", [image])
    encoded = tiny.projector.encode(prompt)
    del image, prompt
    gc.collect()
    assert alive() is None
    assert encoded.n_image_tokens > 0


def test_a_picture_without_pixels_is_refused_before_anything_is_read(tiny: Tiny) -> None:
    with pytest.raises(ImageError, match="0x5 pixels"):
        tokenized(tiny.projector, f"{IMAGE} a", [np.zeros((5, 0, 3), np.uint8)])


def test_several_threads_may_encode(tiny: Tiny) -> None:
    prompts = [tokenized(tiny.projector, f"{IMAGE} a", [picture(seed)]) for seed in range(6)]
    expected = [described(tiny.projector.encode(prompt)) for prompt in prompts]
    found: list[Described] = [[]] * len(prompts)

    def encode(i: int) -> None:
        for _ in range(5):
            found[i] = described(tiny.projector.encode(prompts[i]))

    threads = [threading.Thread(target=encode, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
