"""Any folder of images and one prompt: answers to look at, without truth and without figures.

FolderPrompt("holiday", "Describe the image.")  # one item for holiday/beach.jpg, ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cmg_gguf.errors import EvaluationError, shown
from cmg_gguf.evaluation import files
from cmg_gguf.evaluation.statistics import Floats
from cmg_gguf.evaluation.task import BadItem, Item, Sums
from cmg_gguf.prompt.formats import image_suffixes


@dataclass(frozen=True)
class FolderPrompt:
    """One prompt on every image of a folder, by name; folders in it are left out."""

    images: str | Path
    prompt: str
    max_tokens: int = 256

    name: ClassVar[str] = "folder"
    yes_no: ClassVar[bool] = False

    def items(self) -> Iterator[Item | BadItem]:
        """Raises EvaluationError if the folder is missing or has no image in it."""
        images = files.folder(self.images, "image folder")
        suffixes = image_suffixes()
        found = [
            path
            for path in sorted(images.iterdir())
            if path.is_file() and path.suffix.lower() in suffixes
        ]
        if not found:
            raise EvaluationError(
                f"image folder {shown(str(images))} has no image: give one with "
                f"{', '.join(sorted(suffixes))} files"
            )
        for path in found:
            yield Item(path.name, path, self.prompt, cluster=path.name, max_tokens=self.max_tokens)

    def load(self, item: Item) -> Path:
        return Path(str(item.image))

    def counts(self, item: Item, answer: str) -> dict[str, float]:
        return {}

    def figures(self, sums: Sums) -> dict[str, Floats]:
        return {}
