"""The columns of the table: what is compared, and how far apart it may be."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmg_gguf import BackendError, GuidedVLM
from cmg_gguf.engine.steps import AUTO, EXACT, Strategy
from cmg_gguf.guidance import PLAIN
from cmg_gguf.prompt.segments import ImageSegment, Prompt
from judge_suite.checkpoint import Floats, Pixels
from judge_suite.family import Family, pictures
from judge_suite.product import (
    answer,
    best,
    embeddings,
    encoded,
    masked_layers,
    masking,
    opened,
)
from judge_suite.reference import Judge

LAZY = Strategy(waiting="always", fork=True)
N_SEEDS = 20
"""Pictures that are tried until a choice of tokens is clear: the last chosen is ahead of the first
that is not by a share of it that is larger than what logits may differ by."""


@dataclass(frozen=True)
class Cell:
    """One number of the table, and whether it passes."""

    shown: str
    passed: bool


@dataclass
class Case:
    """One family, both sides at hand. tokens: the product's own plain answer to the first question,
    which every check forces."""

    family: Family
    judge: Judge
    vlm: GuidedVLM
    files: tuple[Path, Path]
    images: list[Pixels]
    settings: dict[str, Any]
    tokens: list[int] = field(default_factory=list)

    def prompt(self, text: str, images: Sequence[Pixels]) -> Prompt:
        return encoded(self.vlm, text, images)

    def ids(self, prompt: Prompt, images: Sequence[Pixels]) -> tuple[list[int], NDArray[np.bool_]]:
        """The prompt as transformers is given it, and which of it are places of a picture."""
        pieces = [s for s in prompt.segments if isinstance(s, ImageSegment)]
        a_picture = len(pieces) // max(1, len(images))
        ids: list[int] = []
        for segment in prompt.segments:
            if not isinstance(segment, ImageSegment):
                ids += segment.tokens.tolist()
            elif self.family.image_ids is None:
                ids += [self.judge.image_token] * segment.n_tokens
            else:
                image = images[pieces.index(segment) // a_picture]
                ids += self.family.image_ids(self.judge.model, segment.n_tokens, image)
        return ids, prompt.is_image

    def judged(
        self, prompt: Prompt, images: list[Pixels], tokens: Sequence[int], *, ratio: float = 0.0
    ) -> tuple[Floats, Floats | None]:
        """transformers' logits behind the same prompt; ratio 0 = the original branch alone."""
        ids, is_image = self.ids(prompt, images)
        n = len(ids)
        generated = np.zeros(len(tokens), bool)
        inside = np.append(prompt.in_picture, generated)
        behind = np.arange(len(inside)) >= int(is_image.argmax())
        return self.judge.logits(
            [*ids, *tokens],
            np.append(is_image, generated),
            self.family.inputs(self.judge.model, images),
            first=n - 1,
            layers=masked_layers(self.vlm.model.n_layer) if ratio else (),
            masked=np.flatnonzero(behind & ~inside).tolist(),
            ratio=ratio,
        )

    def rows_of_pictures(self, prompt: Prompt, images: list[Pixels]) -> Floats:
        """Our embeddings of what transformers takes for image tokens: not of breaks in a row."""
        ids, is_image = self.ids(prompt, images)
        return embeddings(prompt)[np.array(ids)[is_image] == self.judge.image_token]


def picture(case: Case) -> tuple[Cell, Cell]:
    """Embeddings against transformers' image encoder: largest difference, mean cosine."""
    images = case.images[:1]
    prompt = case.prompt(case.family.questions[0], images)
    case.judge.ours = None
    case.judged(prompt, images, [])
    ours, theirs = case.rows_of_pictures(prompt, images), case.judge.seen
    if theirs is None or ours.shape != theirs.shape:
        raise ValueError(f"{ours.shape} and {None if theirs is None else theirs.shape}")
    error = float(np.abs(ours - theirs).max())
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosine = float(np.mean((ours * theirs).sum(1) / norms))
    passed = error < case.family.limit
    return Cell(f"{error:.2g} of {theirs.std():.2g}", passed), Cell(f"{cosine:.7f}", passed)


def plain(case: Case) -> Cell:
    """Plain decoding on our embeddings, in logits; and the same greedy answer."""
    images = case.images[:1]
    prompt = case.prompt(case.family.questions[0], images)
    case.tokens, ours, _, _ = answer(case.vlm, prompt, PLAIN)
    case.judge.ours = case.rows_of_pictures(prompt, images)
    theirs, _ = case.judged(prompt, images, case.tokens)
    same = best(case.vlm, theirs)[:-1].tolist() == case.tokens
    error = _gap(ours, theirs)
    return Cell(
        f"{error:.1g}" + ("" if same else " tokens differ"), error < case.family.logits and same
    )


def degraded(case: Case, ratio: float, *, n_pictures: int = 1) -> Cell:
    """Both branches with a share of the image tokens masked, in logits.

    On pictures of which no choice hangs by a hair: there, float32 may choose otherwise. The first
    that are clear, or the clearest of N_SEEDS.
    """
    text = case.family.questions[0] if n_pictures == 1 else case.family.pair
    clearest, limit = -1.0, case.family.logits
    for seed in range(N_SEEDS):
        images = pictures(case.family, seed)[:n_pictures]
        prompt = case.prompt(text, images)
        case.judge.ours = case.rows_of_pictures(prompt, images)
        original, hidden = case.judged(prompt, images, case.tokens, ratio=ratio)
        if case.judge.narrowest > clearest:
            clearest, best_prompt, verdict = case.judge.narrowest, prompt, (original, hidden)
        if clearest > limit:
            break
    original, hidden = verdict
    _, l_o, l_d, _ = answer(case.vlm, best_prompt, masking(ratio), forced=case.tokens)
    if l_d is None or hidden is None:
        raise ValueError("no degraded branch")
    error = max(_gap(l_o, original), _gap(l_d, hidden))
    effect = _gap(original, hidden)
    return Cell(f"{error:.1g} ({effect:.1g})", error < limit and effect > max(0.01, 10 * limit))


