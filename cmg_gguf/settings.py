"""Guidance settings as a small JSON file.

    save_settings("llava.json", Settings(Guidance(alpha=2.0)))
    load_settings("llava.json").guidance

The file is meant to be read and changed by hand: what it leaves out is a default, and what it says
is checked by `Guidance` itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cmg_gguf.errors import GuidanceError, shown
from cmg_gguf.evidence import UNFITTED, EvidenceModel
from cmg_gguf.guidance import (
    AttentionMass,
    CumulativeMass,
    Disagreement,
    Guidance,
    LayerPolicy,
    LayerRange,
    LayerSet,
    LowestCosine,
    MeanStd,
    TokenPolicy,
    TopRatio,
)

_RULES: dict[str, dict[str, type[Any]]] = {
    "gate": {"disagreement": Disagreement},
    "tokens": {"top_ratio": TopRatio, "mean_std": MeanStd, "cumulative_mass": CumulativeMass},
    "layers": {
        "layer_set": LayerSet,
        "layer_range": LayerRange,
        "attention_mass": AttentionMass,
        "lowest_cosine": LowestCosine,
    },
}


@dataclass(frozen=True)
class Settings:
    """guidance: how to decode. tuned: how it was found, JSON-ready; {} = by hand. evidence: weights
    for this model, see `cmg_gguf.evidence`.

    Of `tuned`, "items" holds the hashes of the items it was tuned on: see `tuned_on`.
    """

    guidance: Guidance
    tuned: Mapping[str, Any] = field(default_factory=dict)
    evidence: EvidenceModel = UNFITTED

    @property
    def tuned_on(self) -> frozenset[str]:
        """Hashes (`cmg_gguf.evaluation.items.item_hash`) of the items it was tuned on."""
        return frozenset(self.tuned.get("items", ()))


def guidance_to_json(guidance: Guidance) -> dict[str, Any]:
    """JSON-ready, the same for equal ones; `guidance_from_json` gives an equal `Guidance` back."""
    assert isinstance(guidance.layers, LayerPolicy)
    content = {
        **{f.name: getattr(guidance, f.name) for f in fields(guidance)},
        "tokens": _rule_to_json("tokens", guidance.tokens),
        "layers": _rule_to_json("layers", guidance.layers),
    }
    if guidance.states == "read":  # as files had it before there was another
        content.pop("states")
    gate = content.pop("gate")
    return content if gate is None else {**content, "gate": _rule_to_json("gate", gate)}


def guidance_from_json(value: object) -> Guidance:
    """What `guidance_to_json` wrote. What is left out is a default.

    Raises GuidanceError for anything that `Guidance` refuses, and for names it does not have.
    """
    given = dict(_object(value, "guidance"))
    _check_names(given, {f.name for f in fields(Guidance)}, "guidance")
    for name in _RULES:
        if given.get(name) is not None:
            given[name] = _rule_from_json(name, given[name])
    return Guidance(**given)


def save_settings(path: str | Path, settings: Settings) -> None:
    """Writes the file. Raises GuidanceError if that cannot be done."""
    content = {"guidance": guidance_to_json(settings.guidance)}
    if settings.evidence != UNFITTED:
        content["evidence"] = asdict(settings.evidence)
    if settings.tuned:
        content["tuned"] = dict(settings.tuned)
    try:
        Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    except OSError as exc:
        raise GuidanceError(
            f"settings file {path} cannot be written ({exc.strerror}); name another"
        ) from exc


def load_settings(path: str | Path) -> Settings:
    """What the file says. Raises GuidanceError if it cannot be read or says something wrong."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except OSError as exc:
        raise GuidanceError(
            f"settings file {path} cannot be read ({exc.strerror}); name a file that is there"
        ) from exc
    except ValueError as exc:
        raise GuidanceError(f"settings file {path} is no JSON: {exc}") from exc
    try:
        given = _object(content, "the file")
        _check_names(given, {"guidance", "evidence", "tuned"}, "the file")
        guidance = guidance_from_json(given.get("guidance", {}))
        evidence = _evidence_from_json(given.get("evidence", {}))
        tuned = _object(given.get("tuned", {}), "tuned")
        items = tuned.get("items", [])
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise GuidanceError(f"items={shown(items)} is no list of hashes")
    except GuidanceError as exc:
        raise GuidanceError(f"settings file {path}: {exc}") from exc
    return Settings(guidance, tuned, evidence)


def _evidence_from_json(value: object) -> EvidenceModel:
    given = _object(value, "evidence")
    _check_names(given, {f.name for f in fields(EvidenceModel)}, "evidence")
    return EvidenceModel(**given)


def _rule_to_json(kind: str, value: TokenPolicy | LayerPolicy | Disagreement) -> dict[str, Any]:
    rule = next(name for name, cls in _RULES[kind].items() if type(value) is cls)
    values = asdict(value).items()
    return {"rule": rule, **{k: list(v) if isinstance(v, tuple) else v for k, v in values}}


def _rule_from_json(kind: str, value: object) -> TokenPolicy | LayerPolicy | Disagreement:
    given = dict(_object(value, kind))
    rule = given.pop("rule", None)
    if not isinstance(rule, str) or rule not in _RULES[kind]:
        raise GuidanceError(
            f"{kind}: rule={shown(rule)} is unknown: one of {', '.join(_RULES[kind])}"
        )
    cls = _RULES[kind][rule]
    _check_names(given, {f.name for f in fields(cls)}, f"{kind} of rule {rule}")
    if cls is LayerSet and not isinstance(given.setdefault("layers", []), list):
        raise GuidanceError(f"layers={shown(given['layers'])} is no list of layer numbers")
    rule_value: TokenPolicy | LayerPolicy | Disagreement = cls(**given)
    return rule_value


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise GuidanceError(f"{what} is {shown(value)}: it must be an object of names and values")
    return value


def _check_names(given: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := sorted(set(given) - known):
        raise GuidanceError(
            f"{what} has no setting {', '.join(unknown)}: it has {', '.join(sorted(known))}"
        )
