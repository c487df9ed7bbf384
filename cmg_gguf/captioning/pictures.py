"""The pictures of a folder, each with a text file that is its own."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cmg_gguf.errors import CaptionError, shown
from cmg_gguf.prompt.formats import image_suffixes

SUFFIX = ".txt"


@dataclass(frozen=True)
class Picture:
    """A picture of a folder.

    name: its path within the folder, with "/" between. sidecar: the text file beside it that no
    other picture of the folder has: photo.txt, or photo.jpg.txt where several are called photo.
    """

    path: Path
    name: str
    sidecar: Path

    @property
    def shares_stem(self) -> bool:
        """Whether another picture beside it has its name but for the suffix."""
        return self.sidecar.name == self.path.name + SUFFIX


def find_pictures(folder: Path, *, recursive: bool) -> list[Picture]:
    """Every picture of the folder by name: all suffixes that `load_image` reads, nothing hidden.

    recursive: those of the folders in it too, but for hidden and linked ones. Raises CaptionError
    for what is no folder, cannot be read, or has no picture.
    """
    if not folder.is_dir():
        remedy = "ask about a single picture with cmg-gguf run --image" if folder.exists() else ""
        raise CaptionError(
            f"{shown(str(folder))} is no folder: {remedy or 'give one that is there'}"
        )
    suffixes = image_suffixes()
    found: list[Picture] = []
    for directory, names in _directories(folder, recursive=recursive):
        paths = [directory / name for name in names if _is_picture(name, suffixes)]
        sidecars = _sidecars(sorted(path.name for path in paths if path.is_file()))
        found += [
            Picture(
                directory / name,
                (directory / name).relative_to(folder).as_posix(),
                directory / text,
            )
            for name, text in sidecars.items()
        ]
    if not found:
        remedy = "" if recursive else ", or look into the folders in it (--recursive)"
        raise CaptionError(
            f"{shown(str(folder))} has no picture in it: give a folder with "
            f"{', '.join(sorted(suffixes))} files{remedy}"
        )
    return sorted(found, key=lambda picture: picture.name.split("/"))


def _directories(folder: Path, *, recursive: bool) -> Iterator[tuple[Path, list[str]]]:
    def refuse(exc: OSError) -> None:
        raise CaptionError(
            f"folder {shown(exc.filename)} cannot be read ({exc.strerror}): make it readable, or "
            "name another"
        ) from exc

    for directory, below, names in os.walk(folder, onerror=refuse):
        below[:] = [name for name in below if recursive and not name.startswith(".")]
        yield Path(directory), names


def _is_picture(name: str, suffixes: frozenset[str]) -> bool:
    # Finder's ._photo.jpg is no picture, whatever it is called.
    return not name.startswith(".") and Path(name).suffix.lower() in suffixes


def _sidecars(names: list[str]) -> dict[str, str]:
    """A text file's name for each picture of one directory, all different in any case.

    All of those that would share a file take their whole name, so that none has what may be meant
    for another; and so on while that makes new ones meet.
    """
    whole: set[str] = set()
    while True:
        taken = {name: (name if name in whole else Path(name).stem) + SUFFIX for name in names}
        sharing = defaultdict(list)
        for name, text in taken.items():
            sharing[text.casefold()].append(name)
        meeting = {name for group in sharing.values() if len(group) > 1 for name in group}
        if meeting <= whole:
            return taken
        whole |= meeting
