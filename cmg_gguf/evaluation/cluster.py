"""A run spread over the workers of a Dask cluster. Needs Dask, which the extra `cluster` brings."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cmg_gguf.errors import BackendError, UnsupportedError
from cmg_gguf.evaluation.answering import Answerer, Job, Work
from cmg_gguf.evaluation.records import Record


@dataclass(frozen=True)
class Dask:
    """The workers of the scheduler at `address`: one task is the questions about one image.

    Each worker process opens the model once, and needs this package and the same files at the same
    paths. It asks about as many images at once as it has threads, where the model answers several.
    A worker that is lost costs no item: its tasks are given to others.

    Raises UnsupportedError without Dask, BackendError if the scheduler cannot be reached or tasks
    keep losing their workers.
    """

    address: str

    def __call__(self, job: Job, works: Sequence[Work]) -> Iterator[Record]:
        distributed = _distributed()
        try:
            client = distributed.Client(self.address, set_as_default=False)
        except (OSError, ValueError) as exc:
            raise BackendError(
                f"no Dask scheduler answers at {self.address} ({exc}); start one: dask scheduler"
            ) from exc
        with client:
            # Not scattered: the job would be lost with the workers that hold it.
            futures = [client.submit(_do, job, work, pure=False) for work in works]
            try:
                for future in distributed.as_completed(futures, loop=client.loop):
                    yield from future.result()
            except distributed.KilledWorker as exc:
                raise BackendError(
                    f"workers died over and over at the same images ({exc}); see their logs, and "
                    "run again to go on"
                ) from exc
            finally:
                client.cancel(futures)


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as exc:
        raise UnsupportedError(
            "runs on a cluster need Dask: pip install 'dask[distributed]', or leave --dask out"
        ) from exc
    return distributed


# A worker process has several threads and one model, which answers for as many as it takes at once.
_changed = threading.Condition()
_opened: tuple[Job, Answerer] | None = None
_n_users = 0


def _do(job: Job, work: Work) -> list[Record]:
    """The records of a piece of work, on a worker."""
    with _answerer(job) as answerer:
        return list(answerer.answers([work]))


@contextmanager
def _answerer(job: Job) -> Iterator[Answerer]:
    """The worker's answerer for this job, opened where another was; shared if that takes several
    at once."""
    global _opened, _n_users
    with _changed:
        _changed.wait_for(lambda: _n_users == 0 or _is_shared(job))
        if _opened is None or _opened[0] != job:
            _opened = None  # frees the model before the next one is loaded
            _opened = job, Answerer(job, job.model.open())
        answerer = _opened[1]
        _n_users += 1
    try:
        yield answerer
    finally:
        with _changed:
            _n_users -= 1
            _changed.notify_all()


def _is_shared(job: Job) -> bool:
    return _opened is not None and _opened[0] == job and _opened[1].n_parallel > 1
