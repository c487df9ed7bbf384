"""Pictures with what is in each patch, and packed conversations, as memory-mapped arrays.

    pictures.npy   (n, 112, 112, 3) uint8     typical scenes first, then counter scenes
    patches.npy    (n, 64, 3) uint8           class, colour and side of each patch; NOTHING = none
    image-texts    (n_typical, n_text) ...    one caption and six questions about each typical scene
    texts          (n_texts, n_text) ...      the same about scenes without pictures, pairs complete

Packed conversations share the prefix and do not see each other: `turn` numbers them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmg_gguf.tiny.scenes import Scene, SceneKind, draw, make_scene
from cmg_gguf.tiny.scenes.catalogue import COLOURS, OBJECTS, SIDES
from cmg_gguf.tiny.scenes.texts import conversations
from embedded.sizes import IMAGE, N_PATCHES, PATCH, Size
from embedded.tokenizer import BOS, Tokenizer

LABELS: tuple[tuple[str, ...], ...] = (OBJECTS, tuple(COLOURS), SIDES)
"""What a patch is labelled with: class, colour, side."""
NOTHING = 255
N_QUESTIONS = 6
_CHUNK = 500


@dataclass(frozen=True)
class Texts:
    """Packed conversations. ids: (n, n_text) int16; turn: uint8, 0 = padding; answer: bool."""

    ids: NDArray[np.int16]
    turn: NDArray[np.uint8]
    answer: NDArray[np.bool_]

    @staticmethod
    def load(path: Path) -> Texts:
        arrays = np.load(path)
        return Texts(arrays["ids"], arrays["turn"], arrays["answer"])


def patch_labels(scene: Scene) -> NDArray[np.uint8]:
    """(64, 3) uint8: class, colour and side of the thing that covers most of each patch.

    A thing counts where it covers a fifth of the patch, or of itself; else the patch is NOTHING.
    """
    n = IMAGE // PATCH
    labels = np.full((n, n, 3), NOTHING, np.uint8)
    covered = np.zeros((n, n))
    edges = np.arange(n) * PATCH
    for thing in scene.things:
        w, h = (
            np.clip(np.minimum(edges + PATCH, at + thing.size) - np.maximum(edges, at), 0, None)
            for at in (thing.x, thing.y)
        )
        area = np.outer(h, w)
        mine = (area >= 0.2 * min(PATCH**2, thing.size**2)) & (area > covered)
        covered[mine] = area[mine]
        names = (thing.name, thing.colour, thing.side)
        labels[mine] = [words.index(name) for words, name in zip(LABELS, names, strict=True)]
    return labels.reshape(N_PATCHES, 3)


def scene_of_picture(index: int, size: Size) -> Scene:
    """Typical scenes first, then counter scenes."""
    if index < size.typical:
        return make_scene("train", index, "typical")
    return make_scene("train", index - size.typical, "counter")


def write_pictures(folder: Path, size: Size, workers: int, report: Callable[[int], None]) -> None:
    """Draws and labels all training pictures."""
    n = size.typical + size.counter
    shapes = {"pictures": (n, IMAGE, IMAGE, 3), "patches": (n, N_PATCHES, 3)}
    for name, shape in shapes.items():
        np.lib.format.open_memmap(folder / f"{name}.part.npy", "w+", np.uint8, shape)
    jobs = [(folder, size, start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK)]
    with multiprocessing.Pool(workers) as pool:
        for done, _ in enumerate(pool.imap_unordered(_write_chunk, jobs), 1):
            report(min(done * _CHUNK, n))
    for name in shapes:
        (folder / f"{name}.part.npy").rename(folder / f"{name}.npy")


def _write_chunk(job: tuple[Path, Size, int, int]) -> None:
    folder, size, start, stop = job
    arrays = [np.load(folder / f"{n}.part.npy", mmap_mode="r+") for n in ("pictures", "patches")]
    for i in range(start, stop):
        scene = scene_of_picture(i, size)
        arrays[0][i], arrays[1][i] = draw(scene), patch_labels(scene)


def write_texts(
    path: Path, tokenizer_path: Path, kind: SceneKind, n: int, size: Size, workers: int
) -> None:
    """Packs the conversations about `n` scenes: "strong" ones have no image in front."""
    jobs = [
        (tokenizer_path, kind, start, min(start + _CHUNK, n), size.n_text)
        for start in range(0, n, _CHUNK)
    ]
    with multiprocessing.Pool(workers) as pool:
        parts = pool.map(_pack_chunk, jobs, chunksize=1)
    ids, turn, answer = (np.concatenate([part[k] for part in parts]) for k in range(3))
    np.savez(path, ids=ids, turn=turn, answer=answer)


def _pack_chunk(
    job: tuple[Path, SceneKind, int, int, int],
) -> tuple[NDArray[np.int16], NDArray[np.uint8], NDArray[np.bool_]]:
    tokenizer_path, kind, start, stop, n_text = job
    tokenizer = Tokenizer(tokenizer_path)
    ids = np.zeros((stop - start, n_text), np.int16)
    turn = np.zeros((stop - start, n_text), np.uint8)
    answer = np.zeros((stop - start, n_text), bool)
    for row, i in enumerate(range(start, stop)):
        rng = np.random.default_rng((17, ("typical", "strong").index(kind), i))
        at = 0
        told = conversations(make_scene("train", i, kind), rng, N_QUESTIONS)
        for number, turns in enumerate(told, 1):
            tokens, answers = tokenizer.conversation(turns, image=kind == "typical")
            if at + len(tokens) > n_text:
                continue
            part = slice(at, at + len(tokens))
            ids[row, part], turn[row, part], answer[row, part] = tokens, number, answers
            at += len(tokens)
    return ids, turn, answer


def prefix_ids(tokenizer: Tokenizer, *, image: bool) -> Sequence[int]:
    """What stands in front of every conversation."""
    return tokenizer.prefix if image else (BOS,)
