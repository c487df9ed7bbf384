"""One loop over the items of a task, kept in a folder.

    evaluate(task, ModelFiles("llava.gguf", "mmproj.gguf"), chosen(["greedy", "cmg"], Guidance()),
             "runs/pope")

    run.json        what is run: task, items, model, methods, seed
    journal.jsonl   every answer, as soon as it is there
    results.jsonl   at the end: every answer, in the order of the items
    skipped.jsonl   at the end: what could not be asked or answered, and why

A run that was stopped, however hard, goes on where it stood, and ends with the same results in all
but their timing. So do shards that are merged, and processes side by side. A model that answers
several at once gives the same but for rounding, see `ModelFiles`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from cmg_gguf.errors import EvaluationError, shown
from cmg_gguf.evaluation.answering import Job, Work
from cmg_gguf.evaluation.executors import Executor, in_process
from cmg_gguf.evaluation.items import WHOLE, Group, Read, Shard, groups, item_hash, read_items
from cmg_gguf.evaluation.manifest import (
    FORMAT,
    ModelFiles,
    counted,
    grown,
    manifest,
    places,
    task_from,
)
from cmg_gguf.evaluation.method import Method
from cmg_gguf.evaluation.methods import check_methods
from cmg_gguf.evaluation.records import (
    Journal,
    Record,
    first_difference,
    read_object,
    read_records,
    write_records,
    write_whole,
)
from cmg_gguf.evaluation.task import BadItem, Item, Task
from cmg_gguf.evaluation.yes_bias import settled
from cmg_gguf.evidence import EvidenceModel

Progress = Callable[[int, int], None]
"""progress(done, total) counts answers; those of an earlier, unfinished run are done."""

MANIFEST, JOURNAL, RESULTS, SKIPPED = (
    "run.json",
    "journal.jsonl",
    "results.jsonl",
    "skipped.jsonl",
)


@dataclass(frozen=True)
class Run:
    """A finished run.

    manifest: the content of run.json. items: in file order, of this shard. records: by item and
    method, in that order. bad: what was no item.
    """

    folder: Path
    task: Task
    manifest: dict[str, Any]
    items: tuple[Item, ...]
    bad: tuple[BadItem, ...]
    records: tuple[Record, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in order."""
        return tuple(self.manifest["methods"])

    @property
    def problems(self) -> tuple[Record, ...]:
        """Records of items that a method could not answer."""
        return tuple(record for record in self.records if record.problem is not None)


def evaluate(
    task: Task,
    model: ModelFiles,
    methods: Sequence[Method],
    folder: str | Path,
    *,
    seed: int = 0,
    limit: int | None = None,
    shard: Shard = WHOLE,
    leave_out: frozenset[str] = frozenset(),
    tuned_on: frozenset[str] = frozenset(),
    evidence: EvidenceModel | None = None,
    executor: Executor = in_process,
    progress: Progress | None = None,
) -> Run:
    """Answers every item of the task by every method, or what is left of that in `folder`: a run
    may go on with further methods, and with its files in other places.

    seed: of all draws, together with each item's id. limit: so many items, from the first on.
    leave_out: hashes of items to pass over. tuned_on: hashes of items that settings were tuned on;
    none of them may be among the items. evidence: weights of what is noted of each word, see
    `Record.words`; None = nothing is. executor: where the work is done. progress: what it raises
    ends the run, which can go on later.

    Raises EvaluationError: nothing to run, methods that do not fit, a folder that holds another
    run, items that were tuned on. Raises ModelError, BackendError, ...: what the model cannot do.
    """
    check_methods(methods, task)
    read = read_items(task, limit=limit, leave_out=leave_out)
    _refuse_tuned(task, read.items, tuned_on)
    mine = shard.of(groups(read.items))
    held = {item.id for group in mine for item in group}
    own = replace(read, items=tuple(item for item in read.items if item.id in held))
    if not own.items:
        raise EvaluationError(
            f"shard {shard} is empty: there are {len(groups(read.items))} images; cut into fewer"
        )
    told = manifest(task, model, methods, read.items, seed=seed, limit=limit)
    if evidence is not None:
        told = {**told, "evidence": asdict(evidence)}
    told = {**told, "shard": {"part": str(shard), **counted(own.items)}}
    folder = Path(folder)
    _claim(folder, told, places(task))
    # A copy, without what the task has read and keeps: a job travels.
    lean = replace(task) if is_dataclass(task) and not isinstance(task, type) else task
    job = Job(lean, model, tuple(methods), seed, evidence)
    with Journal(folder / JOURNAL) as journal:
        _answer_all(job, mine, journal, executor, progress or (lambda done, total: None))
        records = dict(journal.records)
    return _finish(folder, task, told, own, records)


