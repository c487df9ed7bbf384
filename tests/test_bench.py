"""The benchmark: its statistics, its replay, and that it computes every figure it promises."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench
import pytest
from benchmarks.decoding import N_BY_TURNS, measure_decoding
from benchmarks.ratios import Middle, in_turns, rotated
from benchmarks.report import ROWS
from benchmarks.schedule import (
    FILE,
    Schedule,
    Watch,
    load_schedule,
    record_schedule,
    save_schedule,
    synthetic_schedule,
)
from benchmarks.subjects import Messages, Subject
from guided import open_vlm
from prompts import picture
from tiny_llava import TinyPair

from cmg_gguf import Guidance, Sampling
from cmg_gguf.answer.generate import Generation
from cmg_gguf.arrays import FloatArray
from cmg_gguf.llama.sampler import Sampler
from cmg_gguf.prompt.segments import Prompt
from cmg_gguf.request import Request

QUANTS = ("q4_0", "q4_k_m")
SCRIPT = Path(bench.__file__)


# --- the script --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(
    pair: TinyPair, tmp_path_factory: pytest.TempPathFactory
) -> subprocess.CompletedProcess[str]:
    """The benchmark, on tiny files under the names of the large ones."""
    folder = tmp_path_factory.mktemp("bench")
    for quant in ("q4_0", "q8_0"):
        shutil.copy(pair.llm, folder / f"random-1.1b-v1-{quant}.gguf")
    shutil.copy(pair.mmproj, folder / "random-mmproj-v1-576.gguf")
    options = ("--rounds", "2", "--threads", "1", "--models", str(folder))
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--quants", *QUANTS],
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture(scope="module")
def figures(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON of its last line."""
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=[f"{row.name}, {row.against}" for row in ROWS])
def test_every_row_is_computed_for_every_model(figures: dict[str, Any], row: Any) -> None:
    found = next(r for r in figures["rows"] if (r["name"], r["base"]) == (row.name, row.base))
    assert set(QUANTS) <= set(found["results"])
    for result in found["results"].values():
        assert 0 < result["low"] <= result["median"] <= result["high"] < math.inf
        assert result["value"] > 0
        assert result["base"] > 0
        assert result["met"] == (None if row.wanted is None else result["median"] <= row.wanted)


@pytest.mark.slow
def test_absolute_figures_are_computed(figures: dict[str, Any]) -> None:
    assert figures["drawing_ms"]["n_vocab"] == 152_000
    assert 0 < figures["drawing_ms"]["median"] < math.inf
    for subject in figures["subjects"]:
        assert subject["n_prompt_tokens"] > subject["n_image_tokens"] > 0


@pytest.mark.slow
def test_the_table_says_what_it_was_measured_on(ran: subprocess.CompletedProcess[str]) -> None:
    table = ran.stdout.splitlines()[:-1]
    assert "RANDOM weights" in ran.stdout
    assert all(any(row.name in line for line in table) for row in ROWS)
    assert any("synthetic" in line for line in table) == load_schedule().synthetic
    assert "about" in ran.stderr
    assert "decoding" in ran.stderr


def test_quick_takes_one_model_and_few_rounds() -> None:
    args = bench._arguments(["--quick"])
    assert (args.quants, args.rounds) == (["q4_0"], bench.QUICK_ROUNDS)
    assert bench._arguments(["--quick", "--rounds", "7"]).rounds == 7
    assert len(bench._arguments([]).quants) == 3


@pytest.mark.parametrize("argv", [["--rounds", "0"], ["--rounds", "x"], ["--quants", "q2"]])
def test_impossible_options_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as info:
        bench._arguments(argv)
    assert info.value.code == 2


# --- statistics --------------------------------------------------------------------------------


def test_the_interval_encloses_the_median_of_95_of_100_samples() -> None:
    rng = random.Random(0)
    for n in (6, 12, 25):
        hits = 0
        for _ in range(1000):
            middle = Middle.of(rng.expovariate(1.0) for _ in range(n))
            hits += middle.low <= math.log(2) <= middle.high
        assert hits >= 940


def test_below_six_values_the_interval_is_the_whole_range() -> None:
    for n in range(1, 6):
        assert Middle.of(range(n)) == Middle((n - 1) / 2, 0, n - 1, n)


def test_a_ratio_is_that_of_the_same_round() -> None:
    assert Middle.of_ratios([2, 40, 600], [1, 10, 100]) == Middle(4, 2, 6, 3)
    with pytest.raises(ValueError, match="shorter"):
        Middle.of_ratios([1, 2], [1])


