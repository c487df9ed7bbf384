"""Folders of drawn pictures, and answers that no model gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, features

from cmg_gguf.evaluation.answering import Job, Work
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.records import Record
from cmg_gguf.tiny.pair import embedded_pair
from cmg_gguf.tiny.scenes import draw, make_scene

NAMES = (
    "kitchen.png",
    "UPPER CASE.JPG",
    "a, b; 'c'.jpeg",
    "--to.webp",
    "ünï/日本語.gif",
    "ünï/🙂 smile.bmp",
    "deep/er/and deeper/scan.tiff",
    "deep/x.tif",
    "deep/photo.v2.final.jp2",
    "deep/same.ppm",
    "deep/same.png",
    "{name} %s \\n.ico",
    *(["deep/new.avif"] if features.check("avif") else []),
)
"""One picture of each format and more: twelve or thirteen names."""

SIDECARS = tuple(
    name + ".txt" if "/same." in name else name.rpartition(".")[0] + ".txt" for name in NAMES
)
"""The text file of each."""

CORRUPT, HIDDEN = "deep/broken.jpg", ("._kitchen.jpg", "deep/.thumbs/t.jpg")


def draw_pictures(folder: Path, names: Sequence[str]) -> None:
    """Draws another scene under each name."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(make_scene("test", i, "typical"))).save(path)


def draw_odd(folder: Path) -> None:
    """NAMES, a picture that is corrupt, and what must not be taken for one."""
    draw_pictures(folder, NAMES)
    whole = (folder / "UPPER CASE.JPG").read_bytes()
    (folder / CORRUPT).write_bytes(whole[: len(whole) // 2])
    for name in HIDDEN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    (folder / "notes.md").write_text("mine")


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


MODEL = ModelFiles(*embedded_pair())


@dataclass
class Parrot:
    """An executor that answers by a picture's name, or with what it is told for that.

    asked: (name, prompt) in order. problems: names that cannot be answered.
    """

    says: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    finish: str = "stop"
    asked: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, job: Job, works: Sequence[Work]) -> Iterator[Record]:
        for work in reversed(works):  # in any order
            ((item, methods),) = work.items
            (method,) = methods
            self.asked.append((item.id, item.prompt))
            if item.id in self.problems:
                yield Record(item=item.id, method=method, problem="it is torn")
            else:
                answer = self.says.get(item.id, f"A {Path(item.id).stem}.")
                yield Record(item=item.id, method=method, answer=answer, finish=self.finish)
