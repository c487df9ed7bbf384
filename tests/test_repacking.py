"""Weights that would be repacked for matrix units whose kernels crash."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.plain_llama import open_llama
from commands import invoke
from tiny_llava import TinyPair

from cmg_gguf import GuidedVLM
from cmg_gguf.errors import BackendError
from cmg_gguf.llama import model, repacking
from cmg_gguf.llama.model import Model
from cmg_gguf.tiny.pair import embedded_pair

AMX = "CPU : AVX512 = 1 | AMX_INT8 = 1 | REPACK = 1"
Machine = Callable[[str, str], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Sets what features the machine has, and what becomes of the trial."""

    def be(features: str, trial: str) -> None:
        monkeypatch.setattr(repacking, "features", lambda: features)
        monkeypatch.setattr(repacking, "_TRIAL", trial)
        repacking.is_safe.cache_clear()

    yield be
    repacking.is_safe.cache_clear()


CRASH = f"import os; os.kill(os.getpid(), {signal.SIGSEGV.value})"


@pytest.mark.parametrize(
    ("features", "trial", "safe"),
    [
        ("CPU : AVX2 = 1 | REPACK = 1", CRASH, True),  # nothing is tried
        (AMX, "pass", True),
        (AMX, CRASH, False),
        (AMX, "raise OSError", False),
    ],
)
def test_only_a_trial_that_survives_is_safe(
    machine: Machine, features: str, trial: str, safe: bool
) -> None:
    machine(features, trial)
    assert repacking.is_safe() == safe


def test_it_is_tried_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(AMX, CRASH)
    runs = 0

    def run(*_: Any, **__: Any) -> SimpleNamespace:
        nonlocal runs
        runs += 1
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    assert repacking.is_safe()
    assert repacking.is_safe()
    assert runs == 1


@pytest.mark.parametrize("trial", [CRASH, "pass"])
def test_weights_are_repacked_only_where_that_is_safe(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, pair: TinyPair, trial: str
) -> None:
    machine(AMX, trial)
    load, repacked = model._load, []

    def noted(path: bytes, params: Any) -> Any:
        repacked.append(params.use_extra_bufts)
        params.use_extra_bufts = False  # the machine of the test may be one that crashes
        return load(path, params)

    monkeypatch.setattr(model, "_load", noted)
    Model.load(pair.llm).close()
    assert repacked == [trial != CRASH]


def test_a_llama_whose_weights_would_crash_is_refused_with_what_to_do(
    machine: Machine, pair: TinyPair
) -> None:
    llama = open_llama(pair.llm, n_ctx=64, n_gpu_layers=0, verbose=False)
    llama.model_params.use_extra_bufts = True
    machine(AMX, CRASH)
    with pytest.raises(BackendError, match=r"repacked for AMX.*mno-amx-int8.*GuidedVLM"):
        GuidedVLM.from_llama(llama, pair.mmproj, use_gpu=False)
    llama.model_params.use_extra_bufts = False
    GuidedVLM.from_llama(llama, pair.mmproj, use_gpu=False).close()
    llama.close()


def test_info_says_that_weights_are_not_repacked_and_how_they_would_be(machine: Machine) -> None:
    machine(AMX, "pass")
    assert "not repacked" not in invoke("info").stdout
    machine(AMX, CRASH)
    told = " ".join(invoke("info").stdout.split())
    assert "AMX kernels crash" in told
    assert "-mno-amx-int8" in told


def test_the_built_in_model_answers_whatever_this_machine_is() -> None:
    assert repacking.is_safe() in (True, False)
    Model.load(embedded_pair()[0]).close()
