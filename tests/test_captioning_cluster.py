"""A folder captioned by two Dask workers, one of which dies, has the same files."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from captioned import MODEL, draw_pictures

from cmg_gguf.captioning import caption
from cmg_gguf.evaluation.cluster import Dask
from cmg_gguf.evaluation.manifest import ModelFiles

distributed = pytest.importorskip("distributed")

# Dask's own threads and sockets close when they please.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def test_a_worker_that_dies_costs_no_picture(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(12)]
    for folder in ("one", "two"):
        draw_pictures(tmp_path / folder, names)
    model = ModelFiles(MODEL.model, MODEL.mmproj, {"n_parallel": 1, "n_threads": 1})
    caption(tmp_path / "one", model, max_tokens=24)
    killed: list[int] = []
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        pids = list(client.run(os.getpid).values())

        def kill_one(done: int, total: int) -> None:
            if done and not killed:
                killed.append(done)
                os.kill(pids[0], signal.SIGKILL)

        made = caption(
            tmp_path / "two",
            model,
            executor=Dask(cluster.scheduler_address),
            progress=kill_one,
            max_tokens=24,
        )
    assert killed
    assert (made.n_written, made.problems) == (12, ())
    for i in range(12):
        one, two = ((tmp_path / folder / f"{i}.txt").read_text() for folder in ("one", "two"))
        assert one == two
