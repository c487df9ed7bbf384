"""Heat maps as pictures: one scale for all, and the picture stays to be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from answers import answer
from commands import flat, invoke
from numpy.typing import NDArray
from PIL import Image

from cmg_gguf.errors import ImageError
from cmg_gguf.heat.colours import colours
from cmg_gguf.heat.drawing import ABSOLUTE, RELATIVE, fitted, overlay, resized
from cmg_gguf.heat.geometry import Picture, Tile
from cmg_gguf.heat.maps import Heat
from cmg_gguf.heat.sheet import EMPTY_WORDS, naming, sheet
from cmg_gguf.tiny.scenes import draw, make_scene

F64 = NDArray[np.float64]
Pixels = NDArray[np.uint8]


def lightness(rgb: NDArray[np.uint8]) -> F64:
    """CIE L*, 0 to 100, by the formula: what is left where no hue is told."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.asarray(np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27))


def grid(columns: int, rows: int, size: tuple[int, int]) -> F64:
    edges = np.indices((rows, columns)).reshape(2, -1).T[:, ::-1].astype(float)
    unit = np.array(size) / [columns, rows]
    return np.hstack([edges * unit, (edges + 1) * unit])


def heat_of(rows: F64, boxes: F64, *sizes: tuple[int, int]) -> Heat:
    """One layer. rows: (n_tokens, n_image_tokens), for as many pictures as there are sizes."""
    n = len(boxes)
    pictures = tuple(Picture(*s, (Tile(i * n, n, boxes),)) for i, s in enumerate(sizes))
    return Heat(rows[:, None].astype(np.float32), (0,), (), pictures)


def grey_of(rgb: Pixels, edge: int) -> F64:
    """The picture where nothing is laid over it, as said: three quarters of its colour are gone."""
    picture = np.asarray(resized(rgb, fitted(rgb, edge)), float)
    return np.asarray(0.75 * (picture @ [0.299, 0.587, 0.114])[..., None] + 0.25 * picture)


def test_colours_get_lighter_evenly() -> None:
    steps = np.diff(lightness(colours()[::16]))
    assert steps.min() > 0.6 * steps.mean()
    assert steps.max() < 1.4 * steps.mean()
    assert np.diff(lightness(colours())).min() > -0.3  # but for rounding to 8 bits


def test_the_scale_is_logarithmic_and_ends_where_it_says() -> None:
    for scale in (RELATIVE, ABSOLUTE):
        assert scale.ticks[0] == scale.low
        assert scale.ticks[-1] == scale.high
        middle = (scale.low * scale.high) ** 0.5
        values = np.array([0.0, scale.low, middle, scale.high, 10 * scale.high])
        np.testing.assert_allclose(scale.shares(values), [0, 0, 0.5, 1, 1], atol=1e-12)


# 4 columns; the token of interest attends to the first or the last.
BOXES = grid(4, 1, (64, 16))
PICTURE = np.full((16, 64, 3), 128, np.uint8)


