"""Policies: which tokens and layers are picked, and what settings are allowed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import reference
from reference import LayerEvidence

from cmg_gguf import _core
from cmg_gguf.engine.rows import core_policy
from cmg_gguf.errors import CMGError, GuidanceError
from cmg_gguf.guidance import (
    MAX_ALPHA,
    AttentionMass,
    CumulativeMass,
    Guidance,
    LayerRange,
    LayerSet,
    LowestCosine,
    MeanStd,
    TopRatio,
    layers_by_cosine,
    layers_by_mass,
    static_layers,
)

TOKEN_POLICIES: list[tuple[Any, Callable[..., reference.Mask]]] = [
    *(
        (TopRatio(r), partial(reference.top_ratio, ratio=r))
        for r in (0.0, 0.001, 0.25, 0.3, 0.5, 0.75, 1.0)
    ),
    *(
        (MeanStd(x), partial(reference.mean_std, lam=x))
        for x in (-10.0, -1.0, 0.0, 0.5, 1.0, 3.0, 10.0)
    ),
    *(
        (CumulativeMass(m), partial(reference.cumulative_mass, mass=m))
        for m in (0.0, 0.01, 0.3, 0.5, 0.9, 1.0)
    ),
]


def influences() -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Random vectors of all lengths from 0 to 40 and some longer; with ties, zeros, one-hots."""
    rng = np.random.default_rng(0)
    vectors = []
    for n in [*range(41), 64, 576, 577]:
        attention = rng.dirichlet(np.full(n, 0.3)) if n else np.zeros(0)
        vectors += [
            attention,
            rng.integers(0, 4, n) / 8,  # ties, and exact in binary
            np.where(rng.random(n) < 0.7, 0.0, attention),
            np.zeros(n),
            np.full(n, 0.1),
            np.eye(1, n, n // 2)[0] if n else np.zeros(0),
            attention * 1e-30,
        ]
    return [vector.astype(np.float32) for vector in vectors]


@pytest.mark.parametrize(("policy", "judge"), TOKEN_POLICIES, ids=lambda p: str(p)[:30])
def test_token_policies_pick_what_the_judge_picks(
    policy: Any, judge: Callable[..., reference.Mask]
) -> None:
    for influence in influences():
        picked = _core.select_tokens(core_policy(policy), influence)
        assert picked.dtype == np.int32
        expected = np.flatnonzero(judge(influence.astype(np.float64)))
        assert picked.tolist() == expected.tolist(), (len(influence), influence)


def test_token_policies_by_hand() -> None:
    influence = np.array([0.1, 0.4, 0.4, 0.05, 0.05], np.float32)
    for policy, picked in (
        (TopRatio(0.2), [1]),
        (TopRatio(0.5), [0, 1, 2]),
        (TopRatio(0.01), [1]),
        (MeanStd(0.0), [1, 2]),
        (CumulativeMass(0.4), [1]),
        (CumulativeMass(0.45), [1, 2]),
        (CumulativeMass(0.95), [0, 1, 2, 3]),
    ):
        assert _core.select_tokens(core_policy(policy), influence).tolist() == picked


def test_an_influence_is_left_as_it_was() -> None:
    influence = np.array([0.3, 0.1, 0.6], np.float32)
    for policy, _ in TOKEN_POLICIES:
        _core.select_tokens(core_policy(policy), influence)
    assert influence.tolist() == np.array([0.3, 0.1, 0.6], np.float32).tolist()


# --- layers -------------------------------------------------------------------------------------


def judged(policy: Callable[..., reference.Mask], values: Any) -> tuple[int, ...]:
    evidence = LayerEvidence(np.asarray(values, np.float64), np.asarray(values, np.float64))
    return tuple(np.flatnonzero(policy(evidence)).tolist())


def layer_values() -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    rng = np.random.default_rng(1)
    shapes = [rng.random(n) for n in range(1, 41)]
    return shapes + [rng.integers(1, 4, n) / 4 for n in range(1, 41)]


@pytest.mark.parametrize("share", [1e-9, 0.1, 0.25, 0.5, 0.7, 0.99])
def test_layers_by_mass_are_the_judges(share: float) -> None:
    for mass in layer_values():
        expected = judged(partial(reference.attention_mass, gamma=share), mass)
        assert layers_by_mass(share, mass) == expected


@pytest.mark.parametrize("share", [1e-9, 0.1, 0.25, 0.5, 0.7, 1.0])
def test_layers_by_cosine_are_the_judges(share: float) -> None:
    for cosine in layer_values():
        expected = judged(partial(reference.lowest_cosine, share=share), cosine)
        assert layers_by_cosine(share, cosine) == expected


def test_a_full_share_of_mass_is_every_layer() -> None:
    for mass in layer_values():
        assert layers_by_mass(1.0, mass) == tuple(range(len(mass)))


@pytest.mark.parametrize("n_layer", [1, 2, 3, 6, 7, 32, 33])
def test_layer_ranges_are_the_judges(n_layer: int) -> None:
    rng = np.random.default_rng(n_layer)
    bounds = np.concatenate([np.arange(n_layer + 1) / n_layer, rng.random(8), [1 / 3, 0.5]])
    for start in bounds:
        for stop in bounds[bounds > start]:
            policy = LayerRange(float(start), float(stop))
            judge = partial(reference.layer_range, start=policy.start, stop=policy.stop)
            expected = judged(judge, np.zeros(n_layer))
            if expected:
                assert static_layers(policy, n_layer) == expected
            else:
                with pytest.raises(GuidanceError, match=f"hold no layer.*has {n_layer}"):
                    static_layers(policy, n_layer)


def test_explicit_layers_are_sorted_and_belong_to_the_model() -> None:
    assert static_layers(LayerSet((5, 0, 5, 3)), 6) == (0, 3, 5)
    assert static_layers(LayerSet(()), 6) == ()
    with pytest.raises(GuidanceError, match=r"layer 40 .* 32 layers \(0-31\)"):
        static_layers(LayerSet((3, 40)), 32)


# --- settings -----------------------------------------------------------------------------------

OUT_OF_RANGE: list[tuple[Callable[[Any], object], str, Any, str]] = [
    *((lambda x: Guidance(alpha=x), "alpha", x, "0 to 100") for x in (-0.1, 100.5)),
    *((lambda x: Guidance(beta=x), "beta", x, "0 to 1") for x in (-0.1, 1.5)),
    *((TopRatio, "ratio", x, "0 to 1") for x in (-0.1, 1.5)),
    *((MeanStd, "factor", x, "-10 to 10") for x in (-10.5, 11.0)),
    *((CumulativeMass, "mass", x, "0 to 1") for x in (-0.1, 1.5)),
    *((AttentionMass, "share", x, "to 1") for x in (0.0, -1.0, 1.5)),
    *((LowestCosine, "share", x, "to 1") for x in (0.0, -1.0, 1.5)),
    *((lambda x: LayerRange(start=x), "start", x, "0 to 1") for x in (-0.1, 1.5)),
    *((lambda x: LayerRange(stop=x), "stop", x, "0 to 1") for x in (-0.1, 1.5)),
]


def named(parameter: object) -> str:
    return parameter if isinstance(parameter, str) else ""


@pytest.mark.parametrize(("make", "name", "value", "limit"), OUT_OF_RANGE, ids=named)
def test_a_value_out_of_range_is_named_with_its_limit(
    make: Callable[[Any], object], name: str, value: Any, limit: str
) -> None:
    for bad in (value, math.copysign(math.inf, value), math.nan, "0.5", None):
        with pytest.raises(GuidanceError) as info:
            make(bad)
        message = str(info.value)
        assert f"{name}={bad!r}" in message
        assert limit in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scope": "image"}, ["scope='image'", "decode", "question", "text", "all"]),
        ({"refresh": "never"}, ["refresh='never'", "prompt", "step"]),
        ({"tokens": 0.5}, ["tokens=0.5", "TopRatio", "MeanStd", "CumulativeMass"]),
        ({"layers": 3}, ["layers=3", "LayerRange", "AttentionMass", "LowestCosine"]),
        ({"layers": "1,2"}, ["layers='1,2'", "layer numbers"]),
        ({"layers": [2, -1]}, ["layer -1", "from 0"]),
        ({"layers": [2.5]}, ["layer 2.5", "from 0"]),
        ({"layers": [1, None]}, ["layer None", "from 0"]),
        ({"layers": [1, "2"]}, ["layer '2'", "from 0"]),
        ({"layers": [[1], [2]]}, ["layer [1]", "from 0"]),
    ],
    ids=str,
)
def test_a_setting_of_another_kind_is_named_with_the_remedy(
    settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(GuidanceError) as info:
        Guidance(**settings)
    for word in words:
        assert word in str(info.value)


def test_a_range_ends_above_its_start() -> None:
    for start, stop in ((0.5, 0.5), (0.75, 0.25)):
        with pytest.raises(GuidanceError, match=f"start={start:g} .* stop={stop:g}"):
            LayerRange(start, stop)


def test_the_ends_of_every_range_are_allowed() -> None:
    for alpha in (0, 0.0, MAX_ALPHA):
        for beta in (0, 1, 0.0, 1.0):
            Guidance(alpha=alpha, beta=beta)
    for policy in (TopRatio, CumulativeMass):
        assert policy(0.0) != policy(1.0)
    assert MeanStd(-10.0) != MeanStd(10.0)
    for share in (AttentionMass, LowestCosine):
        assert share(1.0) == share(1)
    assert LayerRange(0.0, 1.0) == LayerRange(0, 1)


def test_the_callers_mistake_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="alpha"):
        Guidance(alpha=-1.0)
    assert issubclass(GuidanceError, CMGError)