def strategies(case: Case) -> Cell:
    """Every way of decoding a step against the plainest, in logits."""
    prompt = case.prompt(case.family.questions[0], case.images[:1])
    error = 0.0
    for ratio in (1.0, 0.5):
        guidance = masking(ratio)
        _, l_o, l_d, _ = answer(case.vlm, prompt, guidance, forced=case.tokens)
        for strategy in (EXACT, LAZY, AUTO):
            for late in (False, True):
                _, o, d, _ = answer(
                    case.vlm, prompt, guidance, forced=case.tokens, strategy=strategy, late=late
                )
                if l_d is None or d is None:
                    raise ValueError("no degraded branch")
                error = max(error, _gap(l_o, o), _gap(l_d[-1:] if late else l_d, d))
    return Cell(f"{error:.1g}", error < case.family.logits)


def reuse(case: Case) -> Cell:
    """A second question about the picture, on kept rows and without, in logits."""
    error, n_kept = 0.0, 0
    images = case.images[:1]
    with opened(*case.files, **case.settings, prefix_cells=None) as warm:
        first = encoded(warm, case.family.questions[0], images)
        second = encoded(warm, case.family.questions[1], images)
        for guidance in (PLAIN, masking(1.0), masking(0.5)):
            warm.forget()
            answer(warm, first, guidance, n_steps=2)
            _, o, d, n_kept = answer(warm, second, guidance, forced=case.tokens)
            _, l_o, l_d, _ = answer(case.vlm, second, guidance, forced=case.tokens)
            error = max(error, _gap(l_o, o))
            if l_d is not None and d is not None:
                error = max(error, _gap(l_d, d))
    return Cell(f"{error:.1g} ({n_kept} rows)", error < case.family.logits and n_kept > 0)


def chat(case: Case) -> Cell:
    """Three turns with two pictures through the chat template: kept rows change no token."""
    same = 0
    with (
        opened(*case.files, **case.settings, prefix_cells=None, strategy="exact") as warm,
        opened(*case.files, **case.settings, strategy="exact") as cold,
    ):
        messages: list[dict[str, Any]] = []
        turns = (("What is it?", case.images[0]), ("Red?", None), ("And this?", case.images[1]))
        for question, image in turns:
            content: list[dict[str, Any]] = [{"type": "text", "text": question}]
            if image is not None:
                content.insert(0, {"type": "image", "image": image})
            messages.append({"role": "user", "content": content})
            a, b = (
                vlm.generate(messages, guidance=masking(0.5), max_tokens=8) for vlm in (warm, cold)
            )
            same += [t.id for t in a.tokens] == [t.id for t in b.tokens]
            messages.append({"role": "assistant", "content": "It is there."})
    return Cell(f"{same} of 3", same == 3)


def openings(case: Case, n: int) -> Cell:
    """How often, of n, the model sees what transformers does, opened on memory that held NaN."""
    images = case.images[:1]
    case.judge.ours = None
    case.judged(case.prompt(case.family.questions[0], images), images, [])
    theirs, n_right = case.judge.seen, 0
    if theirs is None:
        raise ValueError("transformers' encoder was not asked")
    for _ in range(n):
        _leave_nan_behind()
        with opened(*case.files, **case.settings) as vlm:
            try:
                prompt = encoded(vlm, case.family.questions[0], images)
            except BackendError:  # what it gave is not finite
                continue
            ours = case.rows_of_pictures(prompt, images)
        n_right += _gap(ours, theirs) < case.family.limit
    return Cell(f"{n_right} of {n}", n_right == n)


def _leave_nan_behind() -> None:
    """Fills memory that is free again, of many sizes, with NaN."""
    blocks = [np.full(1 << power, np.nan, np.float32) for power in range(8, 21) for _ in range(4)]
    del blocks


Check = Callable[[Case], Cell | tuple[Cell, Cell]]
CHECKS: dict[str, Check] = {
    "picture": picture,
    "plain": plain,
    "all masked": lambda case: degraded(case, 1.0),
    "some masked": lambda case: degraded(case, case.family.share),
    "two pictures": lambda case: degraded(case, case.family.share, n_pictures=2),
    "strategies": strategies,
    "reuse": reuse,
    "chat": chat,
}


def run(case: Case, checks: Mapping[str, Check]) -> dict[str, Cell]:
    """A cell for each check; one that fails to run is a failed cell that says so."""
    cells: dict[str, Cell] = {}
    for name, check in checks.items():
        try:
            found = check(case)
        except Exception as exc:
            traceback.print_exc()
            found = Cell(f"{type(exc).__name__}", False)
        if isinstance(found, tuple):
            cells[name], cells["cosine"] = found
        else:
            cells[name] = found
    return cells


def _gap(a: Floats, b: Floats) -> float:
    """Largest difference; NaN counts as no agreement at all."""
    difference = np.abs(a - b[..., : a.shape[-1]])
    return float(np.where(np.isnan(difference), np.inf, difference).max())
