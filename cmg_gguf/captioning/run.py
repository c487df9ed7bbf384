"""A folder's captions, made and written: what was stopped, however hard, goes on where it stood.

While it works, a journal in the folder holds every caption, each written down before it goes into
its file; at the end the journal goes. So a picture whose caption is in the journal is not asked
about again, whatever its file holds, by the same settings and model.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cmg_gguf.captioning import layouts
from cmg_gguf.captioning.pictures import Picture, find_pictures
from cmg_gguf.captioning.review import Reviewed, placed, write_review
from cmg_gguf.captioning.settings import Captions, Existing
from cmg_gguf.captioning.texts import appended, caption_of, dressed, prompt_for, reads_tags
from cmg_gguf.errors import CaptionError
from cmg_gguf.evaluation.answering import Answerer, Job, Work
from cmg_gguf.evaluation.executors import Executor, in_process
from cmg_gguf.evaluation.items import WHOLE
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.method import Method, Question
from cmg_gguf.evaluation.records import Journal, Record, read_records
from cmg_gguf.evaluation.task import Item
from cmg_gguf.evaluation.tasks.folder import FolderPrompt
from cmg_gguf.guidance import Guidance
from cmg_gguf.request import Request
from cmg_gguf.sampling import MAX_SEED, Sampling

if TYPE_CHECKING:
    from cmg_gguf.vlm import GuidedVLM

Progress = Callable[[int, int], None]
"""progress(done, total) counts pictures; those of an earlier, unfinished run are done."""


@dataclass(frozen=True)
class Problem:
    """A picture without a caption, by its path within the folder, and why."""

    image: str
    problem: str


@dataclass(frozen=True)
class Captioned:
    """What came of a folder.

    n_written: captions that were made now. n_resumed: those that an unfinished run had made.
    n_skipped: pictures that had one. problems: pictures that have none, which `problem_file` lists.
    review: the files of the review, where there is one.
    """

    folder: Path
    n_written: int
    n_resumed: int
    n_skipped: int
    problems: tuple[Problem, ...]
    problem_file: Path | None
    review: tuple[Path, Path] | None = None


@dataclass(frozen=True)
class Planned:
    """A picture that is to be captioned: what is asked, and the file that holds its caption."""

    picture: Picture
    prompt: str
    file: Path


def caption(
    folder: str | Path,
    model: GuidedVLM | ModelFiles,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Captioned:
    """Captions the pictures of a folder, under guidance, and writes the captions beside them.

        caption("photos", vlm, prompt="Describe the image in one sentence.", prefix="ohwx,")

    model: a loaded one; or its files, for an `executor` that opens them where the work is done
    (`cmg_gguf.evaluation.Processes`, `Dask`). progress: what it raises ends the run, which can go
    on later. settings: those of `Captions`.

    A picture that cannot be read or answered is among the problems and stops nothing. Raises
    CaptionError: settings that cannot be, no pictures, files that cannot be read or written;
    EvaluationError: another process captions the same folder; ModelError, GuidanceError, ...: what
    the model cannot do.
    """
    wanted = Captions(**settings)
    run = _Run(Path(folder), _files(model), wanted)
    if isinstance(model, ModelFiles):
        work = executor or in_process
    elif executor is not None:
        raise CaptionError(
            "a loaded model answers in this process alone: for an executor give its files, "
            "ModelFiles(model, mmproj)"
        )
    else:
        loaded = model

        def work(job: Job, works: Sequence[Work]) -> Iterator[Record]:
            return Answerer(job, loaded).answers(works)

    return run.finish(work, progress or (lambda done, total: None))


def planned(folder: str | Path, model: ModelFiles | None, **settings: Any) -> tuple[Planned, ...]:
    """What `caption` would ask about and write, in order; nothing is asked or written.

    model: None = not here, so that no unfinished run is known to be its. Raises CaptionError,
    ModelError.
    """
    known = model or ModelFiles("", "")
    run = _Run(Path(folder), known, Captions(**settings), name="" if model is None else None)
    done = run.finished_before()
    return tuple(todo for todo in run.plan().todo if todo.picture.name not in done)


@dataclass(frozen=True)
class _Captioner(Method):
    """How a caption is asked for. name: says everything that makes it this caption."""

    name: str
    guidance: Guidance
    sampling: Sampling

    def request(self, question: Question) -> Request:
        sampling = replace(self.sampling, seed=question.seed)
        return question.ask(guidance=self.guidance, sampling=sampling)


@dataclass(frozen=True)
class _Plan:
    todo: tuple[Planned, ...]
    n_skipped: int
    problems: tuple[Problem, ...]


class _Run:
    """One call of `caption`."""

    def __init__(
        self, folder: Path, model: ModelFiles, wanted: Captions, name: str | None = None
    ) -> None:
        """name: of the method; None = by model and settings."""
        self._folder, self._model, self._wanted = folder, model, wanted
        pictures = find_pictures(folder, recursive=wanted.recursive)[: wanted.limit]
        shard = wanted.shard
        self._pictures = pictures[shard.index - 1 :: shard.count]
        if not self._pictures:
            raise CaptionError(
                f"shard {shard} is empty: there are {len(pictures)} pictures; cut into fewer"
            )
        _check_writable(self._pictures, folder)
        self._part = part = "" if shard == WHOLE else f".{shard.index}-of-{shard.count}"
        self._journal = folder / f".cmg-caption.{wanted.to}{part}.journal"
        self._problem_file = folder / f"caption-problems{part}.jsonl"
        self._captions = layouts.captions_in(folder, wanted.to, f".cmg-caption{part}.part")
        told = _name(model, wanted) if name is None else name
        self._method = _Captioner(told, wanted.guidance, wanted.sampling)

    def finished_before(self) -> set[str]:
        """Names of pictures that an unfinished run of the same settings has captioned."""
        if not self._journal.exists():
            return set()
        return self._finished(read_records(self._journal))

    def finish(self, executor: Executor, progress: Progress) -> Captioned:
        with Journal(self._journal) as journal:
            before = list(journal.records.values())
            finished = self._recovered(before)
            plan = self.plan(but=finished)
            try:
                problems = self._answered(executor, plan, journal, len(finished), progress)
            finally:
                self._captions.save()
            problems = [*plan.problems, *problems]
            review = self._review(journal.records.values())
            self._tell(problems)
            self._journal.unlink()  # the last: until then all can go on from it
        return Captioned(
            folder=self._folder,
            n_written=len(plan.todo) + len(plan.problems) - len(problems),
            n_resumed=len(finished),
            n_skipped=plan.n_skipped,
            problems=tuple(sorted(problems, key=lambda problem: problem.image)),
            problem_file=self._problem_file if problems else None,
            review=review,
        )

    def plan(self, but: frozenset[str] | set[str] = frozenset()) -> _Plan:
        """What is left to do, but for the pictures of these names."""
        todo, problems, n_skipped = list[Planned](), list[Problem](), 0
        for picture in self._pictures:
            if picture.name in but:
                continue
            try:
                file = self._captions.file(picture)
                if self._wanted.existing == "skip" and self._is_held(picture):
                    n_skipped += 1
                    continue
                if self._wanted.existing == "append":
                    self._captions.held(picture)  # or it would be asked in vain
                tags = sidecar_tags(picture) if reads_tags(self._wanted.prompt) else ""
            except CaptionError as exc:
                problems.append(Problem(picture.name, str(exc)))
            else:
                prompt = prompt_for(self._wanted.prompt, picture, tags, self._wanted.max_words)
                todo.append(Planned(picture, prompt, file))
        return _Plan(tuple(todo), n_skipped, tuple(problems))

    def _is_held(self, picture: Picture) -> bool:
        try:
            return self._captions.held(picture) is not None
        except CaptionError:
            return True  # something is there, and stays

    def _answered(
        self,
        executor: Executor,
        plan: _Plan,
        journal: Journal,
        n_before: int,
        progress: Progress,
    ) -> list[Problem]:
        pictures = {todo.picture.name: todo.picture for todo in plan.todo}
        problems: list[Problem] = []
        done, total = n_before, n_before + len(pictures)
        progress(done, total)
        if not pictures:
            return problems
        works = [self._work(todo) for todo in plan.todo]
        with closing(cast("Generator[Record, None, None]", executor(self._job(), works))) as made:
            for record in made:
                done += 1
                try:
                    self._keep(record, pictures[record.item], journal)
                except _NoCaptionError as exc:
                    problems.append(Problem(record.item, str(exc)))
                progress(done, total)
        return problems

    def _work(self, todo: Planned) -> Work:
        item = Item(
            todo.picture.name,
            todo.picture.path.absolute(),
            todo.prompt,
            max_tokens=self._wanted.max_tokens,
        )
        return Work(((item, frozenset([self._method.name])),))

    def _job(self) -> Job:
        seed = self._wanted.sampling.seed
        return Job(
            # A job only asks it for the pictures.
            FolderPrompt(self._folder, self._wanted.prompt),
            self._model,
            (self._method,),
            secrets.randbelow(MAX_SEED + 1) if seed is None else seed,
            self._wanted.evidence,
        )

    def _keep(self, record: Record, picture: Picture, journal: Journal) -> None:
        """Writes an answer down, first in the journal. Raises _NoCaptionError, CaptionError."""
        if record.problem is not None:
            raise _NoCaptionError(record.problem)
        wanted = self._wanted
        text = caption_of(
            record.answer, max_words=wanted.max_words, is_whole=record.finish == "stop"
        )
        if not text:
            thought = f" after {record.reasoning} tokens of reasoning" if record.reasoning else ""
            raise _NoCaptionError(
                f"the model said nothing{thought}: raise max_tokens (-n), or ask otherwise"
            )
        said, text = text, dressed(text, wanted.prefix, wanted.suffix)
        start = text.index(said, len(wanted.prefix.lstrip()))
        words = record.words and placed(record.words, record.answer, text, start, start + len(said))
        journal.add(replace(record, answer=text, words=words))
        self._put(picture, text, wanted.existing)

    def _put(self, picture: Picture, text: str, existing: Existing) -> None:
        """Writes a caption, as often as is wanted with the same outcome."""
        held = self._captions.held(picture) if existing != "overwrite" else None
        if held is not None:
            if existing == "skip" or held.endswith(text):
                return
            text = appended(held, text)
        self._captions.put(picture, text)

    def _recovered(self, records: Sequence[Record]) -> set[str]:
        """Writes what an unfinished run had not written yet; the names of what need not be asked.

        What it made by other settings is kept where nothing else is.
        """
        pictures = {picture.name: picture for picture in self._pictures}
        # Beside the pictures, all but the last have been written, and may have been edited since.
        last = records[-1:] if self._wanted.to == "txt" else records
        for record in last:
            if record.item in pictures:
                own = record.method == self._method.name
                self._put(
                    pictures[record.item], record.answer, self._wanted.existing if own else "skip"
                )
        return self._finished(records) & set(pictures)

    def _review(self, records: Iterable[Record]) -> tuple[Path, Path] | None:
        if self._wanted.evidence is None:
            return None
        mine = [record for record in records if record.method == self._method.name]
        reviewed = (Reviewed(r.item, r.answer, r.words or []) for r in mine)
        return write_review(self._folder, self._part, reviewed, self._wanted.evidence)

    def _finished(self, records: Sequence[Record]) -> set[str]:
        return {record.item for record in records if record.method == self._method.name}

    def _tell(self, problems: Sequence[Problem]) -> None:
        if problems:
            lines = (
                json.dumps({"image": told.image, "problem": told.problem}) + "\n"
                for told in sorted(problems, key=lambda problem: problem.image)
            )
            layouts.write_at_once(self._problem_file, "".join(lines), ".cmg-caption.part")
        else:
            with suppress(FileNotFoundError):
                self._problem_file.unlink()


class _NoCaptionError(Exception):
    """What came of a picture is no caption; the message says why."""


def sidecar_tags(picture: Picture) -> str:
    """What {tags} stands for. Raises CaptionError."""
    return " ".join(layouts.sidecar_text(picture).split())


def _files(model: GuidedVLM | ModelFiles) -> ModelFiles:
    if isinstance(model, ModelFiles):
        return model
    return ModelFiles(model.model.path, model.projector.path)


def _name(model: ModelFiles, wanted: Captions) -> str:
    """The same for two runs whose captions of a picture are the same, as far as they are drawn
    alike."""
    told = replace(wanted, limit=None, shard=WHOLE, recursive=False)
    identity = json.dumps(model.identity, sort_keys=True, default=str)
    digest = hashlib.sha256(f"{told!r} {identity}".encode("utf-8", "surrogatepass"))
    return f"caption-{digest.hexdigest()[:16]}"


def _check_writable(pictures: Sequence[Picture], folder: Path) -> None:
    """Before anything is asked. Raises CaptionError."""
    for directory in {folder, *(picture.path.parent for picture in pictures)}:
        if not os.access(directory, os.W_OK | os.X_OK):
            raise CaptionError(
                f"nothing can be written in folder {directory}: make it writable, or caption a copy"
            )
