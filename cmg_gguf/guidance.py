"""What guidance does: strength, which image tokens are masked, in which layers, for which rows.

Values only: frozen, validated once, compared by value. Nothing here touches a model.

    Guidance()                                        # the defaults
    Guidance(alpha=2.0, layers=LayerRange(0.5, 1.0))  # stronger, upper half only
    Guidance(tokens=CumulativeMass(0.8), layers=[10, 11, 12])
    Guidance(alpha=0.0, beta=0.0)                     # plain decoding
    Guidance(alpha=2.0, gate=Disagreement())          # only as far as the branches disagree

`cmg_gguf.settings` keeps them in files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from cmg_gguf.errors import GuidanceError

Scope = Literal["decode", "question", "text", "all"]
Refresh = Literal["prompt", "step"]
States = Literal["read", "unread"]

MAX_ALPHA = 100.0


def _take_number(settings: object, name: str, low: float, high: float, meaning: str) -> None:
    """Checks the number of that name, and makes it a float: 1, or a NumPy number, is one too."""
    value: float = getattr(settings, name)
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high:
        raise GuidanceError(f"{name}={value!r} is out of range: {meaning} from {low:g} to {high:g}")
    object.__setattr__(settings, name, float(value))


@dataclass(frozen=True)
class TopRatio:
    """The `round(ratio * n)` most attended of the n image tokens, at least one if `ratio` > 0.

    ratio: 0 (none) to 1 (all).
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        _take_number(self, "ratio", 0.0, 1.0, "a share of the image tokens")


@dataclass(frozen=True)
class MeanStd:
    """Image tokens with influence above mean + factor * std (population) of all image tokens'.

    factor: -10 to 10; larger masks fewer.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        _take_number(self, "factor", -10.0, 10.0, "a number of standard deviations")


@dataclass(frozen=True)
class CumulativeMass:
    """The fewest image tokens that together hold a share `mass` of the attention on the image.

    mass: 0 (none) to 1 (all that are attended at all).
    """

    mass: float = 0.5

    def __post_init__(self) -> None:
        _take_number(self, "mass", 0.0, 1.0, "a share of the attention on image tokens")


@dataclass(frozen=True)
class LayerSet:
    """These layers, counted from 0."""

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Iterable):
            raise GuidanceError(
                f"layers={self.layers!r} is no list; write LayerSet(({self.layers},))"
            )
        for il in self.layers:
            if not isinstance(il, Integral) or isinstance(il, bool) or il < 0:
                raise GuidanceError(f"layer {il!r} is out of range: layers are counted from 0")
        object.__setattr__(self, "layers", tuple(sorted({int(il) for il in self.layers})))


@dataclass(frozen=True)
class LayerRange:
    """Layers round(start * L) to round(stop * L) - 1 of a model with L layers, if they attend.

    start, stop: fractions of the depth, 0 <= start < stop <= 1.
    """

    start: float = 1 / 3
    stop: float = 1.0

    def __post_init__(self) -> None:
        _take_number(self, "start", 0.0, 1.0, "a fraction of the depth")
        _take_number(self, "stop", 0.0, 1.0, "a fraction of the depth")
        if self.start >= self.stop:
            raise GuidanceError(f"start={self.start:g} must be below stop={self.stop:g}")


@dataclass(frozen=True)
class AttentionMass:
    """The layers that look at the image most, by the last prompt row.

    Layers by falling attention on image tokens until they hold a share `share` of the attention
    that all layers together spend on them.

    share: above 0, to 1 (all layers).
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        _take_number(self, "share", 1e-9, 1.0, "a share of all layers' image attention")