def at(picture: Image.Image, column: int) -> F64:
    """The colour in the middle of one of four columns, away from the lines."""
    pixels = np.asarray(picture, float)
    height, width = pixels.shape[:2]
    return np.asarray(pixels[height // 2, int((column + 0.5) * width / 4)])


@pytest.mark.parametrize("relative", [True, False])
def test_a_colour_means_the_same_whatever_else_is_on_the_picture(relative: bool) -> None:
    rows = np.full((6, 4), 0.1)
    rows[0] = [0.2, 0.1, 0.1, 0.1]
    calm = heat_of(rows, BOXES, (64, 16))
    rows[0, 3] = 0.6
    wild = heat_of(rows, BOXES, (64, 16))
    first, second = (
        overlay(PICTURE, heat, 0, [0], relative=relative, edge=256) for heat in (calm, wild)
    )
    np.testing.assert_allclose(at(first, 0), at(second, 0), atol=2)
    assert np.abs(at(first, 3) - at(second, 3)).max() > 20


def test_a_place_that_gets_no_more_than_usual_stays_as_it_is() -> None:
    rows = np.full((4, 4), 0.1)
    rows[0] = [0.8, 0.02, 0.02, 0.02]
    shown = overlay(PICTURE, heat_of(rows, BOXES, (64, 16)), 0, [0], edge=256)
    np.testing.assert_allclose(at(shown, 3), 128, atol=1)
    assert np.abs(at(shown, 0) - 128).max() > 40


def test_the_picture_is_seen_under_the_hottest_place() -> None:
    halves = PICTURE.copy()
    halves[8:] = 255
    halves[:8] = 0
    rows = np.full((40, 4), 0.01)
    rows[0] = [0.9, 0.01, 0.01, 0.01]
    shown = np.asarray(overlay(halves, heat_of(rows, BOXES, (64, 16)), 0, [0], edge=256), float)
    difference = shown[48, 30] - shown[16, 30]
    assert difference.min() >= 255 * 0.19


def test_heat_is_smooth_and_the_edges_of_image_tokens_are_drawn() -> None:
    rows = np.full((4, 4), 0.1)
    rows[0] = [0.1, 0.4, 0.1, 0.1]
    shown = np.asarray(overlay(PICTURE, heat_of(rows, BOXES, (64, 16)), 0, [0], edge=256), float)
    red = shown[32, :, 0]
    inside = np.r_[3:62, 67:125]
    steps = np.abs(np.diff(red))[inside]
    assert steps.max() < 8  # the step at the token's edge, of about 60, is spread
    assert np.abs(np.diff(red))[[62, 63, 64, 126, 127, 128]].max() > 10


def test_words_that_name_nothing_are_left_out() -> None:
    words = answer(
        " There", " is a", " red", " cup", ", and the cup", "'s 3", " T-", "shirts."
    ).words
    assert naming(words) == {"red": (2,), "cup": (3,), "t-shirts": (6, 7)}
    assert list(naming(words, most=2)) == ["red", "cup"]
    assert naming(answer(" Don't", " say it's", " 12", "th", " o'clock").words) == {"say": (1,)}
    assert all(len(word) > 2 and word == word.lower() for word in EMPTY_WORDS)


@pytest.mark.parametrize(
    "sizes", [[(112, 112)], [(300, 100)], [(90, 260)], [(112, 112), (200, 80)]], ids=str
)
def test_a_sheet_has_the_pictures_and_a_panel_for_each_word(sizes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for w, h in sizes]
    boxes = grid(4, 4, sizes[0])
    heat = heat_of(rng.random((5, 16 * len(sizes))), boxes, *sizes)
    words = {f"word{i}": (i,) for i in range(5)}
    few, many = (
        sheet(pictures, heat, dict(list(words.items())[:n]), title="What it says.") for n in (1, 5)
    )
    assert many.width * many.height > few.width * few.height
    for picture in (few, many):
        assert picture.width <= 1080 + 32
        assert picture.width >= 560
        corner = np.asarray(picture)[:8]
        assert (corner == 255).all()


def test_attention_that_is_not_known_is_refused() -> None:
    rows = np.full((2, 4), 0.1)
    rows[0, 1] = np.nan
    with pytest.raises(ImageError, match="is not known: llama"):
        overlay(PICTURE, heat_of(rows, BOXES, (64, 16)), 0, [0])


def test_a_tile_of_padding_is_passed_over() -> None:
    rows = np.full((2, 8), 0.1)
    rows[0, 0] = 0.4
    tiles = Tile(0, 4, BOXES), Tile(4, 4, np.full((4, 4), np.nan))
    alone = heat_of(rows[:, :4], BOXES, (64, 16))
    beside = Heat(rows[:, None].astype(np.float32), (0,), (), (Picture(64, 16, tiles),))
    first, second = (np.asarray(overlay(PICTURE, heat, 0, [0])) for heat in (alone, beside))
    np.testing.assert_array_equal(first, second)


def test_a_sheet_of_a_picture_whose_geometry_is_not_known_is_refused() -> None:
    heat = Heat(np.ones((1, 1, 4), np.float32), (0,), (), (Picture(8, 8, (Tile(0, 4),), "no"),))
    with pytest.raises(ImageError, match=r"is not known \(no\)"):
        sheet([np.zeros((8, 8, 3), np.uint8)], heat, {"a": (0,)})


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    Image.fromarray(draw(make_scene("test", 3, "counter"))).save(path)
    return path


def test_the_command_answers_and_writes_a_sheet(scene: Path, tmp_path: Path) -> None:
    ask = ["--image", str(scene), "-p", "Describe the image."]
    result = invoke("heatmap", *ask, "-o", str(tmp_path / "sheet.png"))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == invoke("run", *ask).stdout
    assert "sheet.png, with" in flat(result.stderr).replace(" .png", ".png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 560


def test_a_word_a_layer_and_absolute_give_other_pictures(scene: Path, tmp_path: Path) -> None:
    found = set()
    for i, flags in enumerate(([], ["--layer", "4"], ["--layer", "masked"], ["--absolute"])):
        path = tmp_path / f"{i}.png"
        word = ["--image", str(scene), "-p", "Describe the image.", "--word", "laptop"]
        result = invoke("heatmap", *word, *flags, "-o", str(path))
        assert result.exit_code == 0, result.stderr
        found.add(path.read_bytes())
    assert len(found) == 4


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--word", "zebra"], 1, "the answer does not say 'zebra'"),
        (["--layer", "7"], 1, "layer 7 does not attend"),
        (["--layer", "top"], 2, "'top' is no layer"),
        (["-o", "map.bmpp"], 2, "names no picture format"),
        (["-o", "no/such/folder/map.png"], 1, "cannot be written"),
        (["--alpha", "0", "--layer", "masked"], 1, "needs guidance"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    scene: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    code: int,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("heatmap", "--image", str(scene), "-p", "Describe the image.", *flags)
    assert result.exit_code == code
    assert told in flat(result.stderr)


def test_without_a_picture_there_is_nothing_to_draw() -> None:
    result = invoke("heatmap", "-p", "Describe the image.")
    assert result.exit_code == 2
    assert "there is nothing to look at" in flat(result.stderr)
