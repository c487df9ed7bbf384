"""Whether llama.cpp computes from the exported files what torch trained: greedy captions, compared.

    scripts/agree_embedded --work DIR

With the files of the package, and with the same language model in F16: the first is what users
get, the second tells quantisation from mistakes in the files or the graph. Where a caption differs,
torch says how near the two words were that it differs by first. Needs torch, and the checkpoints of
the training in --work. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from cmg_gguf import GuidedVLM
from cmg_gguf.guidance import PLAIN
from cmg_gguf.tiny.scenes import draw, make_scene
from cmg_gguf.tiny.scenes.texts import CAPTION_PROMPTS
from embedded.export import write_model
from embedded.model import Llava
from embedded.sizes import N_PATCHES, SIZES
from embedded.tokenizer import EOS, Tokenizer

MAX_TOKENS = 160

Tokens = tuple[int, ...]


def trained(work: Path, size: str) -> Llava:
    """The model from its checkpoints."""
    model = Llava(SIZES[size])
    for stage, parts in (("vision", ("encoder",)), ("joint", ("lm", "projector"))):
        state = torch.load(work / f"{stage}.pt", weights_only=True, map_location="cpu")
        for part in parts:
            getattr(model, part).load_state_dict(state[part])
    return model.eval()


class Teller:
    """Greedy captions of the torch model in float32. pictures: (n, 112, 112, 3) uint8."""

    def __init__(self, model: Llava, tokenizer: Tokenizer, pictures: Tensor, prompt: str) -> None:
        n = len(pictures)
        asked = torch.tensor(tokenizer.encode(f"\n{prompt} ASSISTANT:"))
        before = torch.tensor(tokenizer.prefix)
        self._model = model
        with torch.no_grad():
            self._asked = torch.cat(
                [
                    model.lm.embed(before).expand(n, -1, -1),
                    model.projector(model.encoder(pictures)),
                    model.lm.embed(asked).expand(n, -1, -1),
                ],
                1,
            )

    @torch.no_grad()
    def captions(self) -> list[Tokens]:
        """Of every picture, without </s>."""
        n = len(self._asked)
        said = torch.zeros(n, 0, dtype=torch.long)
        ended = torch.zeros(n, dtype=torch.bool)
        while said.shape[1] < MAX_TOKENS and not ended.all():
            token = self._logits(self._asked, said).argmax(-1)
            ended |= token == EOS
            said = torch.cat([said, token[:, None]], 1)
        rows = [tuple(row) for row in said.tolist()]
        return [row[: row.index(EOS)] if EOS in row else row for row in rows]

    @torch.no_grad()
    def gap(self, picture: int, ours: Tokens, theirs: Tokens) -> float:
        """Logit of our first word that differs, minus that of theirs."""
        pairs = zip((*ours, EOS), (*theirs, EOS), strict=False)
        at = next(i for i, (a, b) in enumerate(pairs) if a != b)
        said = torch.tensor([ours[:at]], dtype=torch.long)
        logits = self._logits(self._asked[picture : picture + 1], said)[0]
        a, b = (*ours, EOS)[at], (*theirs, EOS)[at]
        return float(logits[a] - logits[b])

    def _logits(self, asked: Tensor, said: Tensor) -> Tensor:
        x = torch.cat([asked, self._model.lm.embed(said)], 1)
        positions = torch.arange(x.shape[1]).expand(len(x), -1)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
        return self._model.lm.out(self._model.lm(x, positions, mask)[:, -1])  # type: ignore[no-any-return]


def told_by_llama(
    llm: Path, mmproj: Path, pictures: NDArray[np.uint8], prompt: str
) -> list[Tokens]:
    """Greedy captions through llama.cpp, with the settings that users have."""
    with GuidedVLM(llm, mmproj, n_ctx=1024) as vlm:
        replies = (
            vlm.generate(prompt, [picture], guidance=PLAIN, max_tokens=MAX_TOKENS)
            for picture in track(pictures, llm.name)
        )
        return [tuple(token.id for token in reply.tokens) for reply in replies]


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
    parts = [torch.from_numpy(pictures[i : i + 50]) for i in range(0, options.n, 50)]
    tellers = [Teller(model, tokenizer, part, prompt) for part in parts]
    ours = [caption for teller in track(tellers, "torch") for caption in teller.captions()]
    (shipped,) = options.models.glob("*.Q8_0.gguf")
    (mmproj,) = options.models.glob("*mmproj*.gguf")
    found: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        half = Path(folder) / "F16.gguf"
        write_model(model.lm, tokenizer, SIZES[options.size], half, "f16")
        for llm in (shipped, half):
            theirs = told_by_llama(llm, mmproj, pictures, prompt)
            gaps = [
                tellers[i // 50].gap(i % 50, a, b)
                for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
                if a != b
            ]
            n_same = options.n - len(gaps)
            found[llm.name] = {"identical": n_same, "largest_gap": max(gaps, default=0.0)}
            print(
                f"{llm.name}: {n_same} of {options.n} greedy captions are torch's; the others part "
                f"at words whose logits are at most {max(gaps, default=0.0):.3f} apart"
            )
    print(json.dumps({"captions": options.n, **found, "image_tokens": N_PATCHES}))


if __name__ == "__main__":
    main()