def test_settings_are_values() -> None:
    one = Guidance(alpha=2.0, tokens=CumulativeMass(0.8), layers=[3, 1, 1], scope="all")
    other = Guidance(alpha=2.0, tokens=CumulativeMass(0.8), layers=(1, 3), scope="all")
    assert one == other
    assert hash(one) == hash(other)
    assert one.layers == LayerSet((1, 3))
    assert one != Guidance(alpha=2.0, tokens=CumulativeMass(0.8), layers=[1, 3], scope="text")
    assert Guidance(layers=range(2, 4)) == Guidance(layers=np.array([3, 2]))
    assert len({Guidance(), Guidance(), one, other}) == 2


@pytest.mark.parametrize(
    "value",
    [
        Guidance(),
        TopRatio(),
        MeanStd(),
        CumulativeMass(),
        LayerSet((1,)),
        LayerRange(),
        AttentionMass(),
        LowestCosine(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_settings_are_frozen(value: Any) -> None:
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, 0.3)
    assert hash(value) == hash(dataclasses.replace(value))


def test_guidance_is_of_keywords_only() -> None:
    with pytest.raises(TypeError):
        Guidance(1.0)  # type: ignore[call-arg]


def test_only_a_positive_alpha_needs_a_second_branch() -> None:
    assert Guidance().contrasts
    assert not Guidance(alpha=0.0).contrasts
