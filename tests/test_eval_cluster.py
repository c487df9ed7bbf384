"""A run on two Dask workers, one of which dies, ends as it does in one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evals import Squares, check_alike, ran, squares, untimed
from tiny_llava import TinyPair

from cmg_gguf.errors import BackendError
from cmg_gguf.evaluation.cluster import Dask

distributed = pytest.importorskip("distributed")

NAMES = "greedy,cmg,sample,yes-bias"

# Dask's own threads and sockets close when they please.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=2,
        processes=True,
        dashboard_address=None,
        silence_logs=50,
    ) as made:
        yield made


@pytest.mark.parametrize("parallel", [1, 4])
def test_a_worker_that_dies_costs_no_item(
    parallel: int, cluster: Any, pair: TinyPair, tmp_path: Path
) -> None:
    task: Squares = squares(tmp_path / "pictures", n=16, max_tokens=16)
    reference = ran(task, pair, NAMES, tmp_path / "one")
    with distributed.Client(cluster, set_as_default=False) as client:
        pids = list(client.run(os.getpid).values())
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        if done and not killed:
            killed.append(done)
            os.kill(pids[0], signal.SIGKILL)

    executor = Dask(cluster.scheduler_address)
    settings: dict[str, Any] = {"executor": executor, "progress": kill_one, "parallel": parallel}
    spread = ran(task, pair, NAMES, tmp_path / "two", **settings)
    assert len(killed) == 1
    if parallel == 1:
        assert untimed(spread.records) == untimed(reference.records)
    check_alike(spread.records, reference.records)


@pytest.mark.slow
def test_no_scheduler_is_an_error_that_names_the_address(pair: TinyPair, tmp_path: Path) -> None:
    task: Squares = squares(tmp_path / "pictures", n=1)
    import dask

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(BackendError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"),
    ):
        ran(task, pair, "greedy", tmp_path / "run", executor=Dask("tcp://127.0.0.1:9"))