def read_run(folder: str | Path, task: Task | None = None) -> Run:
    """A finished run. task: None = made as its run.json says; a task of your own must be given.

    Raises EvaluationError if the run is not finished, or if the task's files have changed since.
    """
    folder = Path(folder)
    told = _finished_manifest(folder)
    task = task if task is not None else task_from(told["task"])
    records = tuple(read_records(folder / RESULTS))
    read = _items_of(task, told["shard"], {record.item for record in records}, folder)
    return Run(folder, task, told, read.items, read.bad, records)


def merge(folders: Sequence[str | Path], into: str | Path, task: Task | None = None) -> Run:
    """The run that the shards in `folders` are the parts of. task: as in `read_run`.

    Raises EvaluationError if one is missing, unfinished, there twice, or of another run.
    """
    told = _whole([(Path(folder), _finished_manifest(Path(folder))) for folder in folders])
    records: dict[tuple[str, str], Record] = {}
    for folder in folders:
        records.update({record.key: record for record in read_records(Path(folder) / JOURNAL)})
    task = task if task is not None else task_from(told["task"])
    read = _items_of(task, told["items"], {item for item, _ in records}, Path(folders[0]))
    told = {**told, "shard": {"part": str(WHOLE), **counted(read.items)}}
    _claim(Path(into), told)
    write_records(Path(into) / JOURNAL, records.values())
    return _finish(Path(into), task, told, read, records)


def _answer_all(
    job: Job, mine: Sequence[Group], journal: Journal, executor: Executor, progress: Progress
) -> None:
    names = [method.name for method in job.methods]
    works = [work for group in mine if (work := _left(group, names, journal)).items]
    total = len(names) * sum(len(group) for group in mine)
    done = total - sum(work.n_answers for work in works)
    progress(done, total)
    if not works:
        return
    with closing(cast("Generator[Record, None, None]", executor(job, works))) as answers:
        for record in answers:
            journal.add(record)
            done += 1
            progress(done, total)


def _left(group: Group, names: Sequence[str], journal: Journal) -> Work:
    """The methods that have not answered all of a group yet, each for the whole group.

    A method's answers about an image go on from each other's KV cells, so half of them are begun
    anew to end the same, to the bit with a model that answers one at a time. What could not be
    answered is tried again.
    """

    def is_answered(item: Item, name: str) -> bool:
        record = journal.records.get((item.id, name))
        return record is not None and record.problem is None

    missing = frozenset(n for n in names if not all(is_answered(item, n) for item in group))
    return Work(tuple((item, missing) for item in group) if missing else ())


def _finish(
    folder: Path,
    task: Task,
    told: dict[str, Any],
    read: Read,
    records: Mapping[tuple[str, str], Record],
) -> Run:
    """Settles what depends on all items, and writes results in the order of the items."""
    methods = told["methods"]
    biased = [name for name, settings in methods.items() if settings["method"] == "YesBias"]
    final = settled(read.items, records, biased, told["seed"])
    ordered = tuple(final[item.id, name] for item in read.items for name in methods)
    skipped = [asdict(bad) for bad in read.bad] + [
        {"item": record.item, "method": record.method, "problem": record.problem}
        for record in ordered
        if record.problem is not None
    ]
    lines = (json.dumps(skip, ensure_ascii=False) + "\n" for skip in skipped)
    write_whole(folder / SKIPPED, "".join(lines))
    write_records(folder / RESULTS, ordered)
    return Run(folder, task, told, read.items, read.bad, ordered)