@dataclass(frozen=True)
class LowestCosine:
    """The round(share * L) of the L layers that attend, at least one, that turn the hidden state
    most.

    Lowest cosine similarity between the residual stream before and after the layer, at the last
    prompt row of the original branch.

    share: above 0, to 1 (all layers).
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        _take_number(self, "share", 1e-9, 1.0, "a share of the layers")


@dataclass(frozen=True)
class Disagreement:
    """Guidance as strong as the branches disagree: alpha * min(1, factor * JSD(p_o, p_d) / ln 2).

    JSD is the Jensen-Shannon divergence in nats of the branches' distributions over the whole
    vocabulary, 0 to ln 2. A token for which the image hardly matters is then drawn as without
    guidance; from JSD = ln 2 / factor on, alpha counts in full.

    factor: above 0, to 1000; larger steps back less.
    """

    factor: float = 3.0

    def __post_init__(self) -> None:
        _take_number(self, "factor", 1e-9, 1000.0, "a slope")


TokenPolicy = TopRatio | MeanStd | CumulativeMass
LayerPolicy = LayerSet | LayerRange | AttentionMass | LowestCosine


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Settings of Cross-Modal Guidance for one answer.

        score = l_o + alpha * (l_o - l_d)   over tokens with l_o >= max(l_o) + log(beta)

    l_o are the model's logits, l_d those of the same model whose attention to its most influential
    image tokens is masked (arXiv 2510.10466; its settings are not public, these are ours).

    alpha: strength, 0 (none) to 100. beta: plausibility cut, 0 (none) to 1 (only the top token).
    tokens: which image tokens are masked, layer by layer. layers: a policy, or layer numbers.
    scope: rows that are masked: "decode" = the last prompt row and generated ones; "question" =
    every row behind the last image; "text" = every text row behind the first image token; "all" =
    image rows too (they keep sight of themselves). What a model writes between the tiles of one
    image belongs to it. With one image "question" is "text"; with several it leaves all of them,
    and what was said between them, to both branches.
    refresh: "prompt" = tokens chosen once, from the last prompt row; "step" = anew for every row,
    from that row's own attention. Dynamic layers are always chosen once.
    states: of a model with recurrent layers, what these hold behind a picture in the degraded
    branch: "read" = what they read of it; "unread" = what they held before it. What masked rows
    read of the question they keep, so "unread" goes with the scopes "text" and "all".

    The defaults are argued, not tuned: alpha and beta are those of the closest published relatives
    (VCD), two ablations of related methods found masking from a third of the depth upward best,
    and with scope "decode" a one-word answer hardly changes, for the question has already read the
    image. Tune them for your model. alpha=0, beta=0 is plain decoding at plain speed.

    Raises GuidanceError for anything out of range.
    """

    alpha: float = 1.0
    beta: float = 0.1
    tokens: TokenPolicy = field(default_factory=TopRatio)
    layers: LayerPolicy | Iterable[int] = field(default_factory=LayerRange)
    scope: Scope = "text"
    refresh: Refresh = "step"
    gate: Disagreement | None = None
    states: States = "read"

    def __post_init__(self) -> None:
        _take_number(self, "alpha", 0.0, MAX_ALPHA, "a strength")
        _take_number(self, "beta", 0.0, 1.0, "a share of the top token's probability")
        if not isinstance(self.tokens, TokenPolicy):
            raise GuidanceError(
                f"tokens={self.tokens!r} is no token policy: use TopRatio, MeanStd or "
                "CumulativeMass"
            )
        if not isinstance(self.layers, LayerPolicy):
            object.__setattr__(self, "layers", _layer_set(self.layers))
        if not isinstance(self.gate, Disagreement | None):
            raise GuidanceError(f"gate={self.gate!r} is no gate: use Disagreement, or None")
        for name, kind in (("scope", Scope), ("refresh", Refresh), ("states", States)):
            if getattr(self, name) not in (allowed := get_args(kind)):
                raise GuidanceError(f"{name}={getattr(self, name)!r} is not one of {allowed}")
        if self.states == "unread" and self.scope not in ("text", "all"):
            raise GuidanceError(
                f'states="unread" and scope={self.scope!r} do not go together: rows that are not '
                'masked have read the picture; use scope="text" or "all"'
            )

    @property
    def contrasts(self) -> bool:
        """Whether the degraded branch can change anything: alpha > 0."""
        return self.alpha > 0


PLAIN = Guidance(alpha=0.0, beta=0.0)
"""Plain decoding: no contrast, no cut."""
BLIND = Guidance(tokens=TopRatio(1.0), layers=LayerRange(0.0, 1.0), scope="text", refresh="prompt")
"""The strongest degraded branch there is: every image token is hidden from every text row behind
the first image, in every layer that attends."""


def _layer_set(layers: object) -> LayerSet:
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise GuidanceError(
            f"layers={layers!r} is no layer policy: use layer numbers, LayerRange, AttentionMass "
            "or LowestCosine"
        )
    return LayerSet(tuple(layers))


def static_layers(
    policy: LayerSet | LayerRange, n_layer: int, attending: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Layers of an explicit policy in a model with `n_layer` layers, ascending.

    attending: those that attend, ascending; None = all. A range leaves the others out. Raises
    GuidanceError for a layer that the model does not have or that does not attend, and for a range
    that holds none.
    """
    attending = range(n_layer) if attending is None else attending
    named = ", ".join(map(str, attending))
    if isinstance(policy, LayerSet):
        for il in policy.layers:
            if il >= n_layer:
                raise GuidanceError(
                    f"layer {il} is out of range: this model has {n_layer} layers (0-{n_layer - 1})"
                )
        if others := [il for il in policy.layers if il not in attending]:
            raise GuidanceError(
                f"layers {str(others)[1:-1]} do not attend, so there is nothing to mask in them: "
                f"of this model's layers those that do are {named}"
            )
        return policy.layers
    first, last = (math.floor(x * n_layer + 0.5) for x in (policy.start, policy.stop))
    if first >= last:
        raise GuidanceError(
            f"layers from {policy.start:g} to {policy.stop:g} of the depth hold no layer: "
            f"this model has {n_layer}; widen the range"
        )
    layers = tuple(il for il in attending if first <= il < last)
    if not layers:
        raise GuidanceError(
            f"layers from {policy.start:g} to {policy.stop:g} of the depth hold none that attends: "
            f"of this model's {n_layer} those that do are {named}; widen the range"
        )
    return layers


def layers_by_mass(share: float, image_attention: npt.NDArray[np.float64]) -> tuple[int, ...]:
    """Layers of AttentionMass(share), ascending; none if no layer attends to the image.

    image_attention: (n_layer,) float64 >= 0, each layer's attention on all image tokens.
    """
    order = np.argsort(-image_attention, kind="stable")
    held = np.cumsum(image_attention[order])
    if held[-1] <= 0:
        return ()
    wanted = share * held[-1] * (1 - 1e-12)
    count = int(np.searchsorted(held, wanted)) + 1
    return tuple(sorted(int(il) for il in order[:count]))


def layers_by_cosine(
    share: float, cosines: npt.NDArray[np.float64], attending: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Layers of LowestCosine(share), ascending.

    cosines: (n_layer,) float64 in [-1, 1], residual stream before against after each layer.
    attending: the layers to choose from; None = all.
    """
    layers = np.array(range(len(cosines)) if attending is None else attending, np.intp)
    count = max(1, math.floor(share * len(layers) + 0.5))
    order = np.argsort(cosines[layers], kind="stable")
    return tuple(sorted(layers[order[:count]].tolist()))
