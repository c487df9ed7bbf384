"""Where image tokens lie in their picture: a patch is moved about, and the token whose embedding it
changes most must be the one whose box it lies in. That judge knows nothing of how a picture is
scaled, padded and cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support import Tiny
from tiny_encoder import TinyEncoder, write_encoder
from tiny_llava import TinyConfig

from cmg_gguf.heat.geometry import Picture
from cmg_gguf.llama.geometry import pictures_of
from cmg_gguf.llama.projector import Projector
from cmg_gguf.llama.views import Axis, ViewError, coordinates, view_of
from cmg_gguf.prompt.segments import ImageSegment, Prompt

F64 = NDArray[np.float64]
Pixels = NDArray[np.uint8]

ENCODERS = {
    "llava": TinyEncoder(),
    "llava 1.6": TinyEncoder(pinpoints=(56, 112, 112, 56, 112, 112, 168, 56, 56, 168)),
    "internvl": TinyEncoder("internvl"),
    "pixtral": TinyEncoder("pixtral"),
    "gemma4uv": TinyEncoder("gemma4uv"),
    "gemma3": TinyEncoder("gemma3", image_size=112),
    "qwen2vl": TinyEncoder("qwen2vl"),
}
PAIRS = {
    "square": TinyConfig(),
    "smolvlm": TinyConfig(longest_edge=224),
    "kimi": TinyConfig(any_resolution=True),
}
SIZES = {"square": (120, 120), "wide": (260, 90), "tall": (80, 230), "small": (40, 30)}
N_PATCHES = 8


@pytest.fixture(params=[*ENCODERS, *PAIRS])
def projector(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    llama: Tiny,
    open_tiny: Callable[[TinyConfig], Tiny],
) -> Projector:
    if request.param in PAIRS:
        return open_tiny(PAIRS[request.param]).projector
    path = write_encoder(tmp_path / "mmproj.gguf", ENCODERS[request.param])
    return Projector(path, llama.model, use_gpu=False, n_threads=1)


def prompt_of(projector: Projector, *pictures: Pixels) -> Prompt:
    text = " and ".join([projector.marker] * len(pictures))
    return projector.tokenize(f"a {text} b", pictures)


def embedded(projector: Projector, prompt: Prompt) -> F64:
    rows = [
        np.asarray(segment.embd, np.float64)
        for segment in projector.encode(prompt).segments
        if isinstance(segment, ImageSegment)
    ]
    return np.concatenate(rows)


def noise(width: int, height: int, seed: int = 0) -> Pixels:
    """A picture that is grey, but for a little noise."""
    return np.random.default_rng(seed).integers(120, 136, (height, width, 3)).astype(np.uint8)


def misses(
    projector: Projector,
    width: int,
    height: int,
    moved: Callable[[Picture], Picture] = lambda picture: picture,
) -> list[str]:
    """Where a patch changed another token of a tile most than one whose box it lies in.

    The patch lies within the box of a token, and takes half of its edges.
    """
    plain = noise(width, height)
    prompt = prompt_of(projector, plain)
    (picture,) = map(moved, pictures_of(projector, prompt))
    assert picture.boxes is not None
    before = embedded(projector, prompt)
    random, found = np.random.default_rng(1), []
    shown = picture.boxes[np.isfinite(picture.boxes[:, 0])]
    for left, top, right, bottom in random.permutation(shown)[:N_PATCHES]:
        columns, rows = (_inner(*ends) for ends in ((left, right), (top, bottom)))
        change = np.zeros(len(before))
        for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)):
            changed = plain.copy()
            changed[rows, columns] = colour
            change += np.abs(embedded(projector, prompt_of(projector, changed)) - before).sum(1)
        found += missed(picture, change, columns, rows)
    return found


def _inner(start: float, stop: float) -> slice:
    """The pixels of the middle half; one at least."""
    first = int(np.ceil(0.75 * start + 0.25 * stop - 0.001))
    return slice(first, max(first + 1, int(0.25 * start + 0.75 * stop)))


def missed(picture: Picture, change: F64, columns: slice, rows: slice) -> list[str]:
    found = []
    for number, tile in enumerate(picture.tiles):
        assert tile.boxes is not None
        left, top, right, bottom = tile.boxes.T
        across = np.minimum(right, columns.stop) - np.maximum(left, columns.start)
        down = np.minimum(bottom, rows.stop) - np.maximum(top, rows.start)
        inside = (across > 0.01) & (down > 0.01)
        if inside.any():
            most = int(change[tile.first : tile.first + tile.n_tokens].argmax())
            if not inside[most]:
                found.append(f"{columns}, {rows} tile {number}: {most}, {tile.boxes[most]}")
    return found


@pytest.mark.parametrize("shape", SIZES)
def test_a_patch_changes_the_token_most_whose_box_it_lies_in(
    projector: Projector, shape: str
) -> None:
    assert misses(projector, *SIZES[shape]) == []


def test_the_judge_finds_boxes_that_are_those_of_the_next_token(llama: Tiny) -> None:
    def moved(picture: Picture) -> Picture:
        (tile,) = picture.tiles
        assert tile.boxes is not None
        return replace(picture, tiles=(replace(tile, boxes=np.roll(tile.boxes, 1, axis=0)),))

    assert len(misses(llama.projector, 120, 120, moved)) >= N_PATCHES // 2


def test_boxes_are_in_pixels_of_the_picture_that_was_given(llama: Tiny) -> None:
    """LLaVA's square: a wide picture is padded above and below."""
    (picture,) = pictures_of(llama.projector, prompt_of(llama.projector, noise(200, 100)))
    boxes = picture.boxes
    assert (picture.width, picture.height) == (200, 100)
    assert boxes is not None
    edges = np.arange(4) * 50.0
    expected = np.full((4, 4, 4), np.nan)
    for row, (top, bottom) in {1: (0.0, 50.0), 2: (50.0, 100.0)}.items():
        expected[row] = np.stack([edges, np.full(4, top), edges + 50, np.full(4, bottom)], axis=1)
    np.testing.assert_allclose(boxes.reshape(4, 4, 4), expected, atol=0.2)


