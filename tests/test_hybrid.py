"""Models in which some layers attend and the others have a state: nothing is masked in those."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from commands import invoke
from prompts import ONE_IMAGE, PICTURE, TWO_IMAGES, TWO_IN_A_ROW
from support import APART, TOLERANCE, Pairing, Rig, Tiny
from tiny_llava import TinyConfig, TinyPair

from cmg_gguf.engine.steps import Strategy
from cmg_gguf.errors import GuidanceError
from cmg_gguf.guidance import (
    AttentionMass,
    Guidance,
    LayerPolicy,
    LayerRange,
    LowestCosine,
    Scope,
    TopRatio,
)

CONFIG = TinyConfig(arch="lfm2")
ATTENDING = CONFIG.attending


@pytest.fixture(scope="module")
def hybrid(open_tiny: Callable[[TinyConfig], Tiny]) -> Tiny:
    return open_tiny(CONFIG)


def test_the_layers_that_attend_are_found_in_the_graph(hybrid: Tiny, llama: Tiny) -> None:
    assert hybrid.model.attention_layers == ATTENDING
    assert llama.model.attention_layers == tuple(range(llama.model.n_layer))


@pytest.mark.parametrize("tokens", [TopRatio(), TopRatio(1.0)], ids=["some", "all"])
@pytest.mark.parametrize("pairing", ["pair", "contexts"])
@pytest.mark.parametrize(
    "layers",
    [LayerRange(), LayerRange(0, 1), AttentionMass(0.5), LowestCosine(0.5), LowestCosine(1.0)],
    ids=str,
)
def test_both_branches_of_a_hybrid_are_the_judges(
    hybrid: Tiny, layers: LayerPolicy, pairing: Pairing, tokens: TopRatio
) -> None:
    prompt = hybrid.prompt(ONE_IMAGE, PICTURE)
    guidance = Guidance(layers=layers, tokens=tokens)
    verdict = hybrid.verdict(prompt, guidance)
    errors = Rig(hybrid, pairing=pairing).follow(prompt, guidance, verdict)
    assert errors.max() <= TOLERANCE
    assert verdict.gaps.min() > APART
    assert set(verdict.layers) <= set(ATTENDING)


@pytest.mark.parametrize("pairing", ["pair", "contexts"])
@pytest.mark.parametrize("scope", ["text", "all"])
@pytest.mark.parametrize("text", [ONE_IMAGE, TWO_IMAGES, TWO_IN_A_ROW, "<__media__> A dog? No:"])
def test_a_state_that_never_read_the_pictures_is_the_judges(
    hybrid: Tiny, text: str, scope: Scope, pairing: Pairing
) -> None:
    prompt = hybrid.prompt(text, *(PICTURE, 4)[: text.count("<")])
    guidance = Guidance(scope=scope, states="unread")
    verdict = hybrid.verdict(prompt, guidance)
    rig = Rig(hybrid, pairing=pairing, stepping=Strategy(waiting="always"))
    assert rig.follow(prompt, guidance, verdict, asked=lambda i: i % 3 == 0).max() <= TOLERANCE
    read = hybrid.verdict(prompt, Guidance(scope=scope))
    assert np.abs(read.steps[0].degraded - verdict.steps[0].degraded).max() > 100 * TOLERANCE


def test_states_are_of_models_that_have_them(llama: Tiny) -> None:
    rig = Rig(llama)
    with pytest.raises(GuidanceError, match='no layer of this model has one; use "read"'):
        rig.engine.prefill(llama.prompt(ONE_IMAGE, PICTURE), Guidance(states="unread"))
    with pytest.raises(GuidanceError, match='use scope="text" or "all"'):
        Guidance(states="unread", scope="decode")


@pytest.mark.parametrize("seed", range(12))
def test_any_choice_of_layers_changes_the_logits_or_is_an_error(hybrid: Tiny, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = rng.permutation(CONFIG.n_layer)[: rng.integers(1, 4)].tolist()
    if seed % 2:
        layers = rng.permutation(ATTENDING)[: rng.integers(1, 4)].tolist()
    rig, prompt = Rig(hybrid), hybrid.prompt(ONE_IMAGE, PICTURE)
    guidance = Guidance(layers=layers)
    if not set(layers) <= set(ATTENDING):
        with pytest.raises(GuidanceError, match=r"do not attend.*those that do are 1, 3, 4$"):
            rig.engine.prefill(prompt, guidance)
        return
    rig.engine.prefill(prompt, guidance)
    assert rig.engine.layers == tuple(sorted(layers))
    degraded = rig.engine.degraded_logits
    assert degraded is not None
    assert np.abs(rig.engine.original_logits - degraded).max() > APART


def test_a_range_without_a_layer_that_attends_is_an_error(hybrid: Tiny) -> None:
    rig, prompt = Rig(hybrid), hybrid.prompt(ONE_IMAGE, PICTURE)
    with pytest.raises(GuidanceError, match=r"hold none that attends.*those that do are 1, 3, 4;"):
        rig.engine.prefill(prompt, Guidance(layers=LayerRange(0.0, 1 / 6)))
    rig.engine.prefill(prompt, Guidance(alpha=0.0, layers=LayerRange(0.0, 1 / 6)))


def test_info_names_the_layers_that_attend(written: Callable[[TinyConfig], TinyPair]) -> None:
    files = "-m", str(written(CONFIG).llm)
    facts = json.loads(invoke("info", *files, "--json").stdout)
    assert facts["model"]["attention_layers"] == list(ATTENDING)
    assert facts["guidance"]["masked"] == [3, 4]
    assert "6, of which 3 attend: 1, 3-4" in invoke("info", *files).stdout
