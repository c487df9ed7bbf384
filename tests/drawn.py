"""A draw by a sampler's two halves, l_d computed only if it matters."""

from __future__ import annotations

from collections.abc import Callable

from cmg_gguf.answer.generate import Drawer
from cmg_gguf.arrays import FloatArray


def drawn(
    drawer: Drawer,
    logits: FloatArray,
    original: FloatArray,
    degraded: Callable[[], FloatArray | None],
) -> tuple[int, int]:
    """(guided token, plain token)."""
    matters = drawer.prepare(logits)
    return drawer.draw(original, degraded() if matters else None)
