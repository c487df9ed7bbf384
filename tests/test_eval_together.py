"""Runs whose answers are made several at once say the same, and tell no costs."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evals import Squares, check_alike, files, methods, ran, squares
from patience import PATIENCE
from tiny_llava import TinyPair

from cmg_gguf.answer.scheduler import Scheduler
from cmg_gguf.engine.engine import Engine
from cmg_gguf.evaluation.answering import Answerer, Job, Work
from cmg_gguf.evaluation.items import groups, read_items
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.methods import chosen
from cmg_gguf.evaluation.report import make_report
from cmg_gguf.evaluation.report_text import markdown
from cmg_gguf.evaluation.run import Run, evaluate, read_run
from cmg_gguf.evaluation.task import BadItem, Item, Task
from cmg_gguf.evaluation.tasks.scenes import SceneCaptions, ScenePope
from cmg_gguf.guidance import Guidance
from cmg_gguf.llama.embeddings import Embeddings
from cmg_gguf.tiny.pair import embedded_pair

NAMES = "greedy,sample,cmg,yes-bias"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Squares:
    return squares(tmp_path_factory.mktemp("together") / "pictures")


@pytest.fixture(scope="module")
def alone(task: Squares, pair: TinyPair) -> Run:
    return ran(task, pair, NAMES, task.folder.parent / "alone")


@pytest.mark.parametrize("parallel", [2, 4, 8])
def test_answers_made_together_are_those_made_one_by_one(
    parallel: int, alone: Run, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    run = ran(task, pair, NAMES, tmp_path / "run", parallel=parallel)
    check_alike(run.records, alone.records)
    assert run.manifest == alone.manifest
    for name in ("run.json", "skipped.jsonl"):
        assert (run.folder / name).read_bytes() == (alone.folder / name).read_bytes()
    answered = [record for record in run.records if record.problem is None]
    assert {record.parallel for record in answered} == {parallel}


def test_relatives_made_together_are_those_made_one_by_one(
    task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    names = "greedy,cut,vcd,no-image,m3id,icd"
    one, together = (
        ran(task, pair, names, tmp_path / str(parallel), parallel=parallel) for parallel in (1, 4)
    )
    check_alike(together.records, one.records)


def built_in(task: Task, folder: Path, parallel: int) -> Run:
    cache = {"type_k": "f32", "type_v": "f32", "flash_attn": False}
    model = ModelFiles(*embedded_pair(), {"n_threads": 1, "n_parallel": parallel, **cache})
    return evaluate(task, model, chosen(["greedy", "cmg"], Guidance(alpha=0.5, beta=0.05)), folder)


@pytest.mark.parametrize("asked", [SceneCaptions, ScenePope])
def test_the_built_in_model_says_together_what_it_says_alone(asked: Any, tmp_path: Path) -> None:
    task = asked("test", "counter", 3)
    one, together = (built_in(task, tmp_path / str(n), n) for n in (1, 4))
    check_alike(together.records, one.records, within=0.05)


@pytest.fixture
def company(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers shared each decode. The first one waits until four are asked for: a thread
    that asks late would find that the others have ended."""
    found: list[int] = []
    decode, submit = Engine.decode, Scheduler.submit
    n_asked, all_asked = itertools.count(1), threading.Event()

    def asked(self: Scheduler, work: Any) -> None:
        submit(self, work)
        if next(n_asked) == 4:
            all_asked.set()

    def counted(self: Engine, batches: Sequence[Any]) -> Any:
        assert all_asked.wait(PATIENCE)
        found.append(len(batches))
        return decode(self, batches)

    monkeypatch.setattr(Scheduler, "submit", asked)
    monkeypatch.setattr(Engine, "decode", counted)
    return found


