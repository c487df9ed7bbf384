"""The built-in model's captions and first logits, as one line of JSON: what processors agree on.

python scripts/aarch64_captions.py N    # of the first N counter scenes of the test split
"""

from __future__ import annotations

import json
import platform
import sys

from cmg_gguf import Guidance, GuidedVLM
from cmg_gguf.cli.demo import MAX_TOKENS, PROMPT
from cmg_gguf.guidance import PLAIN
from cmg_gguf.tiny.pair import embedded_guidance, embedded_pair
from cmg_gguf.tiny.scenes import Pixels, draw, make_scene


def main(n_scenes: int) -> None:
    """Prints {"machine", "captions": [[plain, guided], ...], "l_o", "l_d": (scenes, n_vocab)}."""
    guidance = embedded_guidance()
    told: dict[str, list[list[float]]] = {"l_o": [], "l_d": []}
    captions = []
    with GuidedVLM(*embedded_pair(), n_ctx=1024) as vlm:
        for number in range(n_scenes):
            images = [draw(make_scene("test", number, "counter"))]
            captions.append(
                [
                    vlm.generate(PROMPT, images, guidance=g, max_tokens=MAX_TOKENS).text
                    for g in (PLAIN, guidance)
                ]
            )
            for name, logits in zip(told, _first_logits(vlm, images, guidance), strict=True):
                told[name].append(logits)
    print(json.dumps({"machine": platform.machine(), "captions": captions, **told}))


def _first_logits(
    vlm: GuidedVLM, images: list[Pixels], guidance: Guidance
) -> tuple[list[float], list[float]]:
    """l_o and l_d of the prompt's last row."""
    vlm.forget()
    prompt = vlm.tokenize(PROMPT, images)
    session = vlm.engine.open(prompt, guidance)
    vlm.engine.prefill(session, vlm.projector.encode(prompt, first_row=session.first_row))
    l_d = vlm.engine.degraded(session)
    assert session.l_o is not None
    assert l_d is not None
    found = session.l_o.tolist(), l_d.tolist()
    vlm.engine.end(session)
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]))
