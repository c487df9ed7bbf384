"""Stores what the built-in pair computes, for `cmg-gguf doctor` to compare with.

    python scripts/store_selftest.py            # where the graph patch is known to work

Of the first test scenes the one is taken in which masking changes most where it changes least; its
tokens must be far from a tie, so that rounding changes none of them. To be run again where that
pair, or what guidance means, has changed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cmg_gguf.answer.logits import combine
from cmg_gguf.doctor.branches import both
from cmg_gguf.doctor.selftest import GUIDANCE, N_SAID, PROMPT, compute, store
from cmg_gguf.guidance import LayerSet
from cmg_gguf.tiny.pair import embedded_pair
from cmg_gguf.tiny.scenes import draw, make_scene
from cmg_gguf.vlm import GuidedVLM

FILE = Path(__file__).resolve().parent.parent / "cmg_gguf" / "doctor" / "selftest.npz"
N_SCENES = 200
MARGIN = 0.5
"""Between the first and the second guided logit of a token, at least."""
LEVELS = 8
"""Of each colour, so that the picture takes little room."""


def main() -> int:
    """Writes the file and prints what it holds."""
    with GuidedVLM(*embedded_pair(), n_ctx=512, n_threads=1, strategy="exact") as vlm:
        strengths = [strength(vlm, picture(number)) for number in range(N_SCENES)]
    best = int(np.argmax(strengths))
    computed = compute(picture(best), None, n_threads=1)
    store(picture(best), computed, FILE)
    print(f"scene {best}: masking changes {100 * strengths[best]:.1f} % of the logits at least")
    for way, tokens in computed.said.items():
        print(f"{way:>12}: {tokens.tolist()}")
    print(f"{FILE}: {FILE.stat().st_size} bytes")
    return 0


def picture(number: int) -> NDArray[np.uint8]:
    """(112, 112, 3) uint8: a test scene in few colours."""
    step = 256 // LEVELS
    return (draw(make_scene("test", number, "counter")) // step * step + step // 2).astype(np.uint8)


def strength(vlm: GuidedVLM, pixels: NDArray[np.uint8]) -> float:
    """What masking one layer alone changes behind the prompt, at least; 0 where a token is near a
    tie, or where none is another by guidance."""
    reply = vlm.generate(PROMPT, [pixels], guidance=GUIDANCE, max_tokens=N_SAID)
    if reply.n_changed == 0 or reply.finish_reason == "stop":
        return 0.0
    prompt = vlm.projector.encode(vlm.tokenize(PROMPT, [pixels]))
    rows = both(vlm, prompt, GUIDANCE, [token.id for token in reply.tokens][:-1])
    # With half of beta, so that none is near the cut either.
    alpha, beta = GUIDANCE.alpha, GUIDANCE.beta / 2
    guided = [
        combine(*pair, alpha=alpha, beta=beta) for pair in zip(rows.l_o, rows.l_d, strict=True)
    ]
    second, first = np.sort(guided)[:, -2:].T
    if (first - second).min() < MARGIN:
        return 0.0
    masked = [replace(GUIDANCE, layers=LayerSet((il,))) for il in range(vlm.model.n_layer)]
    alone = [both(vlm, prompt, guidance) for guidance in masked]
    return min(float(np.linalg.norm(one.l_d - one.l_o) / np.linalg.norm(one.l_o)) for one in alone)


if __name__ == "__main__":
    sys.exit(main())