def test_each_of_several_pictures_has_boxes_of_its_own(
    open_tiny: Callable[[TinyConfig], Tiny],
) -> None:
    projector = open_tiny(PAIRS["smolvlm"]).projector
    sizes = [(120, 120), (260, 90)]
    pictures = [noise(*size) for size in sizes]
    both = pictures_of(projector, prompt_of(projector, *pictures))
    first = 0
    for picture, size, pixels in zip(both, sizes, pictures, strict=True):
        (alone,) = pictures_of(projector, prompt_of(projector, pixels))
        assert (picture.width, picture.height) == size
        assert picture.first == first
        np.testing.assert_array_equal(picture.boxes, alone.boxes)
        first += picture.n_tokens


def test_the_end_of_a_row_has_no_box(tmp_path: Path, llama: Tiny) -> None:
    path = write_encoder(tmp_path / "mmproj.gguf", ENCODERS["pixtral"])
    projector = Projector(path, llama.model, use_gpu=False, n_threads=1)
    (picture,) = pictures_of(projector, prompt_of(projector, noise(56, 56)))
    assert picture.boxes is not None
    missing = np.flatnonzero(np.isnan(picture.boxes[:, 0]))
    columns = int(missing[0])
    assert missing.tolist() == list(range(columns, picture.n_tokens, columns + 1))


def test_a_kind_whose_tokens_lie_nobody_knows_how_has_no_boxes(tmp_path: Path, llama: Tiny) -> None:
    path = write_encoder(tmp_path / "mmproj.gguf", TinyEncoder())
    projector = Projector(path, llama.model, use_gpu=False, n_threads=1)
    projector.kind = "resampler"
    (picture,) = pictures_of(projector, prompt_of(projector, noise(56, 56)))
    assert picture.boxes is None
    assert "'resampler'" in picture.unknown


def test_a_picture_of_too_few_pixels_has_no_boxes(llama: Tiny) -> None:
    (picture,) = pictures_of(llama.projector, prompt_of(llama.projector, noise(1, 300)))
    assert picture.boxes is None
    assert "too few pixels" in picture.unknown


def test_measuring_changes_no_embedding(tmp_path: Path, llama: Tiny) -> None:
    path = write_encoder(tmp_path / "mmproj.gguf", TinyEncoder())
    for encoder in ("mended", "stock"):
        projector = Projector(path, llama.model, use_gpu=False, n_threads=1, encoder=encoder)
        prompt = prompt_of(projector, noise(90, 56))
        before = embedded(projector, prompt)
        assert pictures_of(projector, prompt)[0].boxes is not None
        np.testing.assert_array_equal(embedded(projector, prompt), before)


# --- what is measured, on arrays ----------------------------------------------------------------

KNOWN = np.array([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])


def given(picture: Pixels) -> NDArray[np.float32]:
    return np.asarray(picture.transpose(2, 0, 1) / 127.5 - 1, np.float32)


def test_a_part_of_a_picture_is_known_by_its_colours() -> None:
    seen = coordinates(400, 300)[60:180, 100:260]
    view = view_of(given(seen), KNOWN, (400, 300))
    assert (view.width, view.height) == (160, 120)
    assert (view.across.start, view.across.stop) == (0, 160)
    assert (view.across.first, view.across.last) == pytest.approx((100, 260), abs=0.5)
    assert (view.down.first, view.down.last) == pytest.approx((60, 180), abs=0.5)


def test_padding_is_known_by_its_colour() -> None:
    seen = np.full((100, 100, 3), 122, np.uint8)
    seen[20:70, 5:95] = coordinates(90, 50)
    view = view_of(given(seen), KNOWN, (90, 50))
    assert view.across == Axis(5, 95, 0.0, 90.0)
    assert view.down == Axis(20, 70, 0.0, 50.0)


def test_what_is_no_plain_part_of_the_picture_is_refused() -> None:
    picture = coordinates(100, 100)
    for seen in (
        np.concatenate([picture, picture]),  # tiles upon each other
        picture.transpose(1, 0, 2),  # turned
        picture[:, ::-1],  # mirrored
        np.full((50, 50, 3), 255, np.uint8),  # something else
        picture[:, np.r_[:40, 60:100]],  # with a part left out
    ):
        with pytest.raises(ViewError):
            view_of(given(seen), KNOWN, (100, 100))


def test_a_tile_of_padding_alone_shows_nothing() -> None:
    view = view_of(given(np.full((40, 60, 3), 122, np.uint8)), KNOWN, (90, 50))
    assert view.is_padding
    assert (view.width, view.height) == (60, 40)


def test_a_picture_of_which_nothing_is_seen_has_no_boxes(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cmg_gguf.llama.projector.coordinates",
        lambda width, height: np.full((height, width, 3), 99, np.uint8),
    )
    (picture,) = pictures_of(llama.projector, prompt_of(llama.projector, noise(77, 78)))
    assert picture.boxes is None
    assert "nothing of it reaches" in picture.unknown
