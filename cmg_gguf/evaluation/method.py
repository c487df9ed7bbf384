"""What a way to answer is: from a question to a request to the model. Nothing of runs or files."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt

from cmg_gguf.evaluation.task import Item
from cmg_gguf.evaluation.yes_no import YesNoTokens
from cmg_gguf.guidance import PLAIN, Guidance
from cmg_gguf.request import Request
from cmg_gguf.settings import guidance_to_json


@dataclass(frozen=True, eq=False)
class Question:
    """One item as a method sees it.

    image: (H, W, 3) uint8, None for a question about no image. seed: of this item and method.
    image_seed: of this image and method. image_size: pixels a side of what the encoder sees.
    """

    item: Item
    image: npt.NDArray[np.uint8] | None
    seed: int
    image_seed: int
    image_size: int
    words: YesNoTokens

    @property
    def images(self) -> list[npt.NDArray[np.uint8]]:
        """The images, in a list."""
        return [] if self.image is None else [self.image]

    def ask(self, **settings: Any) -> Request:
        """The question as a request. settings: those of `Request`; plain and greedy by default."""
        asked = {"guidance": PLAIN, "max_tokens": self.item.max_tokens, **settings}
        return Request(self.item.prompt, self.images, **asked)


class Method:
    """A way to answer, as a frozen dataclass: its fields are its settings, all plain values.

    `Guidance` counts as a plain value. One field is the name, unique within a run.
    """

    name: str
    yes_no: ClassVar[bool] = False
    """Whether it only makes sense for tasks of yes/no questions."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Methods that must be in the same run."""

    def request(self, question: Question) -> Request:
        """What is asked of the model. Called once an item, in any order."""
        raise NotImplementedError

    def at(self, strength: float) -> Method | None:
        """The same method at another strength, 1 = as published, named as a point of its curve
        ("vcd@2"); None = it has no strength."""
        if "alpha" not in {f.name for f in fields(cast(Any, self))}:
            return None
        changed = replace(cast(Any, self), alpha=strength, name=point_name(self.name, strength))
        return cast(Method, changed)

    def settings(self) -> dict[str, Any]:
        """What makes this method different from others of its class, JSON-ready."""
        values = {
            f.name: getattr(self, f.name) for f in fields(cast(Any, self)) if f.name != "name"
        }
        return {
            "method": type(self).__name__,
            **{k: guidance_to_json(v) if isinstance(v, Guidance) else v for k, v in values.items()},
        }


def point_name(curve: str, strength: float) -> str:
    """The name of a method at one of several strengths."""
    return f"{curve}@{strength:g}"


def point_of(name: str) -> tuple[str, float] | None:
    """(curve, strength) of a name that `point_name` made; None of any other."""
    curve, at, strength = name.rpartition("@")
    try:
        return (curve, float(strength)) if at else None
    except ValueError:
        return None
