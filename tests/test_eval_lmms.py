"""The plug-in for lmms-eval, against stand-ins of that package's registry and base class."""

from __future__ import annotations

import importlib
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import evals
import pytest
from guided import open_vlm
from PIL import Image
from prompts import picture
from tiny_llava import TinyPair

import cmg_gguf.vlm
from cmg_gguf import Guidance
from cmg_gguf.errors import UnsupportedError
from cmg_gguf.evaluation import lmms as plugin
from cmg_gguf.guidance import PLAIN
from cmg_gguf.settings import Settings, save_settings


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None


class Base(ABC):
    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[Any]: ...
    @abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...
    @abstractmethod
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]: ...


@dataclass
class Request:
    args: tuple[Any, ...]


@pytest.fixture
def model_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    modules = {
        name: types.ModuleType(name)
        for name in (
            *("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"),
            *("lmms_eval.models", "lmms_eval.models.registry_v2"),
        )
    }
    modules["lmms_eval.api.model"].lmms = Base  # type: ignore[attr-defined]
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = plugin.manifest()
    assert found.model_id == "cmg_gguf"
    module_name, _, class_name = found.simple_class_path.rpartition(".")
    yield getattr(importlib.import_module(module_name), class_name)
    vars(plugin).pop("GuidedModel", None)


def test_requests_are_answered_under_the_settings(
    model_class: Any, pair: TinyPair, tmp_path: Path
) -> None:
    save_settings(tmp_path / "s.json", Settings(Guidance(alpha=3.0)))
    image = Image.fromarray(picture(0))
    arguments = {"model": str(pair.llm), "mmproj": str(pair.mmproj), **evals.OPTIONS}
    documents = {"toy": {"test": [{"image": image}]}}
    asked = ("What is there?", {"max_new_tokens": 8, "until": ["\n\n"], "temperature": 0})
    request = Request((*asked, lambda document: [document["image"]], 0, "toy", "test"))
    said = []
    for settings in ({"settings": str(tmp_path / "s.json")}, {"alpha": "0", "beta": "0"}):
        model = model_class(**arguments, **settings, batch_size=1, max_batch_size=None, device=None)
        assert isinstance(model, Base)
        model.task_dict = documents
        said += model.generate_until([request, request])
    with open_vlm(pair) as vlm:
        guided, plain = (
            vlm.generate("What is there?", [picture(0)], guidance=guidance, max_tokens=8).text
            for guidance in (Guidance(alpha=3.0), PLAIN)
        )
    assert said == [guided, guided, plain, plain]
    assert guided != plain
    with pytest.raises(UnsupportedError, match="likelihoods"):
        model.loglikelihood([])
    with pytest.raises(UnsupportedError, match="only 1"):
        model_class(**arguments, batch_size=8)


def test_a_model_is_named_by_its_files_or_its_repository(
    model_class: Any, pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, object]] = []

    def fetched(name: str, mmproj: object = None, **_: object) -> TinyPair:
        asked.append((name, mmproj))
        return pair

    monkeypatch.setattr(cmg_gguf.vlm, "fetch_pair", fetched)
    made = model_class(hf="owner/repo:Q8_0", **evals.OPTIONS)
    assert made._answerer._vlm.model.path == pair.llm
    model_class(hf="owner/repo", mmproj="own.gguf", **evals.OPTIONS)
    assert asked == [("owner/repo:Q8_0", None), ("owner/repo", "own.gguf")]
    for wrong in ({}, {"model": str(pair.llm)}, {"model": str(pair.llm), "hf": "owner/repo"}):
        with pytest.raises(UnsupportedError, match="give model and mmproj, or hf"):
            model_class(**wrong)


def test_sampling_is_as_the_task_says() -> None:
    assert plugin._sampling({"temperature": 0.7, "do_sample": False}).temperature == 0
    assert plugin._sampling({}).temperature == 0
    drawn = plugin._sampling({"temperature": 0.7, "top_p": None})
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.7, 1.0, 0)


def test_without_lmms_eval_the_plug_in_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(UnsupportedError, match="lmms-eval is not installed"):
        _ = plugin.GuidedModel
    with pytest.raises(AttributeError):
        _ = plugin.Other


def test_an_installed_package_is_found_by_its_entry_point() -> None:
    found = [point for point in entry_points(group="lmms_eval.models") if "cmg" in point.value]
    if not found:
        pytest.skip("this package is not installed, only imported")
    assert found[0].load() is plugin.manifest
