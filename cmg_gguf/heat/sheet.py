"""A sheet of heat maps: the pictures, and for each word of an answer what it attended to.

    sheet([rgb], reply.heat, naming(reply.words), title=reply.text).save("sheet.png")

Every sheet says what its colours stand for, of which layers, and has the scale in numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cmg_gguf.heat.drawing import (
    ABSOLUTE,
    RELATIVE,
    Pixels,
    Scale,
    coloured,
    fitted,
    overlay,
    resized,
)
from cmg_gguf.heat.maps import Heat, Layers, Word

INK, PALE, PAPER = (24, 24, 27), (110, 110, 118), (255, 255, 255)
MIDDLE = 168.0
"""Grey that the scale is shown on."""
GAP = 16
BAR = 260, 14
FONT, SMALL = 17, 13
MOST_WORDS = 11
FEWEST_WIDTH = 560
LONGEST = 2
"""Edges that a picture's longer side has at most."""
EMPTY_WORDS = frozenset(
    [
        "the",
        "and",
        "are",
        "was",
        "were",
        "has",
        "have",
        "had",
        "this",
        "that",
        "these",
        "those",
        "there",
        "their",
        "its",
        "his",
        "her",
        "with",
        "from",
        "into",
        "onto",
        "for",
        "but",
        "not",
        "you",
        "your",
        "can",
        "could",
        "will",
        "would",
        "which",
        "who",
        "what",
        "where",
        "when",
        "how",
        "some",
        "any",
        "all",
        "also",
        "very",
        "than",
        "then",
        "them",
        "they",
        "she",
        "him",
        "our",
        "out",
        "over",
        "under",
        "about",
        "near",
        "two",
        "one",
    ]
)
"""Words that name nothing to be seen."""


_NAME = re.compile(r"[^\W\d_]{3,}|[^\W\d_]+(?:-[^\W\d_]+)+")


def naming(words: Sequence[Word], *, most: int = MOST_WORDS) -> dict[str, tuple[int, ...]]:
    """Words of an answer that can name something to be seen, and the tokens that hold a part of
    each where it is first said; in small letters, without 's.

    They have three letters and more, or a hyphen, and are none of `EMPTY_WORDS`; in scripts that
    put no spaces between words there are none. words: `Reply.words`. most: as many at most, from
    the beginning.
    """
    found: dict[str, tuple[int, ...]] = {}
    for word in words:
        name = re.sub(r"['\u2019]s$", "", word.text.lower())
        if _NAME.fullmatch(name) and name not in EMPTY_WORDS:
            found.setdefault(name, tuple(range(word.first, word.last + 1)))
    return dict(list(found.items())[:most])


def sheet(
    pictures: Sequence[Pixels],
    heat: Heat,
    words: Mapping[str, Sequence[int]],
    *,
    title: str = "",
    layer: Layers = "mean",
    relative: bool = True,
    edge: int = 240,
    width: int = 1080,
) -> Image.Image:
    """The pictures, then a panel for each word with all of them.

    pictures: (height, width, 3) uint8 each, those that `heat` is of, in order. words: what is
    written above a panel, and the tokens that it is of. title: what is written above all. edge: a
    picture takes as many pixels as a square of that edge. width: of the sheet, if a panel is not
    wider. Raises what `Heat.map` raises.
    """
    edges = [_longer_side(rgb, edge) for rgb in pictures]
    plain = _beside([resized(rgb, fitted(rgb, e)) for rgb, e in zip(pictures, edges, strict=True)])
    panels = [_panel("picture" if len(pictures) == 1 else "pictures", plain, PALE)]
    for word, tokens in words.items():
        maps = [
            overlay(rgb, heat, i, tokens, layer=layer, relative=relative, edge=edges[i])
            for i, rgb in enumerate(pictures)
        ]
        panels.append(_panel(word, _beside(maps), INK))
    columns = max(1, width // (plain.width + GAP))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    grid = _stacked([_beside(row) for row in rows])
    width = max(grid.width, FEWEST_WIDTH)
    parts = [_text(title, width, FONT, INK)] if title else []
    scale = RELATIVE if relative else ABSOLUTE
    parts += [grid, _legend(scale, _layers_told(heat, layer), width)]
    return _framed(_stacked(parts))


def _longer_side(rgb: Pixels, edge: int) -> int:
    shorter, longer = (float(n) for n in sorted(rgb.shape[:2]))
    return int(min(LONGEST * edge, round(edge * (longer / shorter) ** 0.5)))


def _layers_told(heat: Heat, layer: Layers) -> str:
    if layer == "mean":
        return f"mean of all {len(heat.layers)} layers that attend"
    if layer == "masked":
        return f"mean of the {len(heat.masked)} layers that guidance masks"
    return f"layer {layer}"


def _panel(name: str, picture: Image.Image, ink: tuple[int, int, int]) -> Image.Image:
    label = _text(name, picture.width, FONT, ink)
    return _stacked([label, picture], gap=4)


def _legend(scale: Scale, layers: str, width: int) -> Image.Image:
    """The colours as they are on grey, with numbers, and what they stand for."""
    bar_width, bar_height = BAR
    canvas = Image.new("RGB", (bar_width + 60, bar_height + 24), PAPER)
    shares = np.linspace(0, 1, bar_width)[None].repeat(bar_height, axis=0)
    canvas.paste(coloured(np.full((bar_height, bar_width, 3), MIDDLE), shares), (20, 0))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(SMALL)
    for tick in scale.ticks:
        x = 20 + float(scale.shares(np.array(float(tick)))) * bar_width
        name = f"{tick:g}x" if tick < scale.ticks[-1] else f"{tick:g}x +"
        draw.line((x, bar_height, x, bar_height + 4), fill=INK)
        draw.text((x, bar_height + 6), name, INK, font, anchor="mt")
    what = f"Attention of the row that a word is drawn from; {scale.meaning}; {layers}."
    return _stacked([canvas, _text(what, width, SMALL, PALE)], gap=6)


def _text(text: str, width: int, size: int, ink: tuple[int, int, int]) -> Image.Image:
    """Text in lines that are no wider than that, unless a word alone is."""
    font, lines = ImageFont.load_default(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    height = size + 5
    canvas = Image.new("RGB", (width, height * len(lines)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((0, i * height), line, ink, font)
    return canvas


def _beside(parts: Sequence[Image.Image]) -> Image.Image:
    width = sum(part.width for part in parts) + GAP * (len(parts) - 1)
    canvas = Image.new("RGB", (width, max(part.height for part in parts)), PAPER)
    x = 0
    for part in parts:
        canvas.paste(part, (x, 0))
        x += part.width + GAP
    return canvas


def _stacked(parts: Sequence[Image.Image], gap: int = GAP) -> Image.Image:
    height = sum(part.height for part in parts) + gap * (len(parts) - 1)
    canvas = Image.new("RGB", (max(part.width for part in parts), height), PAPER)
    y = 0
    for part in parts:
        canvas.paste(part, (0, y))
        y += part.height + gap
    return canvas


def _framed(picture: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (picture.width + 2 * GAP, picture.height + 2 * GAP), PAPER)
    canvas.paste(picture, (GAP, GAP))
    return canvas
