"""Where the work of a run is done: in this process, or in several side by side."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Literal, TypeAlias, cast

from cmg_gguf.errors import BackendError, EvaluationError
from cmg_gguf.evaluation.answering import Answerer, Job, Work
from cmg_gguf.evaluation.records import Record

Executor = Callable[[Job, Sequence[Work]], Iterator[Record]]
"""Does the work, in any order, and yields each record as soon as it is there."""


def in_process(job: Job, works: Iterable[Work]) -> Iterator[Record]:
    """One piece of work after the other, with one model in this process; its answers several at
    once, if the model takes them."""
    with job.model.open() as vlm:
        yield from Answerer(job, vlm).answers(works)


@dataclass(frozen=True)
class Processes:
    """Several processes on this machine, each with a model of its own. count: >= 1.

    Each asks for the next piece of work when it has room for it. Raises EvaluationError for a count
    below 1; BackendError, while working, if a process dies.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise EvaluationError(f"{self.count} processes are out of range: 1 and up")

    def __call__(self, job: Job, works: Sequence[Work]) -> Iterator[Record]:
        left = iter(works)
        at_work: dict[Connection, SpawnProcess] = {}
        try:
            for _ in range(min(self.count, len(works))):
                with _ctrl_c_blocked():
                    connection, process = _started(job)
                    at_work[connection] = process
            while at_work:
                for connection in cast("list[Connection]", wait(list(at_work))):
                    told = _received(connection, left)
                    if isinstance(told, Record):
                        yield told
                    elif told == "done":
                        at_work.pop(connection).join()
        finally:
            for connection, process in at_work.items():
                connection.close()
                process.terminate()
            for process in at_work.values():
                process.join()


@dataclass(frozen=True)
class _Failure:
    """What ended the work of a process, and where in it."""

    error: Exception
    trace: str


_Told: TypeAlias = Record | _Failure | Literal["next", "done"]
"""What a process tells: "next": it has room for a piece of work, and waits for it."""


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, and a process that is started in it never hears it: a
    terminal sends it to all, also to those that are too young to ignore it themselves."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else the first process starts it, which unblocks Ctrl-C
    # Asked for alone: what blocks may raise a Ctrl-C of just before, and would not tell it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _started(job: Job) -> tuple[Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _received(connection: Connection, left: Iterator[Work]) -> _Told:
    """What a process tells; if it wants work, it gets it. Raises what ended it."""
    try:
        told = cast(_Told, connection.recv())
        if told == "next":
            connection.send(next(left, None))
    except (EOFError, OSError) as exc:
        raise BackendError(
            "a process of the run died, for want of memory as a rule; run again with fewer "
            "(--jobs) to go on"
        ) from exc
    if isinstance(told, _Failure):
        raise told.error from BackendError(f"in a process of the run:\n{told.trace}")
    return told


def _work(connection: Connection, job: Job) -> None:
    """What a process does: answers, until there is no more work."""
    # Ctrl-C is for the process that started this one, which blocks it until here, if it can.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def works() -> Iterator[Work]:
        connection.send("next")
        while (work := connection.recv()) is not None:
            yield work
            connection.send("next")

    try:
        for record in in_process(job, works()):
            connection.send(record)
        connection.send("done")
    except (EOFError, ConnectionError):
        pass  # nobody wants the rest
    except Exception as exc:
        connection.send(_Failure(exc, traceback.format_exc()))