def test_turns_begin_with_another_way_each_round() -> None:
    order: list[str] = []
    ways: dict[str, Callable[[], object]] = {
        name: (lambda name=name: order.append(name))  # type: ignore[misc]
        for name in "abc"
    }
    times = in_turns(ways, 3)
    assert "".join(order) == "abcbcacab"
    assert {name: len(runs) for name, runs in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert [name for name, _ in rotated(ways, 5)] == ["c", "a", "b"]


# --- replay ------------------------------------------------------------------------------------


def test_every_way_replays_the_same_answer_by_turns() -> None:
    log: list[tuple[str, int]] = []

    class Logged:
        def __init__(self, name: str) -> None:
            self._name = name

        def answer(self, asked: tuple[bool, ...]) -> Any:
            for i in range(len(asked)):
                log.append((self._name, i))
                yield None

    schedule = Schedule(((True,) * 20, (False,) * 10))
    times = measure_decoding({"a": Logged("a"), "b": Logged("b")}, schedule, 3, lambda: None)
    assert {name: len(runs) for name, runs in times.items()} == {"a": 3, "b": 3}
    for way in "ab":
        steps = [i for name, i in log if name == way]
        assert steps == [*range(20), *range(10), *range(20), *range(10)]
    turns = [len(list(run)) for _, run in itertools.groupby(log, key=lambda entry: entry[0])]
    assert max(turns) <= 2 * N_BY_TURNS + 1


def test_a_schedule_is_read_as_it_was_written(tmp_path: Path) -> None:
    schedule = Schedule(((True, False, True), (False, True)), n_compared=9, n_differing=2)
    save_schedule(schedule, {"model": "x"}, tmp_path / "schedule.json")
    assert load_schedule(tmp_path / "schedule.json") == schedule
    assert schedule.share == pytest.approx(2 / 3)


def test_without_a_record_the_schedule_is_synthetic(tmp_path: Path) -> None:
    schedule = load_schedule(tmp_path / "none.json")
    assert schedule == synthetic_schedule()
    assert schedule.synthetic
    assert 0.08 < schedule.share < 0.18


@pytest.mark.skipif(not FILE.exists(), reason="nothing recorded yet")
def test_the_record_is_of_a_trained_model() -> None:
    schedule = load_schedule()
    assert not schedule.synthetic
    assert 0 < schedule.share < 0.5
    assert schedule.n_compared >= len(schedule.captions) > 0


class Spied:
    """A sampler that notes when it asks for l_d."""

    alpha = 1.0

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.asked: list[bool] = []

    def prepare(self, logits: FloatArray) -> bool:
        self.asked.append(self._sampler.prepare(logits))
        return self.asked[-1]

    def draw(self, original: FloatArray, degraded: FloatArray | None) -> tuple[int, int]:
        return self._sampler.draw(original, degraded)

    def accept(self, token: int) -> None:
        self._sampler.accept(token)


@pytest.mark.parametrize("beta", [0.1, 0.6, 0.95])
def test_what_is_recorded_is_what_a_sampler_asks_for(pair: TinyPair, beta: float) -> None:
    guidance = Guidance(beta=beta)
    with open_vlm(pair) as vlm:
        prompt: Prompt = vlm.projector.encode(
            vlm.projector.tokenize(f"USER: {vlm.projector.marker} What? ASSISTANT:", [picture(0)])
        )
        session = vlm.engine.open(prompt, guidance)
        vlm.engine.prefill(session)
        sampler = Sampler(vlm.model, Sampling(), alpha=1.0, beta=beta, seed=0)
        spied, watched = Spied(sampler), Watch(beta)
        request = Request("", guidance=guidance, max_tokens=24, logits_processors=(watched,))
        generation = Generation(spied, vlm.model, request, lambda piece: None)
        vlm.engine.finish(generation.run(session))
    assert watched.asked == spied.asked
    assert any(watched.asked)
    assert beta < 0.5 or not all(watched.asked)


@pytest.mark.slow
def test_captions_are_recorded_and_compared(pair: TinyPair, tmp_path: Path) -> None:
    class Named(Subject):
        def messages(self, question: int = 0, pixels: Any = None) -> Messages:
            raise AssertionError("captions are asked for without a system text")

    subject = Named("tiny", pair, "", picture(0), ("What?",), random=True)  # type: ignore[arg-type]
    schedule = record_schedule(subject, Guidance(), lambda: None, n=2)
    assert len(schedule.captions) == schedule.n_compared == 2
    assert 0 <= schedule.n_differing <= 2
    assert 0 < schedule.share <= 1
