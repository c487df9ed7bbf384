"""Trains the model pair that ships with cmg-gguf, from nothing, and writes its GGUF files.

    scripts/train_embedded --work DIR

Stages, each resumed where it stopped:

    data      pictures, patch labels, packed conversations; the tokenizer
    vision    the image encoder learns what is in each patch: typical and counter scenes alike, so
              that it reports what it sees and not what it expects
    text      the language model reads about scenes it has no picture of, more of them than there
              are pictures, their pairs all but always complete: the language habit
    features  the encoder is frozen, as LLaVA's is, and what it sees is computed once
    joint     language model and projector learn to read it. From the start some rows have no image,
              and some have image tokens hidden: a hidden image must mean "unknown", not "empty"

The projector starts as the encoder's own classifier: a unit for each class, colour and side, whose
output is the language model's embedding of that word.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from cmg_gguf.tiny.scenes import SceneKind, draw, make_scene
from cmg_gguf.tiny.scenes.catalogue import PLACES
from cmg_gguf.tiny.scenes.texts import NUMBERS
from embedded import data
from embedded.data import LABELS, NOTHING, Texts, prefix_ids
from embedded.export import write_model, write_projector
from embedded.model import Encoder, Heads, LanguageModel, Llava, Projector
from embedded.sizes import N_PATCHES, SIZES, Size
from embedded.tokenizer import Tokenizer, train_tokenizer

SEED = 1
VISION_RATE, LM_RATE = 1.5e-3, 1.5e-3
NOTHING_WEIGHT = 0.25
P_TEXT = 0.15
"""Share of joint rows that have no image at all."""
P_INTACT, P_SOME = 0.7, 0.15
"""Of the others: nothing hidden; a random share of the image tokens; the rest: all of them."""
ANSWER_WEIGHT = 2.0
"""Loss weight of yes, no, objects, colours, sides and numbers; other words of answers have 1."""
SAVE_EVERY = 200

Log = Callable[[str], None]


class Stage:
    """Steps of an optimiser with a cosine schedule; state is saved now and then and at the end."""

    def __init__(
        self, path: Path, modules: dict[str, nn.Module], rate: float, n_steps: int, log: Log
    ) -> None:
        self.path, self.modules, self.log = path, modules, log
        self.rate, self.n_steps = rate, n_steps
        self.parameters = [p for m in modules.values() for p in m.parameters()]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=rate, weight_decay=0.03, betas=(0.9, 0.98)
        )
        self.step = 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(state[name])
            self.step = state["step"]
            if self.step < n_steps:
                self.optimiser.load_state_dict(state["optimiser"])

    def run(self, loss_of_step: Callable[[int], Tensor], report: Callable[[], str]) -> None:
        """loss_of_step(step) is a function of the step alone, so that resuming changes nothing."""
        started, first, mean = time.time(), self.step, 0.0
        while self.step < self.n_steps:
            share = self.step / self.n_steps
            warm = min(1.0, (self.step + 1) / 100)
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate * warm * (0.5 * (1 + math.cos(math.pi * share)) + 0.01)
            torch.manual_seed(hash((SEED, self.step)) % 2**31)
            loss = loss_of_step(self.step)
            self.optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimiser.step()
            self.step += 1
            mean = loss.item() if mean == 0 else 0.98 * mean + 0.02 * loss.item()
            if self.step % 50 == 0:
                pace = (time.time() - started) / (self.step - first)
                left = pace * (self.n_steps - self.step) / 60
                self.log(
                    f"{self.path.stem} {self.step}/{self.n_steps}  loss {mean:.3f}  "
                    f"{pace:.2f} s a step, {left:.0f} min left"
                )
            if self.step % SAVE_EVERY == 0 or self.step == self.n_steps:
                self._save()
            if self.step % 400 == 0 or self.step == self.n_steps:
                self.log(report())

    def _save(self) -> None:
        state: dict[str, Any] = {n: m.state_dict() for n, m in self.modules.items()}
        state |= {"step": self.step, "optimiser": self.optimiser.state_dict()}
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)


def batches(n: int, size: int, step: int) -> NDArray[np.int64]:
    """Sorted indices of batch `step` of shuffled passes over n rows."""
    per_pass = n // size
    order = np.random.default_rng((SEED, step // per_pass)).permutation(n)
    at = step % per_pass * size
    return np.sort(order[at : at + size])


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16)


# vision


def train_vision(size: Size, work: Path, device: str, log: Log) -> tuple[Encoder, Heads]:
    torch.manual_seed(SEED)
    encoder, classify = Encoder(size).to(device), Heads(size).to(device)
    pictures = np.load(work / "pictures.npy", mmap_mode="r")
    patches = np.load(work / "patches.npy", mmap_mode="r")
    modules: dict[str, nn.Module] = {"encoder": encoder, "heads": classify}
    stage = Stage(work / "vision.pt", modules, VISION_RATE, size.vision_steps, log)
    held_out = draw_tune(200)

    def losses(pixels: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), device=device)
        for k, logits in enumerate(classify(encoder(pixels))):
            target = (labels[..., k].long() + 1) % (NOTHING + 1)
            weight = torch.ones(logits.shape[-1], device=device)
            weight[0] = NOTHING_WEIGHT
            total = total + F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), weight)
        return total

    def loss_of_step(step: int) -> Tensor:
        rows = batches(len(pictures), size.vision_batch, step)
        with autocast(device):
            return losses(
                torch.from_numpy(pictures[rows]).to(device),
                torch.from_numpy(patches[rows]).to(device),
            )

    def report() -> str:
        with torch.no_grad():
            logits = classify(encoder(torch.from_numpy(held_out[0]).to(device)))
        right = []
        for k in range(3):
            labels = held_out[1][..., k]
            found = logits[k].argmax(-1).cpu().numpy() - 1
            right.append(float((found == labels)[labels != NOTHING].mean()))
        shares = "class {:.1%} colour {:.1%} side {:.1%}".format(*right)
        return f"vision: of patches with a thing, {shares}"

    stage.run(loss_of_step, report)
    return encoder.eval(), classify


def draw_tune(n: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    scenes = [make_scene("tune", i, "counter") for i in range(n)]
    return (
        np.stack([draw(scene) for scene in scenes]),
        np.stack([data.patch_labels(scene) for scene in scenes]),
    )


def write_features(encoder: Encoder, size: Size, work: Path, device: str, log: Log) -> None:
    """What the frozen encoder makes of each typical picture: (n, 64, v_embd) float16."""
    path = work / "features.npy"
    if path.exists():
        return
    pictures = np.load(work / "pictures.npy", mmap_mode="r")
    part = work / "features.part.npy"
    shape = (size.typical, N_PATCHES, size.v_embd)
    features = np.lib.format.open_memmap(part, "w+", np.float16, shape)
    for start in range(0, size.typical, 256):
        rows = slice(start, min(start + 256, size.typical))
        with torch.no_grad(), autocast(device):
            features[rows] = encoder(torch.from_numpy(pictures[rows]).to(device)).float().cpu()
        if start % 12_800 == 0:
            log(f"features {start}/{size.typical}")
    part.rename(path)


# language


def token_weights(tokenizer: Tokenizer, size: Size) -> Tensor:
    words = [*(word for group in LABELS for word in group), *PLACES, *NUMBERS]
    weights = torch.ones(size.vocab)
    for word in (*words, "Yes", "No"):
        for token in tokenizer.encode(word):
            weights[token] = ANSWER_WEIGHT
    return weights


def packed_inputs(texts: Texts, rows: NDArray[np.int64], device: str) -> tuple[Tensor, ...]:
    """ids, turn and answer of these rows as (batch, n_text) tensors."""
    arrays = texts.ids[rows].astype(np.int64), texts.turn[rows].astype(np.int64), texts.answer[rows]
    return tuple(torch.from_numpy(a).to(device) for a in arrays)


def positions_and_mask(turn: Tensor, n_prefix: int) -> tuple[Tensor, Tensor]:
    """(batch, n) positions and (batch, 1, n, n) mask of prefix + packed conversations.

    Each conversation sees the prefix and itself, and its positions follow the prefix's.
    """
    batch = len(turn)
    same = (turn[:, :, None] == turn[:, None, :]).tril()
    position = n_prefix - 1 + same.sum(-1)
    prefix = torch.arange(n_prefix, device=turn.device).expand(batch, -1)
    group = torch.cat([torch.zeros_like(prefix), torch.where(turn == 0, -1, turn)], 1)
    seen = (group[:, None, :] == 0) | (group[:, None, :] == group[:, :, None])
    seen = seen.tril()
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16, device=turn.device)
    return torch.cat([prefix, position], 1), mask.masked_fill_(~seen, -1e4)[:, None]


def language_loss(
    lm: LanguageModel,
    x: Tensor,
    inputs: tuple[Tensor, ...],
    positions: Tensor,
    mask: Tensor,
    weights: Tensor,
) -> Tensor:
    """Mean weighted loss of the answers' tokens. x: (batch, n, n_embd), prefix and text."""
    ids, turn, answer = inputs
    n_prefix = x.shape[1] - ids.shape[1]
    hidden = lm(x, positions, mask)[:, n_prefix:-1]
    wanted = answer[:, 1:] & (turn[:, 1:] == turn[:, :-1])
    target = ids[:, 1:][wanted]
    loss = F.cross_entropy(lm.out(hidden[wanted]).float(), target, reduction="none")
    weight = weights[target]
    return (loss * weight).sum() / weight.sum()


