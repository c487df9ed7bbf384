"""Two servers behind HAProxy, one of which is killed under load: see scripts/haproxy.cfg."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import asking, program

HAPROXY = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
CONFIGURATION = Path(__file__).parent.parent / "scripts" / "haproxy.cfg"
ENDLESS: dict[str, Any] = {"max_tokens": 300, "logit_bias": {"2": -100.0}, "stream": True}

pytestmark = pytest.mark.skipif(HAPROXY is None, reason="no haproxy here: apt-get install haproxy")


@contextmanager
def balanced(one: str, two: str, log: Path) -> Iterator[str]:
    """The address of a balancer over two servers. log: what it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    servers = {"SERVER_ONE": one, "SERVER_TWO": two, "LISTEN": listen}
    env = {**os.environ, **{k: v.removeprefix("http://") for k, v in servers.items()}}
    assert HAPROXY is not None
    command = [HAPROXY, "-db", "-f", str(CONFIGURATION)]
    with log.open("wb") as said:
        process = subprocess.Popen(command, env=env, stdout=said, stderr=said)
    try:
        url = f"http://{listen}"
        for _ in range(200):
            try:
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait()


def streamed(url: str) -> str:
    """The last line of a stream's data; "" where it broke off."""
    last = ""
    try:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=asking(0, **ENDLESS), timeout=60
        ) as response:
            for line in response.iter_lines():
                last = line if line.startswith("data: ") else last
    except httpx.HTTPError:
        return ""
    return last if last == "data: [DONE]" else ""


def n_busy(url: str) -> int:
    slots = httpx.get(f"{url}/slots", trust_env=False).json()
    return sum(slot["is_processing"] for slot in slots)


@pytest.mark.slow
def test_a_server_that_is_killed_takes_nobody_elses_answer_with_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with program() as (first, one), program() as (_, two), balanced(one, two, log) as url:
        with ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(streamed, url) for _ in range(4)]
            for _ in range(500):
                if n_busy(one) == n_busy(two) == 2:
                    break
                time.sleep(0.01)
            assert n_busy(one) == n_busy(two) == 2
            first.send_signal(signal.SIGKILL)
            first.wait()
            for _ in range(10):  # from the first on: what cannot be handed over goes to the other
                body = asking(0, max_tokens=2)
                got = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
                assert got.status_code == 200
            ends = [stream.result() for stream in streams]
        assert sorted(ends) == ["", "", "data: [DONE]", "data: [DONE]"]
        for _ in range(200):  # two checks that it does not answer
            if "models/one is DOWN" in log.read_text("utf-8"):
                break
            time.sleep(0.05)
        assert "models/one is DOWN" in log.read_text("utf-8")
        assert "models/two is DOWN" not in log.read_text("utf-8")
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