def _claim(folder: Path, told: dict[str, Any], moved: frozenset[str] = frozenset()) -> None:
    """Makes the folder this run's. Raises EvaluationError if it holds another one.

    moved: settings of the task that may be others than before, for the items tell their content.
    """
    path = folder / MANIFEST
    if path.exists():
        before = read_object(path)
        if found := first_difference(grown(before, told, moved), told):
            name, old, new = found
            raise EvaluationError(
                f"{folder} holds a run with {name}={shown(old)}, and {shown(new)} is asked for; go "
                "on with the same settings, or name another folder"
            )
        if before != told:
            # What has been answered is in the journal; without results the run is not finished.
            (folder / RESULTS).unlink(missing_ok=True)
            write_whole(path, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise EvaluationError(f"folder {folder} cannot be made ({exc.strerror})") from exc
    write_whole(path, json.dumps(told, indent=2, ensure_ascii=False) + "\n")


def _refuse_tuned(task: Task, items: Sequence[Item], tuned_on: frozenset[str]) -> None:
    found = sum(item_hash(task.name, item) in tuned_on for item in items)
    if found:
        raise EvaluationError(
            f"the settings were tuned on {found} of these {len(items)} items, which would flatter "
            "them; leave those out (--skip-tuned), or take other items"
        )


def _finished_manifest(folder: Path) -> dict[str, Any]:
    told = read_object(folder / MANIFEST)
    if told.get("format") != FORMAT:
        raise EvaluationError(
            f"{folder} holds a run of format {shown(told.get('format'))} and this version reads "
            f"{FORMAT}; run it again"
        )
    if not (folder / RESULTS).exists():
        raise EvaluationError(f"{folder} holds a run that is not finished; run it again to go on")
    return told


def _items_of(task: Task, told: Mapping[str, Any], ids: set[str], folder: Path) -> Read:
    """The task's items of these ids. Raises EvaluationError if they are not what `told` says."""
    read = read_items(task)
    items = tuple(item for item in read.items if item.id in ids)
    if counted(items)["sha256"] != told["sha256"]:
        raise EvaluationError(
            f"the items of {folder} are no longer what the files of {task.name} say ({len(items)} "
            f"of {told['count']} ids are there); put the files back as they were"
        )
    return Read(items, _bad(folder))


def _bad(folder: Path) -> tuple[BadItem, ...]:
    lines = (json.loads(line) for line in (folder / SKIPPED).read_text("utf-8").splitlines())
    return tuple(BadItem(**told) for told in lines if "where" in told)


def _whole(parts: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, Any]:
    """What the shards have in common. Raises EvaluationError if they are not the shards of one."""
    if not parts:
        raise EvaluationError("there is nothing to merge; name the folders of all shards")
    first, told = parts[0]
    seen: dict[int, Path] = {}
    for folder, other in parts:
        if found := first_difference(_common(told), _common(other)):
            name, one, two = found
            raise EvaluationError(
                f"{first} has {name}={shown(one)} and {folder} has {shown(two)}; merge shards of "
                "one run"
            )
        shard = Shard.parse(other["shard"]["part"])
        if shard.index in seen:
            raise EvaluationError(f"{seen[shard.index]} and {folder} are both shard {shard}")
        seen[shard.index] = folder
    if missing := sorted(set(range(1, shard.count + 1)) - set(seen)):
        raise EvaluationError(
            f"shard {', '.join(f'{index}/{shard.count}' for index in missing)} is missing; name "
            "its folder too"
        )
    return told


def _common(told: Mapping[str, Any]) -> dict[str, Any]:
    """What the shards of one run share. Folders of files may differ from machine to machine."""
    task = {key: value for key, value in told["task"].items() if key != "options"}
    count = Shard.parse(told["shard"]["part"]).count
    return {**told, "task": task, "shard": {"count": count}}
