"""The product's side: prompts, embeddings and both branches' logits of a forced answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmg_gguf import Guidance, GuidedVLM, LayerRange, TopRatio
from cmg_gguf.engine.steps import EAGER, Strategy
from cmg_gguf.prompt.segments import ImageSegment, Prompt
from judge_suite.checkpoint import Floats, Pixels
from judge_suite.family import IMAGE

LAYERS = LayerRange(1 / 3, 1.0)


def masking(ratio: float) -> Guidance:
    return Guidance(alpha=1.0, beta=0.1, tokens=TopRatio(ratio), layers=LAYERS)


def masked_layers(n_layer: int) -> tuple[int, ...]:
    return tuple(range(int(np.floor(n_layer / 3 + 0.5)), n_layer))


def opened(llm: Path, mmproj: Path, **settings: Any) -> GuidedVLM:
    """Opened so that the same request gives the same bits, with a cache that rounds nothing."""
    exact: dict[str, Any] = {
        "n_ctx": 2048,
        "n_threads": 1,
        "n_gpu_layers": 0,
        "flash_attn": False,
        "type_k": "f32",
        "type_v": "f32",
        "prefix_cells": 0,
        "image_cache_bytes": 0,
    }
    return GuidedVLM(llm, mmproj, **{**exact, **settings})


def encoded(vlm: GuidedVLM, text: str, images: Sequence[Pixels]) -> Prompt:
    """The prompt with its pictures encoded; `IMAGE` stands for each."""
    projector = vlm.projector
    ids = [sha256(image.tobytes()).hexdigest() for image in images]
    marked = text.replace(IMAGE, projector.marker)
    return projector.encode(projector.tokenize(marked, list(images), ids=ids, add_bos=False))


def embeddings(prompt: Prompt) -> Floats:
    """(n_image_tokens, n_embd), piece by piece."""
    rows = [s.embd for s in prompt.segments if isinstance(s, ImageSegment) and s.embd is not None]
    return np.concatenate(rows)


def sayable(vlm: GuidedVLM) -> NDArray[np.bool_]:
    """(n_vocab,): tokens that are text. An answer must not hold what stands for an image."""
    return np.array([bool(vlm.model.token_bytes(i)) for i in range(vlm.model.n_vocab)])


def best(vlm: GuidedVLM, logits: Floats) -> NDArray[np.int64]:
    allowed = sayable(vlm)
    chosen: NDArray[np.int64] = np.where(allowed, logits[..., : len(allowed)], -np.inf).argmax(-1)
    return chosen


def answer(
    vlm: GuidedVLM,
    prompt: Prompt,
    guidance: Guidance,
    *,
    forced: Sequence[int] | None = None,
    n_steps: int = 8,
    strategy: Strategy = EAGER,
    late: bool = False,
) -> tuple[list[int], Floats, Floats | None, int]:
    """(tokens, l_o, l_d, rows reused); logits (n_steps + 1, n_vocab) from the prompt's last row on.

    forced: the answer; None = the likeliest by l_o. late: l_d is asked for at the end alone, when
    rows have waited, and is (1, n_vocab).
    """
    engine = vlm.engine
    before = engine.strategy
    # What an engine never forks, a model with a state, is not forked here either.
    engine.strategy = replace(strategy, fork=strategy.fork and before.fork)
    try:
        session = engine.open(prompt, guidance)
        n_reused = session.n_reused
        engine.prefill(session, prompt)
        n_steps = n_steps if forced is None else len(forced)
        tokens: list[int] = []
        original, degraded = [], []
        for i in range(n_steps + 1):
            original.append(session.l_o.copy())
            if guidance.contrasts and (not late or i == n_steps):
                l_d = engine.degraded(session)
                degraded.append(np.full_like(session.l_o, np.nan) if l_d is None else l_d.copy())
            if i < n_steps:
                token = int(best(vlm, original[-1])) if forced is None else forced[i]
                tokens.append(token)
                engine.step(session, token)
        engine.end(session)
    finally:
        engine.strategy = before
    return tokens, np.array(original), np.array(degraded) if degraded else None, n_reused
