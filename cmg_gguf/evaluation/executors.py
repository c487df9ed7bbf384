"""Where the work of a run is done: in this process, or in several side by side."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from cmg_gguf.errors import BackendError, EvaluationError
from cmg_gguf.evaluation.answering import Answerer, Job, Work
from cmg_gguf.evaluation.records import Record

Executor = Callable[[Job, Sequence[Work]], Iterator[Record]]
"""Does the work, in any order, and yields each record as soon as it is there."""


def in_process(job: Job, works: Sequence[Work]) -> Iterator[Record]:
    """One piece of work after the other, with one model in this process."""
    with job.model.open() as vlm:
        answerer = Answerer(job, vlm)
        for work in works:
            yield from answerer.answers(work)


@dataclass(frozen=True)
class Processes:
    """Several processes on this machine, each with a model of its own. count: >= 1.

    Raises EvaluationError for a count below 1; BackendError, while working, if a process dies.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise EvaluationError(f"{self.count} processes are out of range: 1 and up")

    def __call__(self, job: Job, works: Sequence[Work]) -> Iterator[Record]:
        pool = ProcessPoolExecutor(
            self.count,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(job,),
        )
        try:
            for future in as_completed([pool.submit(_do, work) for work in works]):
                yield from future.result()
        except BrokenProcessPool as exc:
            raise BackendError(
                "a process of the run died, for want of memory as a rule; run again with fewer "
                "(--jobs) to go on"
            ) from exc
        finally:
            pool.shutdown(cancel_futures=True)


_answerer: Answerer | Exception | None = None


def _begin(job: Job) -> None:
    # Ctrl-C is for the process that started this one. What an initializer raises would only show as
    # a broken pool: it is told by the first work.
    global _answerer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _answerer = Answerer(job, job.model.open())
    except Exception as exc:
        _answerer = exc


def _do(work: Work) -> list[Record]:
    if not isinstance(_answerer, Answerer):
        raise _answerer or EvaluationError("this process has no model")
    return list(_answerer.answers(work))
