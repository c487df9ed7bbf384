"""Several answers by hand in one context, each row of them beside what the judge says of it.

context = open_context(tiny)
answers = [Answer(context, tiny, prompt, guidance, seq) for ...]
rows = answers[0].original(0, 3) + answers[1].degraded(1, 2)   # of parts 0 and 1
check(context, rows, [answer.part() for answer in answers])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import reference
from judge import judge_policy, prompt_rows
from plans import Row, decode, plan
from reference import F64
from support import EXACT, TOLERANCE, Counted, Tiny, logits

from cmg_gguf import _core
from cmg_gguf.engine.rows import core_policy, masked_rows
from cmg_gguf.guidance import Guidance, LayerSet
from cmg_gguf.llama.context import ContextOptions
from cmg_gguf.prompt.segments import ImageSegment, Prompt

N_CONTINUED = 12
"""Tokens behind each prompt."""
N_SEQ = 32
LARGE = replace(EXACT, n_ctx=1536)
STEADY = 5e-5
"""Relative change of influences that changes no choice; a float32 forward is off by 1e-5."""


class Decodable(NamedTuple):
    """A row of a batch, and its logits by the judge: (n_vocab,)."""

    token: int
    position: int
    row: Row
    expected: F64


class Judged(NamedTuple):
    """original, degraded: (n_rows, n_vocab). hidden: (n_layer, n_rows, n_image_tokens) bool."""

    original: F64
    degraded: F64
    hidden: reference.Mask
    influence: F64
    cosines: F64


@cache
def judged(tiny: Tiny, prompt: Prompt, guidance: Guidance) -> Judged:
    """Of every row of the prompt and of what comes behind it."""
    ref, policy = tiny.ref, judge_policy(guidance)
    rows = np.concatenate([prompt_rows(ref, prompt), ref.embed(continued(prompt))])
    behind = np.zeros(N_CONTINUED, np.bool_)
    is_image = np.append(prompt.is_image, behind)
    in_picture = np.append(prompt.in_picture, behind)
    last = prompt.n_tokens - 1
    plain = ref.forward(rows)
    influence = reference.candidate_influence(ref, plain, is_image)
    evidence = reference.layer_evidence(plain, influence, last)
    layers = policy.layers(evidence)[:, None, None]
    blocked = reference.blocked_pairs(influence, in_picture, last + 1, policy) & layers
    for seed in range(3):  # no choice may hang by a hair
        noise = 1 + STEADY * np.random.default_rng(seed).uniform(-1, 1, influence.shape)
        nearly = reference.blocked_pairs(influence * noise, in_picture, last + 1, policy) & layers
        assert (nearly == blocked).all(), "choose another picture"
    return Judged(
        plain.logits,
        ref.forward(rows, blocked).logits,
        blocked[:, :, is_image],
        influence[:, :, is_image],
        evidence.cosine,
    )


def continued(prompt: Prompt) -> list[int]:
    """The tokens behind a prompt: other ones behind another."""
    random = np.random.default_rng(prompt.n_tokens)
    return [int(token) for token in random.integers(300, 400, N_CONTINUED)]


def open_context(tiny: Tiny, options: ContextOptions = LARGE) -> Counted:
    return Counted(tiny.model, tiny.projector, options, n_seq_max=N_SEQ)


class Answer:
    """An answer to a prompt: the original branch in sequence `seq`, the degraded one in the next.

    All rows before the first masked one, `first`, are decoded and shared. The others are text; the
    one in row `t` has slot `t - first`, and so have the rows of every other answer.
    """

    def __init__(
        self, context: Counted, tiny: Tiny, prompt: Prompt, guidance: Guidance, seq: int
    ) -> None:
        assert isinstance(guidance.layers, LayerSet)
        self.layers = guidance.layers.layers
        self.judged = judged(tiny, prompt, guidance)
        self.seq = seq
        self.first = int(masked_rows(prompt, guidance.scope).argmax())
        self.n = prompt.n_tokens + N_CONTINUED
        self.n_prompt = prompt.n_tokens
        self.selections = _core.Selections(tiny.model.n_layer)
        self.selections.resize(self.n - self.first)
        self.residuals = _core.Residuals()
        self.n_original = self.n_degraded = self.first
        self._prompt, self._policy = prompt, core_policy(guidance.tokens)
        self._tokens = text_tokens(prompt)
        self._decode_shared(context)

    @property
    def n_waiting(self) -> int:
        """Rows of the degraded branch whose originals were decoded."""
        return self.n_original - self.n_degraded

    @property
    def n_left(self) -> int:
        """Rows of the original branch that are still to come."""
        return self.n - self.n_original

    def part(self, *, keep_influence: bool = False, read_residual: bool = False) -> _core.Part:
        return _core.Part(
            selections=self.selections,
            policy=self._policy,
            n_image_tokens=self._prompt.n_image_tokens,
            observe_layers=list(self.layers),
            mask_layers=list(self.layers),
            residuals=self.residuals,
            keep_influence=keep_influence,
            read_residual=read_residual,
        )

    def original(self, part: int, n: int = 1, *, notes: bool = False) -> list[Decodable]:
        """The next n rows of the original branch. notes: their residuals, for a fork."""
        slots = range(self.n_original - self.first, self.n_original - self.first + n)
        rows = [Row(self.seq, part, observe=s, residual=s if notes else -1) for s in slots]
        self.n_original += n
        return self._decodable(self.n_original - n, rows, self.judged.original)

    def degraded(self, part: int, n: int = 1, *, enters: bool = False) -> list[Decodable]:
        """The next n rows of the degraded branch. enters: with the residuals of their originals."""
        slots = range(self.n_degraded - self.first, self.n_degraded - self.first + n)
        rows = [Row(self.seq + 1, part, mask=s, residual=s if enters else -1) for s in slots]
        self.n_degraded += n
        return self._decodable(self.n_degraded - n, rows, self.judged.degraded)

    def plain(self, n: int = 1) -> list[Decodable]:
        """The next n rows of the original branch, of which nothing is known."""
        self.n_original += n
        rows = [Row(self.seq)] * n
        return self._decodable(self.n_original - n, rows, self.judged.original)

    def check_selections(self) -> None:
        """Asserts that every row decoded so far chose what the judge chooses."""
        for row in range(self.first, self.n_original):
            for il in range(self.selections.n_layer):
                chosen = self.selections.tokens(row - self.first, il)
                expected = np.flatnonzero(self.judged.hidden[il, row])
                assert chosen.tolist() == expected.tolist(), (self.seq, row, il)

    def _decodable(self, first: int, rows: list[Row], expected: F64) -> list[Decodable]:
        return [
            Decodable(int(self._tokens[first + i]), first + i, row, expected[first + i])
            for i, row in enumerate(rows)
        ]

    def _decode_shared(self, context: Counted) -> None:
        start = 0
        for segment in self._prompt.segments:
            stop = min(start + segment.n_tokens, self.first)
            if start < stop and isinstance(segment, ImageSegment):
                n_before = int(self._prompt.is_image[:start].sum())
                rows = [Row(self.seq, 0, image_token=n_before + i) for i in range(stop - start)]
                context.decode_image(segment, start, self.seq, plan(rows, self.part()))
            elif start < stop:
                tokens = self._tokens[start:stop]
                decode(context, [(t, start + i, self.seq) for i, t in enumerate(tokens)])
            start += segment.n_tokens
            context.share(self.seq, self.seq + 1, stop)
        n_images = int(self._prompt.is_image[: self.first].sum())
        context.patch.copy_image_tokens(self.seq, self.seq + 1, n_images)


def text_tokens(prompt: Prompt) -> list[int]:
    """Tokens of all rows; -1 where a row is an image."""
    tokens: list[int] = []
    for segment in prompt.segments:
        if isinstance(segment, ImageSegment):
            tokens += [-1] * segment.n_tokens
        else:
            tokens += segment.tokens.tolist()
    return tokens + continued(prompt)


def check(
    context: Counted,
    rows: Sequence[Decodable],
    parts: Sequence[_core.Part],
    fork: _core.ForkPlan | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    """Decodes the rows in one batch, and asserts that the logits of each are the judge's."""
    batch = [(r.token, r.position, r.row.seq) for r in rows]
    decode(context, batch, plan([r.row for r in rows], *parts, fork=fork))
    errors = [float(np.abs(logits(context, i) - r.expected).max()) for i, r in enumerate(rows)]
    wrong = [(rows[i].row, error) for i, error in enumerate(errors) if not error <= tolerance]
    assert not wrong


def mixed(groups: Sequence[list[Decodable]], random: np.random.Generator) -> list[Decodable]:
    """The rows of all groups in any order, those of each group in theirs."""
    whose = random.permutation([i for i, group in enumerate(groups) for _ in group])
    queues = [iter(group) for group in groups]
    return [next(queues[i]) for i in whose]
