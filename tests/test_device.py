"""What is of a device alone: both branches against the CPU's, and forks over what is copied.

On a machine without an accelerator the device is the CPU, and the same must hold.
CMG_TEST_FLASH=0 leaves flash attention out, for drivers that crash in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from matrix import REFRESHES, WIDE
from offload import APART, FLASH, N_GPU_LAYERS, ON_DEVICE, TOLERANCE
from prompts import ONE_IMAGE, PICTURE
from reference import F64
from support import EXACT, Pairing, Rig, Tiny
from tiny_llava import TinyConfig, TinyPair

from cmg_gguf.engine.fork import Forking, survey
from cmg_gguf.engine.steps import EAGER, Strategy
from cmg_gguf.guidance import Guidance, Refresh, TopRatio
from cmg_gguf.llama.context import ContextOptions

N_STEPS = 6
WAYS: dict[str, tuple[Pairing, Strategy]] = {
    "eager": ("pair", EAGER),
    "fork": ("pair", Strategy(fork=True)),
    "lazy": ("pair", Strategy(waiting="always", fork=True)),
    "contexts": ("contexts", EAGER),
}
CACHES: dict[str, tuple[ContextOptions, float]] = {
    "f32": (EXACT, TOLERANCE),
    "f16": (replace(EXACT, flash_attn=FLASH, type_k="f16", type_v="f16"), 0.1),
    "q8_0": (replace(EXACT, flash_attn=FLASH, type_k="q8_0", type_v="f16"), 0.3),
}
"""Options, and how far both branches' logits may be from the CPU's with the same ones."""


class Opened:
    """One pair of files, on the device and on the CPU."""

    def __init__(self, pair: TinyPair) -> None:
        self._pair = pair
        self.on = functools.cache(lambda n_gpu_layers: Tiny(pair, n_gpu_layers))
        self.on_cpu = functools.cache(self._on_cpu)

    def _on_cpu(self, cache: str, guidance: Guidance) -> F64:
        return decoded(Rig(self.on(0), replace(CACHES[cache][0], offload_kqv=False)), guidance)


def decoded(rig: Rig, guidance: Guidance) -> F64:
    """(N_STEPS, 2, n_vocab): both branches' logits, taught with the judge's tokens."""
    prompt, found = rig.tiny.prompt(ONE_IMAGE, PICTURE), []
    tokens = rig.tiny.verdict(prompt, guidance).tokens
    rig.engine.prefill(prompt, guidance)
    for token in tokens[:N_STEPS]:
        found.append((rig.engine.original_logits, rig.engine.degraded_logits))
        rig.engine.step(token)
    return np.array(found, np.float64)


@pytest.fixture(scope="module")
def opened(written: Callable[[TinyConfig], TinyPair]) -> Opened:
    """A pair with heads of 32, as a Q8_0 cache needs."""
    return Opened(written(WIDE))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("refresh", REFRESHES)
@pytest.mark.parametrize("way", WAYS)
def test_both_branches_are_the_cpus(
    opened: Opened,
    way: str,
    refresh: Refresh,
    cache: str,
    record_property: Callable[[str, object], None],
) -> None:
    (pairing, stepping), (options, tolerance) = WAYS[way], CACHES[cache]
    guidance = Guidance(refresh=refresh, tokens=TopRatio(1.0))
    rig = Rig(opened.on(N_GPU_LAYERS), options, pairing=pairing, stepping=stepping)
    expected, found = opened.on_cpu(cache, guidance), decoded(rig, guidance)
    error, apart = np.abs(found - expected).max(), np.abs(np.diff(expected, axis=1)).max(axis=2)
    record_property("figure", f"{way} {refresh} {cache} {error:.4f}")
    assert error <= tolerance
    assert apart.min() >= max(APART, 10 * tolerance)
    n_left_out = sum(context.patch.n_left_out for context in rig.contexts)
    # Where the CPU computes K q for a device, rows lie between the heads of what is copied.
    in_pairs = cache != "q8_0" or FLASH or not ON_DEVICE
    forks = stepping.fork and (in_pairs or stepping.waiting == "always")
    assert (n_left_out >= N_STEPS - 1) == forks


Half = Literal["none", "half", "all"]
N_ON: dict[Half, int] = {"none": 0, "half": 3, "all": N_GPU_LAYERS}


@pytest.mark.parametrize("cache_on_device", [True, False])
@pytest.mark.parametrize("half", N_ON)
def test_pairs_fork_wherever_the_layers_lie(
    opened: Opened, half: Half, cache_on_device: bool
) -> None:
    """Between two devices the stream is copied; with the cache on the host, q is as well."""
    tiny = opened.on(N_ON[half] if ON_DEVICE else 0)
    rig = Rig(tiny, replace(EXACT, offload_kqv=cache_on_device), stepping=Strategy(fork=True))
    context = rig.contexts[0]
    survey(context)
    for layer in range(1, tiny.model.n_layer):
        forking = Forking(context, [layer])
        assert forking.layer == layer
        # Where the CPU's layers end, nodes of one name are copied: nobody knows which is which.
        assert forking.pairs or (half == "half" and layer > tiny.model.n_layer - N_ON["half"])
    for layers in ([2, 3], [3, 4], [5, 4]):
        guidance = Guidance(layers=layers, tokens=TopRatio(1.0))
        prompt, before = tiny.prompt(ONE_IMAGE, PICTURE), context.patch.n_left_out
        verdict = tiny.verdict(prompt, guidance)
        errors = rig.follow(prompt, guidance, verdict)
        assert errors.max() <= TOLERANCE
        assert verdict.gaps.min() >= APART
        n_left_out = context.patch.n_left_out - before
        assert (n_left_out >= len(verdict.steps) - 1) == Forking(context, sorted(layers)).pairs
