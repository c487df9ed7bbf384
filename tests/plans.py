"""Plans and batches by hand, for a context of the default tiny pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from support import ALL_TOKENS
from tiny_llava import TinyConfig

from cmg_gguf import _core
from cmg_gguf.llama.context import LlamaContext

N_LAYER = TinyConfig().n_layer
N_IMAGE = TinyConfig().n_image_tokens
NONE = -1


class Row(NamedTuple):
    """What a plan says of one row, in the order of its columns; a plain row by default."""

    seq: int = 0
    part: int = NONE
    image_token: int = NONE
    observe: int = NONE
    mask: int = NONE
    residual: int = NONE


def part(
    selections: _core.Selections,
    *,
    observe: Sequence[int] = (),
    mask: Sequence[int] = (),
    policy: _core.TokenPolicy = ALL_TOKENS,
    n_image_tokens: int = N_IMAGE,
    residuals: _core.Residuals | None = None,
    read_residual: bool = False,
) -> _core.Part:
    """What the rows of one session share. observe, mask: layers."""
    return _core.Part(
        selections=selections,
        policy=policy,
        n_image_tokens=n_image_tokens,
        observe_layers=list(observe),
        mask_layers=list(mask),
        residuals=residuals,
        read_residual=read_residual,
    )


def plan(
    rows: Sequence[tuple[int, ...]], *parts: _core.Part, fork: _core.ForkPlan | None = None
) -> _core.Plan:
    """rows: as `Row`."""
    return _core.Plan(np.array(rows, np.int32).reshape(-1, 6), list(parts), fork=fork)


def decode(
    context: LlamaContext,
    rows: Sequence[tuple[int, int, int]],
    plan: _core.Plan | None = None,
    *,
    wanted: Sequence[int] | None = None,
) -> None:
    """rows: token, position, sequence. wanted: the rows whose logits are; None = all."""
    tokens, positions, seqs = np.array(rows, np.int32).T.copy()
    outputs = np.isin(np.arange(len(rows)), range(len(rows)) if wanted is None else wanted)
    context.decode(tokens, positions, seqs, outputs=outputs, plan=plan)


def survey(context: LlamaContext, seq: int = 0, sizes: Sequence[int] = (2, 31)) -> None:
    """Decodes of as many rows for the patch to learn the graph from. `seq` is empty then."""
    for n in sizes:
        asked = _core.ForkPlan(layer=0, n_below=n, survey=True)
        decode(context, [(300, i, seq) for i in range(n)], plan([Row(seq)] * n, fork=asked))
        context.truncate(seq, 0)
