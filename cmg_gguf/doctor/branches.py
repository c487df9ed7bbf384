"""What both branches compute, taken from the engine by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.engine.session import Session
from cmg_gguf.guidance import Guidance
from cmg_gguf.prompt.segments import Prompt
from cmg_gguf.vlm import GuidedVLM


@dataclass(frozen=True, eq=False)
class Rows:
    """Logits of both branches, (n, n_vocab) float32 each."""

    l_o: FloatArray
    l_d: FloatArray


def both(vlm: GuidedVLM, prompt: Prompt, guidance: Guidance, tokens: Sequence[int] = ()) -> Rows:
    """Behind a prompt, its images encoded, and behind each of these tokens: 1 + len(tokens) rows.

    Raises what `Engine.open` and `Engine.step` raise.
    """
    with _opened(vlm, prompt, guidance) as session:
        rows = [(vlm.engine.degraded(session), session.l_o)]
        for token in tokens:
            vlm.engine.step(session, token)
            rows.append((vlm.engine.degraded(session), session.l_o))
    l_d, l_o = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    return Rows(l_o, l_d)


def chosen(vlm: GuidedVLM, prompt: Prompt, guidance: Guidance) -> tuple[IntArray, ...]:
    """The image tokens that the prompt's last row hides, by masked layer; (n,) int32 each."""
    with _opened(vlm, prompt, guidance) as session:
        vlm.engine.degraded(session)
        return session.attended()


@contextmanager
def _opened(vlm: GuidedVLM, prompt: Prompt, guidance: Guidance) -> Iterator[Session]:
    """A session that has read the prompt."""
    session = vlm.engine.open(prompt, guidance)
    try:
        vlm.engine.prefill(session)
        yield session
    finally:
        vlm.engine.end(session)