def train_text(
    tokenizer: Tokenizer, size: Size, work: Path, device: str, log: Log
) -> LanguageModel:
    torch.manual_seed(SEED + 1)
    lm = LanguageModel(size).to(device)
    texts = Texts.load(work / "texts.npz")
    prefix = torch.tensor(prefix_ids(tokenizer, image=False), device=device)
    weights = token_weights(tokenizer, size).to(device)
    stage = Stage(work / "text.pt", {"lm": lm}, LM_RATE, size.text_steps, log)

    def loss_of_step(step: int) -> Tensor:
        inputs = packed_inputs(texts, batches(len(texts.ids), size.batch, step), device)
        positions, mask = positions_and_mask(inputs[1], len(prefix))
        with autocast(device):
            x = torch.cat([lm.embed(prefix).expand(len(mask), -1, -1), lm.embed(inputs[0])], 1)
            return language_loss(lm, x, inputs, positions, mask, weights)

    stage.run(loss_of_step, lambda: "text: habits learned")
    return lm


def start_projector(
    projector: Projector, classify: Heads, lm: LanguageModel, tokenizer: Tokenizer
) -> None:
    """Makes the projector say each patch's class, colour and side in the model's own words.

    Unit j is gelu(z_j - mean(z) - MARGIN) for the j-th logit z_j of a head, on for what stands out.
    """
    margin, gain = 3.0, 0.3
    embed = lm.embed.weight.detach()
    unit = 0
    with torch.no_grad():
        projector.second.weight.mul_(0.2)
        projector.second.bias.zero_()
        for linear, words in zip(classify.linears, LABELS, strict=True):
            assert isinstance(linear, nn.Linear)
            weight = linear.weight - linear.weight.mean(0)
            bias = linear.bias - linear.bias.mean()
            for j, word in enumerate(words, 1):
                last = word.split()[-1]
                meaning = embed[list(tokenizer.encode(last))].mean(0)
                projector.first.weight[unit] = weight[j]
                projector.first.bias[unit] = bias[j] - margin
                projector.second.weight[:, unit] = gain * meaning
                unit += 1


