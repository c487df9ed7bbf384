"""Whether llama.cpp computes from the exported files what torch trained: greedy captions, compared.

    python -m embedded.agree --work DIR --models cmg_gguf/models

Needs torch, and the checkpoints of the training in --work. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from cmg_gguf import Guidance, GuidedVLM
from cmg_gguf.scenes import draw, make_scene
from cmg_gguf.scenes.texts import CAPTION_PROMPTS
from embedded.model import Llava
from embedded.sizes import N_PATCHES, SIZES
from embedded.tokenizer import EOS, Tokenizer

PLAIN = Guidance(alpha=0.0, beta=0.0)
MAX_TOKENS = 160


def trained(work: Path, size: str) -> Llava:
    """The model from its checkpoints."""
    model = Llava(SIZES[size])
    for stage, parts in (("vision", ("encoder",)), ("joint", ("lm", "projector"))):
        state = torch.load(work / f"{stage}.pt", weights_only=True, map_location="cpu")
        for part in parts:
            getattr(model, part).load_state_dict(state[part])
    return model.eval()


@torch.no_grad()
def captions(
    model: Llava, tokenizer: Tokenizer, pictures: torch.Tensor, prompt: str
) -> list[tuple[int, ...]]:
    """Greedy answers of the torch model in float32, as tokens without </s>."""
    n = len(pictures)
    asked = torch.tensor(tokenizer.encode(f"\n{prompt} ASSISTANT:"))
    parts = [
        model.lm.embed(torch.tensor(tokenizer.prefix)).expand(n, -1, -1),
        model.projector(model.encoder(pictures)),
        model.lm.embed(asked).expand(n, -1, -1),
    ]
    x = torch.cat(parts, 1)
    said = torch.zeros(n, 0, dtype=torch.long)
    ended = torch.zeros(n, dtype=torch.bool)
    while said.shape[1] < MAX_TOKENS and not ended.all():
        length = x.shape[1]
        positions = torch.arange(length).expand(n, -1)
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        token = model.lm.out(model.lm(x, positions, mask)[:, -1]).argmax(-1)
        ended |= token == EOS
        said = torch.cat([said, token[:, None]], 1)
        x = torch.cat([x, model.lm.embed(token)[:, None]], 1)
    answers = []
    for row in said.tolist():
        answers.append(tuple(row[: row.index(EOS)] if EOS in row else row))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("-n", type=int, default=400, help="captions")
    options = parser.parse_args()
    model = trained(options.work, options.size)
    tokenizer = Tokenizer(options.work / "tokenizer.model")
    prompt = CAPTION_PROMPTS["plain"]
    scenes = [make_scene("test", i, "typical") for i in range(options.n)]
    pictures = np.stack([draw(scene) for scene in scenes])
    ours: list[tuple[int, ...]] = []
    for start in range(0, options.n, 100):
        part = torch.from_numpy(pictures[start : start + 100])
        ours += captions(model, tokenizer, part, prompt)
    (llm,) = options.models.glob("*.Q8_0.gguf")
    (mmproj,) = options.models.glob("*mmproj*.gguf")
    with GuidedVLM(llm, mmproj, n_ctx=1024) as vlm:
        theirs = [
            tuple(
                token.id
                for token in vlm.generate(
                    prompt, [picture], guidance=PLAIN, max_tokens=MAX_TOKENS
                ).tokens
            )
            for picture in pictures
        ]
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(f"{same} of {options.n} greedy captions are identical in torch and llama.cpp")
    print(json.dumps({"captions": options.n, "identical": same, "image_tokens": N_PATCHES}))


if __name__ == "__main__":
    main()
