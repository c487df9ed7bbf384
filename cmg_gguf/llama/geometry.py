"""Where the image tokens of a prompt lie in its pictures."""

from __future__ import annotations

import numpy as np

from cmg_gguf.arrays import IntArray
from cmg_gguf.heat.geometry import Boxes, Picture, Tile
from cmg_gguf.llama.projector import Projector
from cmg_gguf.llama.views import View, ViewError
from cmg_gguf.prompt.segments import ImageSegment, Prompt

ROW_BY_ROW = frozenset(
    [
        "mlp",
        "ldp",
        "ldpv2",
        "idefics3",
        "internvl",
        "gemma3",
        "gemma4v",
        "gemma4uv",
        "qwen2vl_merger",
        "qwen2.5vl_merger",
        "qwen3vl_merger",
        "kimivl",
        "lfm2",
        "llama4",
    ]
)
"""Kinds of projectors whose tokens stand row by row, each for a square of what the encoder is
given, as their graphs in llama.cpp have it. Llama 4's do where that is mended."""
ROWS_END = frozenset(["pixtral", "lightonocr"])
"""The same, where a token that shows nothing may stand behind each row but the last."""


def pictures_of(projector: Projector, prompt: Prompt) -> tuple[Picture, ...]:
    """The pictures of a prompt that was tokenised and not yet encoded, in order."""
    pieces: dict[int, list[Tile]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    first = 0
    for segment in prompt.segments:
        if isinstance(segment, ImageSegment):
            source, image = segment.source[0], segment.chunk.image
            height, width, _ = source.images[image].shape
            sizes[image] = width, height
            pieces.setdefault(image, []).append(Tile(first, segment.n_tokens))
            first += segment.n_tokens
    return tuple(_picture(projector, sizes[i], tuple(pieces[i])) for i in sizes)


def _picture(projector: Projector, size: tuple[int, int], tiles: tuple[Tile, ...]) -> Picture:
    try:
        views = projector.views(*size)
        if len(views) != len(tiles):
            raise ViewError(f"it is in {len(tiles)} tiles and {len(views)} were measured")
        placed = tuple(
            Tile(tile.first, tile.n_tokens, _boxes(projector, view, tile.n_tokens))
            for tile, view in zip(tiles, views, strict=True)
        )
    except ViewError as exc:
        return Picture(*size, tiles, str(exc))
    return Picture(*size, placed)


def _boxes(projector: Projector, view: View, n_tokens: int) -> Boxes:
    """(n_tokens, 4): where a view's tokens lie in the picture."""
    edge, cells = cells_of(projector.kind, view.width, view.height, n_tokens)
    if projector.kind == "llama4" and not projector.is_mended:
        raise ViewError('its tokens stand by column; with encoder="mended" they do not')
    columns = view.width // edge
    x, y = (cells % columns * edge).astype(float), (cells // columns * edge).astype(float)
    boxes = np.stack(
        [
            view.across.place(x),
            view.down.place(y),
            view.across.place(x + edge),
            view.down.place(y + edge),
        ],
        axis=1,
    )
    empty = (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1]) | (cells < 0)
    boxes[empty] = np.nan
    return boxes


def cells_of(kind: str, width: int, height: int, n_tokens: int) -> tuple[int, IntArray]:
    """The edge of the squares that a view of this size is cut into, in pixels, and for each token
    the number of its square, row by row; -1 = it has none. Raises ViewError."""
    if kind not in ROW_BY_ROW | ROWS_END:
        raise ViewError(
            f"how tokens of the kind {kind or 'unnamed'!r} lie in a picture is not known"
        )
    for n_ends in (0, 1) if kind in ROWS_END else (0,):
        for edge in range(1, min(width, height) + 1):
            columns, rows = width // edge, height // edge
            if width % edge or height % edge or (columns + n_ends) * rows - n_ends != n_tokens:
                continue
            cells = np.full((rows, columns + n_ends), -1, np.int32)
            cells[:, :columns] = np.arange(rows * columns).reshape(rows, columns)
            return edge, cells.reshape(-1)[:n_tokens]
    raise ViewError(f"{n_tokens} tokens are no grid of squares on {width}x{height} pixels")