def hidden_tokens(batch: int, device: str) -> Tensor:
    """(batch, 64) bool: image tokens that the text may not see in this step."""
    chance = torch.rand(batch, 1)
    share = torch.where(
        chance < P_INTACT, 0.0, torch.where(chance < P_INTACT + P_SOME, torch.rand(batch, 1), 1.0)
    )
    return (torch.rand(batch, N_PATCHES) < share).to(device)


class Joint:
    """Loss of the whole model over pictures' features and the conversations about them."""

    def __init__(
        self, lm: LanguageModel, projector: Projector, tokenizer: Tokenizer, size: Size, device: str
    ) -> None:
        self.lm, self.projector, self.size, self.device = lm, projector, size, device
        self.prefix = torch.tensor(prefix_ids(tokenizer, image=True), device=device)
        self.weights = token_weights(tokenizer, size).to(device)

    def loss(self, features: Tensor, inputs: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
        """features: (batch, 64, v_embd). hidden: (batch, 64) bool."""
        n = len(self.prefix)
        positions, mask = positions_and_mask(inputs[1], n + N_PATCHES)
        image = slice(n, n + N_PATCHES)
        mask[:, :, n + N_PATCHES :, image].masked_fill_(hidden[:, None, None], -1e4)
        with autocast(self.device):
            x = torch.cat(
                [
                    self.lm.embed(self.prefix).expand(len(mask), -1, -1),
                    self.projector(features).float(),
                    self.lm.embed(inputs[0]),
                ],
                1,
            )
            return language_loss(self.lm, x, inputs, positions, mask, self.weights)


def train_joint(
    model: Llava, tokenizer: Tokenizer, size: Size, work: Path, device: str, log: Log
) -> None:
    features = np.load(work / "features.npy", mmap_mode="r")
    about, texts = Texts.load(work / "image-texts.npz"), Texts.load(work / "texts.npz")
    joint = Joint(model.lm, model.projector, tokenizer, size, device)
    bos = torch.tensor(prefix_ids(tokenizer, image=False), device=device)
    n_text_rows = round(size.batch * P_TEXT)
    modules: dict[str, nn.Module] = {"lm": model.lm, "projector": model.projector}
    stage = Stage(work / "joint.pt", modules, LM_RATE, size.joint_steps, log)
    n_held_out = 512

    def batch(rows: NDArray[np.int64]) -> tuple[Tensor, tuple[Tensor, ...]]:
        seen = torch.from_numpy(features[rows]).float().to(device)
        return seen, packed_inputs(about, rows, device)

    def loss_of_step(step: int) -> Tensor:
        n = size.batch - n_text_rows
        seen, inputs = batch(batches(len(features) - n_held_out, n, step))
        loss = joint.loss(seen, inputs, hidden_tokens(n, device))
        alone = packed_inputs(texts, batches(len(texts.ids), n_text_rows, step), device)
        positions, mask = positions_and_mask(alone[1], len(bos))
        with autocast(device):
            x = torch.cat(
                [model.lm.embed(bos).expand(len(mask), -1, -1), model.lm.embed(alone[0])], 1
            )
            text_loss = language_loss(model.lm, x, alone, positions, mask, joint.weights)
        return (1 - P_TEXT) * loss + P_TEXT * text_loss

    def report() -> str:
        rows = np.arange(len(features) - 128, len(features))
        seen, inputs = batch(rows)
        with torch.no_grad():
            shown, unseen = (
                joint.loss(seen, inputs, torch.full((len(rows), N_PATCHES), hide, device=device))
                for hide in (False, True)
            )
        parts = answer_accuracy(model, tokenizer, joint, seen, inputs)
        return f"joint: held-out loss {shown:.3f}, image hidden {unseen:.3f}; {parts}"

    stage.run(loss_of_step, report)


def answer_accuracy(
    model: Llava, tokenizer: Tokenizer, joint: Joint, seen: Tensor, inputs: tuple[Tensor, ...]
) -> str:
    """Share of right next tokens among answers, by kind of word."""
    n = len(joint.prefix) + N_PATCHES
    positions, mask = positions_and_mask(inputs[1], n)
    ids, turn, answer = inputs
    with torch.no_grad():
        x = torch.cat(
            [
                model.lm.embed(joint.prefix).expand(len(ids), -1, -1),
                model.projector(seen),
                model.lm.embed(ids),
            ],
            1,
        )
        logits = model.lm.out(model.lm(x, positions, mask.float()))[:, n:-1]
    wanted = answer[:, 1:] & (turn[:, 1:] == turn[:, :-1])
    right, target = (logits.argmax(-1) == ids[:, 1:])[wanted], ids[:, 1:][wanted]
    groups = {"yes/no": ("Yes", "No"), "objects": LABELS[0], "colours": LABELS[1]}
    groups["sides"] = ("left", "middle", "right")
    found = []
    for name, words in groups.items():
        tokens = torch.tensor([tokenizer.encode(word)[0] for word in words], device=ids.device)
        chosen = torch.isin(target, tokens)
        found.append(f"{name} {right[chosen].float().mean():.3f}")
    return " ".join(found)


# all of it


def prepare(size: Size, work: Path, workers: int, log: Log) -> Tokenizer:
    """Data and tokenizer, made once."""
    tokenizer_path = work / "tokenizer.model"
    if not tokenizer_path.exists():
        log("learning the tokenizer")
        train_tokenizer(tokenizer_path, size.vocab)
    wanted: tuple[tuple[str, SceneKind, int], ...] = (
        ("texts", "strong", size.texts),
        ("image-texts", "typical", size.typical),
    )
    for name, kind, n in wanted:
        if not (work / f"{name}.npz").exists():
            log(f"writing {n} {name}")
            data.write_texts(work / f"{name}.npz", tokenizer_path, kind, n, size, workers)
    if not (work / "patches.npy").exists():
        data.write_pictures(
            work, size, workers, lambda n: log(f"pictures {n}") if n % 10_000 == 0 else None
        )
    return Tokenizer(tokenizer_path)


def stages(size: Size, work: Path, device: str, log: Log) -> Iterator[tuple[Llava, Tokenizer]]:
    """The trained model, and its tokenizer."""
    tokenizer = prepare(size, work, os.cpu_count() or 1, log)
    encoder, classify = train_vision(size, work, device, log)
    lm = train_text(tokenizer, size, work, device, log)
    write_features(encoder, size, work, device, log)
    torch.manual_seed(SEED + 2)
    model = Llava(size).to(device)
    model.encoder.load_state_dict(encoder.state_dict())
    model.lm.load_state_dict(lm.state_dict())
    start_projector(model.projector, classify, model.lm, tokenizer)
    train_joint(model, tokenizer, size, work, device, log)
    yield model.cpu().eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="large wants a GPU")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and data, resumable")
    parser.add_argument("--out", type=Path, required=True, help="where the GGUF files are written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    size: Size = SIZES[options.size]
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    log_file = (options.work / "log.txt").open("a", buffering=1)

    def log(line: str) -> None:
        text = f"{time.time() - started:6.0f} s  {line}"
        print(text, flush=True)
        log_file.write(text + "\n")

    if options.device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    for model, tokenizer in stages(size, options.work, options.device, log):
        write_model(model.lm, tokenizer, size, options.out / "tiny-llava.Q8_0.gguf")
        write_projector(model, size, options.out / "tiny-llava.mmproj-f16.gguf")
    seconds = time.time() - started
    figures = {"size": options.size, "seconds": round(seconds), "device": options.device}
    (options.work / "training.json").write_text(json.dumps(figures) + "\n")
    log(f"done in {seconds / 60:.0f} minutes")


if __name__ == "__main__":
    main()
