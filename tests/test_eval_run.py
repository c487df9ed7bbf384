"""Runs in a folder: they end alike however they are stopped, cut or spread."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import evals
import pytest
from evals import Pressed, Squares, check_alike, methods, ran, squares, untimed
from tiny_llava import TinyPair

from cmg_gguf.errors import BackendError, EvaluationError, GuidanceError, ModelError
from cmg_gguf.evaluation import executors
from cmg_gguf.evaluation.answering import Job, Work
from cmg_gguf.evaluation.executors import Executor, Processes, in_process
from cmg_gguf.evaluation.items import Shard, groups, item_hash, read_items, seed_of
from cmg_gguf.evaluation.manifest import ModelFiles, task_from, task_identity
from cmg_gguf.evaluation.methods import Cmg, chosen
from cmg_gguf.evaluation.records import Journal, Record, read_records
from cmg_gguf.evaluation.run import Run, evaluate, merge, read_run
from cmg_gguf.evaluation.task import Item
from cmg_gguf.evaluation.tasks.pope import Pope
from cmg_gguf.guidance import Guidance, LayerSet

NAMES = "greedy,sample,cmg,yes-bias"
N_ANSWERS = 13 * 4


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def task(home: Path) -> Squares:
    return squares(home / "pictures")


@pytest.fixture(scope="module")
def whole(task: Squares, pair: TinyPair, home: Path) -> Run:
    return ran(task, pair, NAMES, home / "whole")


def test_results_stand_in_file_order(whole: Run, task: Squares) -> None:
    ids = [item.id for item in read_items(task).items]
    names = NAMES.split(",")
    assert [record.key for record in whole.records] == [(i, m) for i in ids for m in names]
    assert len(whole.records) == N_ANSWERS
    assert read_records(whole.folder / "results.jsonl") == list(whole.records)
    assert read_run(whole.folder, task) == whole


def test_what_is_broken_is_counted_and_named(whole: Run) -> None:
    assert {record.item for record in whole.problems} == {"broken.png/0"}
    assert len(whole.problems) == 4
    assert [bad.where for bad in whole.bad] == ["squares.json:7"]
    text = (whole.folder / "skipped.jsonl").read_text()
    skipped = [json.loads(line) for line in text.splitlines()]
    assert skipped[0] == {"where": "squares.json:7", "problem": "label is missing"}
    assert {entry["method"] for entry in skipped[1:]} == set(whole.methods)
    assert all("broken.png" in entry["problem"] for entry in skipped[1:])


def test_a_yes_no_record_tells_its_first_token(whole: Run) -> None:
    for record in whole.records:
        if record.problem is None:
            assert record.yes_margin is not None
            assert record.says_yes == (record.yes_lead is not None and record.yes_lead > 0) or (
                record.method in ("sample", "cmg")
            )
            assert 0 < record.tokens <= 4
            assert record.seconds > 0


def test_questions_about_no_image_are_asked_like_all_others(
    task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    class Texts(Squares):
        def items(self) -> Iterator[Item]:
            for item in read_items(task).items[:2]:
                yield replace(item, image=None)

    names = "greedy,cmg,vcd,no-image,m3id,icd"
    run = ran(Texts(task.folder), pair, names, tmp_path / "run")
    answers = {record.key: record.answer for record in run.records}
    assert not run.problems
    for item in run.items:
        # Without an image there is nothing to mask, to noise or to leave out.
        plain = answers[item.id, "greedy"]
        assert plain
        assert all(answers[item.id, name] == plain for name in ("cmg", "vcd", "no-image", "m3id"))


def test_a_finished_run_is_not_asked_again(
    whole: Run, task: Squares, monkeypatch: pytest.MonkeyPatch, pair: TinyPair
) -> None:
    (task.folder / "broken.png").rename(task.folder / "aside.png")
    (task.folder / "0.png").rename(task.folder / "broken.png")
    try:
        again = ran(task, pair, NAMES, whole.folder)
    finally:
        (task.folder / "broken.png").rename(task.folder / "0.png")
        (task.folder / "aside.png").rename(task.folder / "broken.png")
    # Only what could not be answered is tried again.
    assert not again.problems
    before = {r.key: r for r in whole.records if r.problem is None and r.method != "yes-bias"}
    assert {key: r for key, r in ((r.key, r) for r in again.records) if key in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [[1], [4, 1, 8]], ids=str)
def test_a_run_that_is_killed_goes_on_to_the_same_end(
    parallel: list[int], task: Squares, pair: TinyPair, home: Path
) -> None:
    reference = ran(task, pair, NAMES, home / f"reference{len(parallel)}")
    draw = random.Random(0)
    folder = home / f"killed{len(parallel)}"
    program = f"import sys; sys.path[:] = {sys.path}; import evals; evals.main(sys.argv[1:])"
    command = [sys.executable, "-c", program, str(folder), *map(str, pair), NAMES]
    stops = sorted(draw.sample(range(1, N_ANSWERS - 8), 10))
    for stop, n in zip(stops, itertools.cycle(parallel), strict=False):
        with subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) >= stop:
                    break
            process.kill()
        # As if the kill had come in the middle of a line.
        with (folder / "journal.jsonl").open("ab") as journal:
            journal.write(b'{"item": "0.png/0", "me')
    done = ran(task, pair, NAMES, folder, parallel=parallel[0])
    if parallel == [1]:
        assert untimed(done.records) == untimed(reference.records)
    check_alike(done.records, reference.records)
    assert (folder / "skipped.jsonl").read_bytes() == (
        reference.folder / "skipped.jsonl"
    ).read_bytes()


def test_shards_merged_are_the_whole(
    whole: Run, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    reference = ran(task, pair, NAMES, tmp_path / "reference")
    folders = [tmp_path / f"shard{i}" for i in (1, 2, 3)]
    for i, folder in enumerate(folders, start=1):
        part = ran(task, pair, NAMES, folder, shard=Shard(i, 3))
        assert len(part.records) < N_ANSWERS
        assert read_run(folder, task) == part
    merged = merge(folders[::-1], tmp_path / "merged", task)
    assert untimed(merged.records) == untimed(reference.records)
    assert merged.manifest == reference.manifest
    assert read_run(tmp_path / "merged", task) == merged
    with pytest.raises(EvaluationError, match="shard 2/3 is missing"):
        merge([folders[0], folders[2]], tmp_path / "none", task)
    with pytest.raises(EvaluationError, match="are both shard 1/3"):
        merge([folders[0], *folders], tmp_path / "none", task)
    with pytest.raises(EvaluationError, match="merge shards of one run"):
        merge([folders[0], reference.folder], tmp_path / "none", task)


@pytest.mark.parametrize("parallel", [1, 4])
def test_processes_side_by_side_give_the_same(
    parallel: int, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    reference = ran(task, pair, NAMES, tmp_path / "one")
    spread = ran(task, pair, NAMES, tmp_path / "two", parallel=parallel, executor=Processes(2))
    if parallel == 1:
        assert untimed(spread.records) == untimed(reference.records)
    check_alike(spread.records, reference.records)


def test_a_process_that_dies_ends_the_run_and_it_goes_on(
    task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    def kill_one(done: int, total: int) -> None:
        if done == 2:
            multiprocessing.active_children()[0].kill()

    with pytest.raises(BackendError, match=r"a process of the run died.*fewer \(--jobs\)"):
        ran(task, pair, NAMES, tmp_path / "run", executor=Processes(2), progress=kill_one)
    assert not multiprocessing.active_children()
    assert len(ran(task, pair, NAMES, tmp_path / "run").records) == N_ANSWERS


def test_an_interrupt_ends_all_processes_at_once(
    task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran(task, pair, NAMES, tmp_path / "run", executor=Processes(2), progress=stop)
    assert not multiprocessing.active_children()


def test_an_interrupt_does_not_reach_a_process_that_has_just_begun(
    task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    def pressed(job: Job, works: Sequence[Work]) -> Iterator[Record]:
        told: Any = Pressed(job.task)
        return Processes(2)(replace(job, task=told), works)

    run = ran(task, pair, "greedy", tmp_path / "run", executor=pressed)
    assert len(run.records) == N_ANSWERS // 4


def test_an_interrupt_while_processes_are_started_ends_those_that_are(
    task: Squares, pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(job: Job) -> Any:
        made = started(job)
        signal.raise_signal(signal.SIGINT)
        return made

    started, blocked = executors._started, signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(executors, "_started", press)
    with pytest.raises(KeyboardInterrupt):
        ran(task, pair, NAMES, tmp_path / "run", executor=Processes(2))
    assert not multiprocessing.active_children()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked


def test_what_the_model_cannot_do_ends_the_run_in_every_executor(
    task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    method = Cmg(Guidance(layers=LayerSet((40,))))
    ways: list[Executor] = [in_process, Processes(2)]
    for number, executor in enumerate(ways):
        for parallel in (1, 4):
            with pytest.raises(GuidanceError, match="layer 40 is out of range"):
                evaluate(
                    task,
                    evals.files(pair, parallel),
                    [method],
                    tmp_path / f"{number}-{parallel}",
                    executor=executor,
                )


def test_a_model_that_cannot_be_opened_is_told_by_every_executor(
    task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    swapped = ModelFiles(pair.mmproj, pair.llm, evals.OPTIONS)
    ways: list[Executor] = [in_process, Processes(2)]
    for number, executor in enumerate(ways):
        with pytest.raises(ModelError, match="are the two files swapped"):
            evaluate(task, swapped, methods("greedy"), tmp_path / str(number), executor=executor)


def test_results_do_not_depend_on_the_order_of_the_file(
    whole: Run, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    class Backwards(Squares):
        def items(self) -> Iterator[Item]:
            read = read_items(task)
            return iter(read.items[::-1])

    backwards = Backwards(task.folder)
    turned = ran(backwards, pair, "sample,greedy", tmp_path / "turned")
    before = {r.key: r for r in whole.records}
    for record in turned.records:
        if record.problem is None:
            assert record.answer == before[record.key].answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "run with seed=0, and 1 is asked for"),
        ({"limit": 5}, "items.count=13, and 5"),
        ({"shard": Shard(1, 2)}, r"shard.part='1/1', and '1/2'"),
        ({"names": "greedy"}, r"methods.sample="),
        ({"alpha": 1.0}, r"methods.cmg.guidance.alpha=3.0, and 1.0"),
        ({"n_ctx": 300}, r"model.options.n_ctx=256, and 300"),
        ({"max_tokens": 5}, r"task.options.max_tokens=4, and 5"),
    ],
)
def test_going_on_with_other_settings_names_the_difference(
    change: dict[str, Any], message: str, whole: Run, task: Squares, pair: TinyPair
) -> None:
    settings = dict(change)
    guidance = replace(evals.GUIDANCE, alpha=settings.pop("alpha", evals.GUIDANCE.alpha))
    names = str(settings.pop("names", NAMES)).split(",")
    n_ctx = settings.pop("n_ctx", 256)
    other = replace(task, max_tokens=settings.pop("max_tokens", 4))
    model = ModelFiles(pair.llm, pair.mmproj, {**evals.OPTIONS, "n_ctx": n_ctx})
    with pytest.raises(EvaluationError, match=message):
        evaluate(
            other,
            model,
            chosen(names, guidance),
            whole.folder,
            **settings,
        )


def test_a_run_goes_on_where_its_pictures_have_moved(
    whole: Run, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    folder, elsewhere = tmp_path / "run", squares(tmp_path / "elsewhere")
    shutil.copytree(whole.folder, folder)
    before = (folder / "journal.jsonl").read_bytes()
    kept = read_run(folder, task).records
    assert untimed(ran(elsewhere, pair, NAMES, folder).records) == untimed(kept)
    told = json.loads((folder / "run.json").read_text())
    assert told["task"]["options"]["folder"] == str(elsewhere.folder)
    assert untimed(read_run(folder, elsewhere).records) == untimed(kept)
    # The one that could not be answered was tried again, and nothing else.
    added = (folder / "journal.jsonl").read_bytes().removeprefix(before).splitlines()
    assert {json.loads(line)["item"] for line in added} <= {"broken.png/0"}


def test_a_run_takes_further_methods_and_ends_as_if_it_had_begun_with_them(
    whole: Run, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first = ran(task, pair, "greedy,sample", folder)
    with pytest.raises(RuntimeError):
        ran(task, pair, NAMES, folder, progress=_stop)
    with pytest.raises(EvaluationError, match="not finished"):
        read_run(folder, task)
    assert untimed(ran(task, pair, NAMES, folder).records) == untimed(whole.records)
    kept = {record.key: record for record in read_run(folder, task).records}
    assert all(kept[record.key] == record for record in first.records if not record.problem)
    with pytest.raises(EvaluationError, match=r"methods\.cmg"):
        ran(task, pair, "greedy,sample", folder)  # none is taken away


def _stop(done: int, total: int) -> None:
    raise RuntimeError("stopped")


def test_threads_and_answers_at_once_are_no_other_settings(
    whole: Run, task: Squares, pair: TinyPair
) -> None:
    silent = {"n_threads": 2, "n_parallel": 3, "verbose": False}
    model = ModelFiles(pair.llm, pair.mmproj, {**evals.OPTIONS, **silent})
    assert evaluate(task, model, methods(NAMES), whole.folder).records


def test_another_model_file_of_the_same_name_is_noticed(
    whole: Run, task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    data = bytearray(pair.llm.read_bytes())
    data[-1] ^= 1
    (tmp_path / pair.llm.name).write_bytes(data)
    model = ModelFiles(tmp_path / pair.llm.name, pair.mmproj, evals.OPTIONS)
    with pytest.raises(EvaluationError, match=r"model\.model\.sha256_of_ends"):
        evaluate(task, model, methods(NAMES), whole.folder)


@pytest.mark.parametrize(
    ("names", "yes_no", "message"),
    [
        ("greedy,greedy", True, "a name is there twice"),
        ("greedy,yes-bias", True, "add cmg to the methods"),
        ("greedy,cmg,yes-bias", False, "squares asks others too; leave it out"),
        ("best", True, "method 'best' is unknown: one of greedy"),
    ],
)
def test_methods_that_do_not_fit_are_refused(
    names: str, yes_no: bool, message: str, home: Path, pair: TinyPair, tmp_path: Path
) -> None:
    task = squares(home / "pictures", yes_no=yes_no)
    with pytest.raises(EvaluationError, match=message):
        ran(task, pair, names, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_items_that_were_tuned_on_are_refused_or_left_out(
    task: Squares, pair: TinyPair, tmp_path: Path
) -> None:
    read = read_items(task)
    tuned = frozenset(item_hash("squares", item) for item in read.items[:3])
    with pytest.raises(EvaluationError, match=r"tuned on 3 of these 13 items.*--skip-tuned"):
        ran(task, pair, "greedy", tmp_path / "run", tuned_on=tuned)
    run = ran(task, pair, "greedy", tmp_path / "run", tuned_on=tuned, leave_out=tuned)
    assert run.items == read.items[3:]
    assert read_run(tmp_path / "run", task) == run


def test_files_that_changed_since_are_noticed(
    whole: Run, task: Squares, home: Path, tmp_path: Path
) -> None:
    fewer = replace(task, n=3)
    with pytest.raises(EvaluationError, match="put the files back"):
        read_run(whole.folder, fewer)
    with pytest.raises(EvaluationError, match="none of this package's"):
        read_run(whole.folder)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_run(tmp_path, task)


def test_what_a_callback_raises_ends_the_run_and_it_goes_on(
    task: Squares, pair: TinyPair, tmp_path: Path, whole: Run
) -> None:
    def stop(done: int, total: int) -> None:
        assert total == 13
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran(task, pair, "greedy", tmp_path / "run", progress=stop)
    with pytest.raises(EvaluationError, match="not finished; run it again"):
        read_run(tmp_path / "run", task)
    seen: list[int] = []
    ran(task, pair, "greedy", tmp_path / "run", progress=lambda done, total: seen.append(done))
    assert 0 < seen[0] <= 5  # the image that it was at is begun anew
    assert seen == list(range(seen[0], 14))


# --- Without a model ---


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.add(Record(item="a", method="greedy", answer="naïve \ud800"))
        with pytest.raises(EvaluationError, match="another process writes"):
            Journal(tmp_path / "j.jsonl")
    with Journal(tmp_path / "j.jsonl") as journal:
        assert journal.records["a", "greedy"].answer == "naïve \ud800"


def test_a_damaged_line_within_a_journal_is_told(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    for line in ("{", "[]", '{"item": "a"}', '{"item": "a", "method": "b", "x": 1}'):
        path.write_text(f"{Record(item='a', method='b').line()}\n{line}\n")
        with pytest.raises(EvaluationError, match=r"line 2 of .* is no record"):
            Journal(path)


def test_images_are_grouped_and_items_without_one_are_not(task: Squares) -> None:
    found = groups(read_items(task).items)
    assert [len(group) for group in found] == [3, 3, 3, 3, 1]
    texts = [Item(str(i), None, "Why?") for i in range(3)]
    assert [len(group) for group in groups(texts)] == [1, 1, 1]


def test_shards_cover_all_groups_once(task: Squares) -> None:
    found = groups(read_items(task).items)
    for count in (1, 2, 3, 7):
        parts = [Shard(i, count).of(found) for i in range(1, count + 1)]
        assert sorted(id(group) for part in parts for group in part) == sorted(map(id, found))
    for text in ("0/2", "3/2", "1/0", "1", "a/b", "-1/2"):
        with pytest.raises(EvaluationError, match="shard"):
            Shard.parse(text)


def test_seeds_depend_on_all_that_they_are_drawn_from() -> None:
    seeds = {seed_of(s, i, m) for s in range(3) for i in ("a", "b") for m in ("x", "y")}
    assert len(seeds) == 12
    assert seed_of(0, "a", "b") != seed_of(0, "ab")
    assert all(0 <= seed < 2**32 - 1 for seed in seeds)


def test_a_task_of_this_package_is_made_again_from_its_description(tmp_path: Path) -> None:
    from cmg_gguf.evaluation.answers import STRICT

    task = Pope((tmp_path / "a.json", str(tmp_path / "b.json")), tmp_path, rule=STRICT)
    told = json.loads(json.dumps(task_identity(task)))
    assert task_identity(task_from(told)) == told
    assert task_from(told).rule is STRICT  # type: ignore[attr-defined]