def test_captions_of_different_pictures_share_decodes(
    company: list[int], task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    class Captions(Squares):
        def items(self) -> Iterator[Item]:
            for item in read_items(task).items[: task.n]:
                yield replace(item, prompt="What is there?", max_tokens=8)

    ran(Captions(task.folder), pair, "greedy", tmp_path / "run", parallel=4)
    assert max(company) == 4
    company.clear()
    ran(Captions(task.folder), pair, "greedy", tmp_path / "alone", parallel=1)
    assert max(company) == 1


@pytest.mark.parametrize("parallel", [1, 4])
def test_a_picture_is_encoded_once_for_all_methods(
    parallel: int,
    task: Squares,
    pair: TinyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_encoded: list[Any] = []
    put = Embeddings.put

    def counted(self: Embeddings, key: Any, rows: Any) -> None:
        n_encoded.append(key)
        put(self, key, rows)

    monkeypatch.setattr(Embeddings, "put", counted)
    ran(task, pair, "greedy,sample,cmg", tmp_path / "run", parallel=parallel)
    assert len(n_encoded) == task.n
    assert len(set(n_encoded)) == len(n_encoded)


def test_a_question_that_does_not_fit_is_a_problem_of_its_own(
    alone: Run, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    class Long(Squares):
        def items(self) -> Iterator[Item | BadItem]:
            for item in task.items():
                if isinstance(item, Item) and item.id == "1.png/1":
                    item = replace(item, prompt="dog " * 400)
                yield item

    run = ran(Long(task.folder), pair, "greedy,sample", tmp_path / "run", parallel=4)
    problems = {record.item: record.problem for record in run.problems}
    assert set(problems) == {"1.png/1", "broken.png/0"}
    assert "prompt needs" in str(problems["1.png/1"])
    before = {record.key: record for record in alone.records}
    answered = [record for record in run.records if record.problem is None]
    check_alike(answered, [before[record.key] for record in answered])


def test_a_run_goes_on_with_another_number_at_once(
    alone: Run, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    for parallel in (4, 2):
        with pytest.raises(KeyboardInterrupt):
            ran(task, pair, NAMES, tmp_path / "run", parallel=parallel, progress=stop)
    seen: list[int] = []
    run = ran(task, pair, NAMES, tmp_path / "run", progress=lambda done, total: seen.append(done))
    assert 0 < seen[0] <= 20
    assert seen == list(range(seen[0], 53))
    check_alike(run.records, alone.records)
    assert {record.parallel for record in run.records} > {1}


def test_costs_are_told_of_answers_made_one_by_one_alone(
    alone: Run, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    assert "| 1.00x |" in markdown(make_report(alone, n_samples=50))
    assert "cost: seconds relative to greedy" in markdown(make_report(alone, n_samples=50))
    report = make_report(ran(task, pair, NAMES, tmp_path / "run", parallel=4), n_samples=50)
    text = markdown(report)
    assert "x |" not in text
    assert "for up to 4 answers were made at once" in text
    assert [row.cost for row in report.parts[0].rows] == pytest.approx(
        [float("nan")] * 4, nan_ok=True
    )


def test_a_run_of_before_there_was_company_is_read(
    alone: Run, task: Squares, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for path in alone.folder.iterdir():
        lines = path.read_text().splitlines(keepends=True)
        if path.name in ("results.jsonl", "journal.jsonl"):
            told = [json.loads(line) for line in lines]
            lines = [
                json.dumps({k: v for k, v in t.items() if k != "parallel"}) + "\n" for t in told
            ]
        (folder / path.name).write_text("".join(lines))
    assert read_run(folder, task).records == alone.records


def test_nothing_is_kept_of_images_that_are_done_with(task: Squares, pair: TinyPair) -> None:
    job = Job(task, files(pair, 4), methods("greedy,cmg,icd"), 0)
    names = frozenset(method.name for method in job.methods)
    works = [Work(tuple((item, names) for item in g)) for g in groups(read_items(task).items)]
    with job.model.open() as vlm:
        assert len(list(Answerer(job, vlm).answers(works))) == sum(w.n_answers for w in works)
        assert vlm.engine.prefixes.n_prefixes == 0
        assert vlm.engine.n_cells == 0
