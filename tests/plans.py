"""Plans and batches by hand, for a context of the default tiny pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from support import ALL_TOKENS
from tiny_llava import TinyConfig

from cmg_gguf import _core
from cmg_gguf.llama.context import LlamaContext

N_LAYER = TinyConfig().n_layer
N_IMAGE = TinyConfig().n_image_tokens
NONE = -1


def plan(
    rows: Sequence[tuple[int, int, int, int]],
    *,
    observe: Sequence[int] = (),
    mask: Sequence[int] = (),
    n_layer: int = N_LAYER,
) -> _core.Plan:
    """rows: sequence, image token, slot observed into, slot hidden."""
    return _core.Plan(
        np.array(rows, np.int32),
        n_layer=n_layer,
        observe_layers=list(observe),
        mask_layers=list(mask),
        policy=ALL_TOKENS,
        n_image_tokens=N_IMAGE,
    )


def decode(
    context: LlamaContext, rows: Sequence[tuple[int, int, int]], plan: _core.Plan | None = None
) -> None:
    """rows: token, position, sequence."""
    tokens, positions, seqs = np.array(rows, np.int32).T.copy()
    context.decode(tokens, positions, seqs, outputs=np.ones(len(rows), np.bool_), plan=plan)
