"""Which way of stepping is chosen: by name, by what was measured, by what the machine is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guided import QUESTION, ids, is_empty, open_vlm
from offload import N_GPU_LAYERS
from support import EXACT, Rig, Tiny
from test_reference import picture
from tiny_llava import TinyPair

from cmg_gguf import BackendError, ContextLengthError, GuidedVLM, UnsupportedError, calibration
from cmg_gguf.calibration import Choice, cost_folder, cost_key, measure, remember, remembered
from cmg_gguf.engine.strategy import STEPPING, Costs
from cmg_gguf.guidance import Guidance

COSTS = Costs(
    plain=10.0, pair=16.0, fork=15.0, lazy=10.5, catch_up=(7.0, 12.0, 20.0), forks=(True, True)
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cost_folder()


def key(tiny: Tiny, n_gpu_layers: int = 0, **settings: Any) -> dict[str, Any]:
    return dict(cost_key(tiny.model, replace(EXACT, **settings), n_gpu_layers))


# --- what costs say ----------------------------------------------------------------------------


def test_a_lazy_token_costs_its_step_and_its_share_of_catching_up() -> None:
    costs = COSTS.per_token(1.0)
    assert costs == {"eager": 16.0, "fork": 15.0, "lazy": 10.5 + 7.0, "adaptive": 15.0}
    costs = COSTS.per_token(0.25)
    assert costs["lazy"] == costs["adaptive"] == 10.5 + 0.25 * 12.0
    assert COSTS.per_token(0.01)["lazy"] == pytest.approx(10.5 + 20.0 / 8)


def test_an_adaptive_answer_changes_over_where_the_pair_is_cheaper() -> None:
    share = COSTS.stepping("adaptive").pair_above
    assert COSTS.per_token(share)["lazy"] < COSTS.fork <= COSTS.per_token(share + 0.01)["lazy"]
    assert replace(COSTS, fork=99.0).stepping("adaptive").pair_above == 1.0
    assert replace(COSTS, fork=0.1).stepping("adaptive").pair_above == 0.0
    assert COSTS.stepping("lazy") == STEPPING["lazy"]


@pytest.mark.parametrize(
    ("changed", "best"),
    [({}, "adaptive"), ({"pair": 10.2}, "eager"), ({"pair": 16.0, "fork": 16.0}, "adaptive")],
)
def test_the_best_is_the_one_that_costs_least(changed: dict[str, float], best: str) -> None:
    assert replace(COSTS, **changed).best() == best  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed", [{"plain": 0.0}, {"pair": float("nan")}, {"catch_up": (1.0,)}, {"fork": -1.0}]
)
def test_costs_that_cannot_be_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive"):
        replace(COSTS, **changed)


# --- measuring ---------------------------------------------------------------------------------


def test_measuring_leaves_the_engine_empty_and_tells_what_forks(llama: Tiny) -> None:
    rig = Rig(llama)
    costs = measure(rig.engine, seconds=0.05)
    assert costs.forks == (True, True)
    assert rig.contexts[0].patch.n_left_out > 0
    assert rig.engine.n_past == rig.engine.n_cells == 0
    prompt, guidance = llama.prompt("USER: <__media__> What is there? ASSISTANT:", 2), Guidance()
    errors = rig.follow(prompt, guidance, llama.verdict(prompt, guidance))
    assert errors.max() < 1e-4


def test_a_model_is_measured_once(pair: TinyPair) -> None:
    with open_vlm(pair) as vlm:
        assert vlm.strategy == "adaptive"
        expected = ids(vlm.generate(QUESTION, [picture(1)], max_tokens=8))
        costs = vlm.calibrate(0.05)
        assert vlm.strategy == costs.best()
        assert is_empty(vlm)
        assert ids(vlm.generate(QUESTION, [picture(1)], max_tokens=8)) == expected
    for name, times in (("eager", {"pair": 0.1}), ("adaptive", {"fork": 0.1})):
        with open_vlm(pair) as vlm:
            remember(vlm._choice._key, replace(COSTS, **times))  # type: ignore[arg-type]
        with open_vlm(pair) as vlm:
            assert vlm.strategy == name
            assert ids(vlm.generate(QUESTION, [picture(1)], max_tokens=8)) == expected
        with open_vlm(pair, strategy="eager") as vlm:
            assert vlm.strategy == "eager"
            assert vlm.engine.stepping == STEPPING["eager"]


def test_measuring_ends_an_open_stream(pair: TinyPair) -> None:
    with open_vlm(pair) as vlm:
        stream = vlm.stream(QUESTION, [picture(1)])
        next(stream)
        vlm.calibrate(0.0)
        with pytest.raises(BackendError, match="newer request"):
            next(stream)
        assert is_empty(vlm)


def test_two_contexts_and_small_ones_are_not_measured(pair: TinyPair, llama: Tiny) -> None:
    with open_vlm(pair, pairing="contexts") as vlm:
        assert vlm.strategy == "eager"
        with pytest.raises(UnsupportedError, match='pairing="pair"'):
            vlm.calibrate()
    rig = Rig(llama)
    rig.contexts[0].n_ctx = 63
    with pytest.raises(ContextLengthError, match="n_ctx=63"):
        Choice(rig.engine, "auto", key(llama)).calibrate(0.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strategy": "quick"}, "strategy='quick' is unknown: one of auto, eager"),
        ({"strategy": "lazy-approximate", "pairing": "contexts"}, "none in common"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(
    pair: TinyPair, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UnsupportedError, match=says):
        open_vlm(pair, **settings)


# --- on an accelerator -------------------------------------------------------------------------


def test_an_accelerator_is_measured_before_the_first_guided_request(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, measured = Rig(llama), []

    def measure(engine: Any, seconds: float) -> Costs:
        measured.append(seconds)
        return replace(COSTS, pair=1.0)

    monkeypatch.setattr(calibration, "measure", measure)
    choice = Choice(rig.engine, "auto", {**key(llama), "accelerated": True})
    assert (choice.name, measured) == ("auto", [])
    for _ in range(2):
        choice.settle()
        assert (choice.name, measured) == ("eager", [1.0])
    assert Choice(rig.engine, "auto", {**key(llama), "accelerated": True}).name == "eager"


def test_measuring_that_fails_fails_no_request(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(engine: Any, seconds: float) -> Costs:
        raise BackendError("no")

    monkeypatch.setattr(calibration, "measure", measure)
    choice = Choice(Rig(llama).engine, "auto", {**key(llama), "accelerated": True})
    choice.settle()
    assert choice.name == "fork"


def test_plain_requests_do_not_measure(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_vlm(pair) as vlm:
        settled: list[int] = []
        monkeypatch.setattr(vlm._choice, "settle", lambda: settled.append(1))
        vlm.generate(QUESTION, [picture(0)], guidance=Guidance(alpha=0.0), max_tokens=1)
        assert settled == []
        vlm.generate(QUESTION, [picture(0)], max_tokens=1)
        assert settled == [1]


# --- what is remembered ------------------------------------------------------------------------


def test_costs_are_remembered_by_all_that_they_depend_on(llama: Tiny, gemma: Tiny) -> None:
    remember(key(llama), COSTS)
    assert remembered(key(llama)) == COSTS
    others = [
        key(gemma),
        key(llama, 99),
        key(llama, n_threads=2),
        key(llama, flash_attn=True),
        key(llama, type_k="f16"),
        {**key(llama), "llama_cpp_python": "0"},
        {**key(llama), "devices": []},
    ]
    assert [remembered(other) for other in others] == [None] * len(others)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"key": 1}', "\0\0", '{"costs": {"plain": "a"}}', "9" * 10_000],
)
def test_a_broken_file_is_ignored_and_written_anew(llama: Tiny, folder: Path, text: str) -> None:
    remember(key(llama), COSTS)
    (file,) = folder.iterdir()
    file.write_text(text)
    assert remembered(key(llama)) is None
    remember(key(llama), COSTS)
    assert remembered(key(llama)) == COSTS
    assert list(folder.iterdir()) == [file]


@pytest.mark.parametrize("broken", [{"plain": -1.0}, {"plain": "1"}, {"more": 1.0}, {"pair": None}])
def test_costs_of_a_file_that_cannot_be_are_ignored(
    llama: Tiny, folder: Path, broken: dict[str, Any]
) -> None:
    remember(key(llama), COSTS)
    (file,) = folder.iterdir()
    data = json.loads(file.read_text())
    data["costs"].update(broken)
    file.write_text(json.dumps(data))
    assert remembered(key(llama)) is None


def test_a_folder_that_cannot_be_written_fails_nothing(
    pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with open_vlm(pair) as vlm:
        vlm.calibrate(0.0)


def test_a_model_whose_file_is_gone_is_still_told_apart(llama: Tiny, gemma: Tiny) -> None:
    path = llama.model.path
    try:
        llama.model.path = Path("/nowhere/llm.gguf")
        assert key(llama)["model"] != key(gemma)["model"]
    finally:
        llama.model.path = path


def test_a_guided_vlm_can_be_told_its_strategy(pair: TinyPair) -> None:
    for name, stepping in STEPPING.items():
        with GuidedVLM(pair.llm, pair.mmproj, strategy=name, n_gpu_layers=N_GPU_LAYERS) as vlm:  # type: ignore[arg-type]
            assert (vlm.strategy, vlm.engine.stepping) == (name, stepping)
