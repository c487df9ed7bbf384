"""What methods cost: each pays for itself, whatever was asked before it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evals import Squares, ran, squares
from tiny_llava import TinyPair

from cmg_gguf.engine.engine import Engine
from cmg_gguf.evaluation.report import make_report
from cmg_gguf.evaluation.report_text import markdown
from cmg_gguf.evaluation.run import Run, read_run
from cmg_gguf.llama.projector import Projector

ROW, PICTURE = 1.0, 1000.0
"""What a decoded row and an encoded picture take by the clock of these tests, in seconds."""


@pytest.fixture
def task(tmp_path: Path) -> Squares:
    return squares(tmp_path / "pictures", n=3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which nothing takes time but decodes and encodings."""
    now = [0.0]
    decode, embed = Engine.decode, Projector._embed

    def decoded(self: Engine, batches: Sequence[Any]) -> Any:
        now[0] += ROW * sum(batch.n_rows for batch in batches)
        return decode(self, batches)

    def embedded(self: Projector, chunk: Any) -> Any:
        now[0] += PICTURE
        return embed(self, chunk)

    monkeypatch.setattr(Engine, "decode", decoded)
    monkeypatch.setattr(Projector, "_embed", embedded)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


def costs(run: Run) -> dict[str, tuple[float, float]]:
    rows = make_report(run, n_samples=10, baseline="greedy").parts[0].rows
    return {row.method: (row.seconds, row.cost) for row in rows}


def test_the_order_of_methods_changes_no_cost(
    clock: None, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    names = ("greedy", "cmg", "vcd")
    found = [
        costs(ran(task, pair, ",".join(order), tmp_path / "-".join(order)))
        for order in itertools.permutations(names)
    ]
    assert all(other == found[0] for other in found)
    assert 1 < found[0]["cmg"][1] < found[0]["vcd"][1]


def test_a_picture_counts_once_for_all_and_another_is_its_methods_own(
    clock: None, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    run = ran(task, pair, "vcd,greedy", tmp_path / "run")
    answered = [record for record in run.records if record.problem is None]
    # Three questions share each picture.
    assert {record.encode for record in answered} == {PICTURE / 3}
    report = make_report(run, n_samples=10)
    assert report.parts[0].encode == pytest.approx(PICTURE / 3)
    for method, n_pictures in (("greedy", 0), ("vcd", task.n)):
        own = sum(record.seconds for record in answered if record.method == method)
        assert own // PICTURE == n_pictures
        row = next(row for row in report.parts[0].rows if row.method == method)
        assert row.seconds == pytest.approx(PICTURE / 3 + own / 9)
    assert "333.333 in which its image was encoded, once for all" in markdown(report)


def test_a_run_that_was_stopped_tells_the_same_costs(
    clock: None, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    names = "greedy,cmg"
    with pytest.raises(KeyboardInterrupt):
        ran(task, pair, names, tmp_path / "run", progress=stop)
    whole = ran(task, pair, names, tmp_path / "whole")
    assert costs(ran(task, pair, names, tmp_path / "run")) == costs(whole)


def test_the_first_answer_of_a_loaded_model_is_nobodys(
    task: Squares, pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the true clock, made slow for the first prompt that is decoded."""
    decode, n_decodes = Engine.decode, itertools.count()

    def decoded(self: Engine, batches: Sequence[Any]) -> Any:
        if not next(n_decodes):
            time.sleep(1.0)
        return decode(self, batches)

    monkeypatch.setattr(Engine, "decode", decoded)
    run = ran(task, pair, "greedy", tmp_path / "run")
    assert max(record.seconds for record in run.records) < 1.0


def test_runs_of_before_encodings_were_told_apart_are_read(
    task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    run = ran(task, pair, "greedy,cmg", tmp_path / "run")
    for name in ("results.jsonl", "journal.jsonl"):
        path = run.folder / name
        told = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [json.dumps({k: v for k, v in t.items() if k != "encode"}) for t in told]
        path.write_text("\n".join(lines) + "\n")
    before = read_run(run.folder, task)
    assert before.records == tuple(replace(record, encode=0.0) for record in run.records)
    seconds = [r.seconds for r in before.records if r.method == "cmg" and r.problem is None]
    assert make_report(before, n_samples=10).parts[0].rows[1].seconds == pytest.approx(
        np.mean(seconds)
    )
