"""The judge's verdict on guided decoding: both branches' logits, tokens, layers and masks.

verdict = judge(reference, prompt, Guidance())
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import reference
from reference import F64, Mask, Policy, Reference, Step

from cmg_gguf.guidance import (
    AttentionMass,
    CumulativeMass,
    Guidance,
    LayerRange,
    LayerSet,
    MeanStd,
    TopRatio,
)
from cmg_gguf.prompt.segments import ImageSegment, Prompt

N_STEPS = 8


class Verdict(NamedTuple):
    """What guided decoding must give, by the judge.

    `masked`: for each step and each layer of `layers`, the image tokens masked for its row.
    """

    steps: list[Step]
    layers: tuple[int, ...]
    masked: list[list[list[int]]]

    @property
    def tokens(self) -> list[int]:
        return [step.token for step in self.steps]

    @property
    def gaps(self) -> F64:
        """(n_steps,): largest difference between the two branches' logits."""
        return np.array([np.abs(s.original - s.degraded).max() for s in self.steps])


def judge(ref: Reference, prompt: Prompt, guidance: Guidance, n_steps: int = N_STEPS) -> Verdict:
    """The judge's own greedy guided decoding after `prompt`."""
    policy, rows, is_image = judge_policy(guidance), prompt_rows(ref, prompt), prompt.is_image
    in_picture = prompt.in_picture
    steps = reference.guided(ref, rows, is_image, n_steps, policy, in_picture=in_picture)
    last = len(rows) - 1
    rows = np.concatenate([rows, ref.embed([step.token for step in steps[:-1]])])
    generated = np.zeros(n_steps - 1, np.bool_)
    is_image, in_picture = np.append(is_image, generated), np.append(in_picture, generated)
    forward = ref.forward(rows)
    influence = reference.candidate_influence(ref, forward, is_image)
    layers = np.flatnonzero(policy.layers(reference.layer_evidence(forward, influence, last)))
    blocked = reference.blocked_pairs(influence, in_picture, last + 1, policy)[:, :, is_image]
    masked = [
        [np.flatnonzero(blocked[il, last + i]).tolist() for il in layers] for i in range(n_steps)
    ]
    return Verdict(steps, tuple(layers.tolist()), masked)


def judge_policy(guidance: Guidance) -> Policy:
    """The same settings in the judge's words."""
    return Policy(
        tokens=_token_policy(guidance),
        layers=_layer_policy(guidance),
        scope=guidance.scope,
        refresh=guidance.refresh,
        alpha=guidance.alpha,
        beta=guidance.beta,
        states=guidance.states,
    )


def prompt_rows(ref: Reference, prompt: Prompt) -> F64:
    """(n_tokens, n_embd): the prompt as the judge takes it."""
    rows = []
    for segment in prompt.segments:
        if isinstance(segment, ImageSegment):
            assert segment.embd is not None
            rows.append(segment.embd.astype(np.float64))
        else:
            rows.append(ref.embed(segment.tokens.tolist()))
    return np.concatenate(rows)


def _token_policy(guidance: Guidance) -> Callable[[F64], Mask]:
    tokens = guidance.tokens
    if isinstance(tokens, TopRatio):
        return partial(reference.top_ratio, ratio=tokens.ratio)
    if isinstance(tokens, MeanStd):
        return partial(reference.mean_std, lam=tokens.factor)
    assert isinstance(tokens, CumulativeMass)
    return partial(reference.cumulative_mass, mass=tokens.mass)


def _layer_policy(guidance: Guidance) -> Callable[[reference.LayerEvidence], Mask]:
    layers = guidance.layers
    if isinstance(layers, LayerSet):
        return partial(reference.explicit_layers, layers=layers.layers)
    if isinstance(layers, LayerRange):
        return partial(reference.layer_range, start=layers.start, stop=layers.stop)
    if isinstance(layers, AttentionMass):
        return partial(reference.attention_mass, gamma=layers.share)
    return partial(reference.lowest_cosine, share=cast(Any, layers).share)
