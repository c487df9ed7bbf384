"""Guidance as a file: it comes back as it was, and what is wrong with it is told."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmg_gguf.errors import GuidanceError
from cmg_gguf.evidence import UNFITTED, EvidenceModel
from cmg_gguf.guidance import (
    AttentionMass,
    CumulativeMass,
    Disagreement,
    Guidance,
    LayerRange,
    LayerSet,
    LowestCosine,
    MeanStd,
    TopRatio,
)
from cmg_gguf.settings import (
    Settings,
    guidance_from_json,
    guidance_to_json,
    load_settings,
    save_settings,
)

GUIDANCES = [
    Guidance(),
    Guidance(alpha=0.0, beta=0.0, tokens=MeanStd(-1.5), layers=LayerSet((3, 1)), scope="all"),
    Guidance(alpha=2.5, tokens=CumulativeMass(0.8), layers=LayerRange(0.25, 0.75)),
    Guidance(tokens=TopRatio(1 / 3), layers=AttentionMass(0.4), refresh="prompt"),
    Guidance(layers=LowestCosine(0.25), scope="decode"),
    Guidance(layers=[]),
    Guidance(gate=Disagreement(1.5)),
]


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_settings_come_back_as_they_were(guidance: Guidance, tmp_path: Path) -> None:
    tuned = {"figure": "accuracy", "items": ["a1", "b2"]}
    save_settings(tmp_path / "s.json", Settings(guidance, tuned))
    found = load_settings(tmp_path / "s.json")
    assert found == Settings(guidance, tuned)
    assert found.tuned_on == {"a1", "b2"}
    assert guidance_from_json(json.loads(json.dumps(guidance_to_json(guidance)))) == guidance


@pytest.mark.parametrize("number", [int, Fraction, np.float32, np.int64])
def test_a_number_is_a_float_whatever_type_it_came_in(number: Any) -> None:
    given = Guidance(
        alpha=number(2),
        beta=number(0),
        tokens=TopRatio(number(1)),
        layers=LayerRange(number(0), number(1)),
        gate=Disagreement(number(3)),
    )
    same = Guidance(
        alpha=2.0,
        beta=0.0,
        tokens=TopRatio(1.0),
        layers=LayerRange(0.0, 1.0),
        gate=Disagreement(3.0),
    )
    assert repr(given) == repr(same)
    assert json.dumps(guidance_to_json(given)) == json.dumps(guidance_to_json(same))
    assert repr(EvidenceModel(divergence=number(3))) == repr(EvidenceModel(divergence=3.0))


def test_layers_are_written_as_a_list_in_order() -> None:
    assert guidance_to_json(Guidance(layers=[3, 1]))["layers"]["layers"] == [1, 3]


def test_weights_of_evidence_are_kept_with_them(tmp_path: Path) -> None:
    weights = EvidenceModel(intercept=-0.5, divergence=3.25, fitted_on="scenes")
    save_settings(tmp_path / "s.json", Settings(Guidance(), {}, weights))
    assert load_settings(tmp_path / "s.json").evidence == weights
    save_settings(tmp_path / "s.json", Settings(Guidance()))
    assert "evidence" not in json.loads((tmp_path / "s.json").read_text())
    assert load_settings(tmp_path / "s.json").evidence == UNFITTED


@pytest.mark.parametrize("value", [3, {"weight": 1}, {"entropy_o": "x"}, {"fitted_on": 5}])
def test_wrong_weights_are_told(value: Any, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"evidence": value}))
    with pytest.raises(GuidanceError, match=r"s\.json: .*(evidence|fitted_on)"):
        load_settings(tmp_path / "s.json")


def test_what_a_file_leaves_out_is_a_default(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text('{"guidance": {"alpha": 2, "tokens": {"rule": "mean_std"}}}')
    found = load_settings(path)
    assert found.guidance == Guidance(alpha=2, tokens=MeanStd())
    assert found.tuned_on == frozenset()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ([], "must be an object"),
        ({"alpha": 1}, "has no setting alpha: it has evidence, guidance, tuned"),
        ({"guidance": {"alhpa": 1}}, "has no setting alhpa"),
        ({"guidance": {"alpha": 1000}}, "alpha=1000 is out of range"),
        ({"guidance": {"alpha": True}}, "alpha=True is out of range"),
        ({"guidance": {"alpha": None}}, "alpha=None is out of range"),
        ({"guidance": {"scope": "some"}}, "scope='some' is not one of"),
        ({"guidance": {"tokens": 3}}, "tokens is 3"),
        ({"guidance": {"tokens": {"ratio": 1}}}, "rule=None is unknown: one of top_ratio"),
        ({"guidance": {"tokens": {"rule": "top_ratio", "ratio": 2}}}, "ratio=2 is out of range"),
        ({"guidance": {"tokens": {"rule": "top_ratio", "mass": 1}}}, "has no setting mass"),
        ({"guidance": {"layers": {"rule": "layer_set", "layers": 3}}}, "no list of layer numbers"),
        ({"guidance": {"layers": {"rule": "layer_set", "layers": ["a"]}}}, "layer 'a'"),
        ({"guidance": {"layers": {"rule": "layer_range", "start": 1}}}, "must be below"),
        ({"tuned": {"items": "all"}}, "no list of hashes"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(GuidanceError, match=message) as caught:
        load_settings(path)
    assert str(caught.value).startswith(f"settings file {path}")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(GuidanceError, match=r"none\.json cannot be read"):
        load_settings(tmp_path / "none.json")
    with pytest.raises(GuidanceError, match="cannot be written"):
        save_settings(tmp_path / "no" / "folder.json", Settings(Guidance()))


def test_a_file_without_a_gate_says_nothing_of_it_and_null_is_none() -> None:
    assert "gate" not in guidance_to_json(Guidance())
    assert guidance_from_json({"gate": None}) == Guidance()
    assert guidance_from_json({"gate": {"rule": "disagreement"}}).gate == Disagreement(3.0)


@pytest.mark.parametrize("gate", [True, 3.0, "disagreement"])
def test_what_is_no_gate_is_refused(gate: Any) -> None:
    with pytest.raises(GuidanceError, match="is no gate: use Disagreement"):
        Guidance(gate=gate)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1001.0, float("nan")])
def test_a_gates_factor_has_a_range(factor: float) -> None:
    with pytest.raises(GuidanceError, match=r"factor=.* is out of range"):
        Disagreement(factor)
