"""The server under clients that leave, wait, hurry, cheat and dawdle; and its end."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, asking, program, serving

from cmg_gguf import ModelError
from cmg_gguf.server.limits import Limits
from cmg_gguf.stream import Run

LONG: dict[str, Any] = {"max_tokens": 400, "logit_bias": {"2": -100.0}}
"""An answer that does not end by itself."""


@pytest.fixture
def served() -> Iterator[Served]:
    with serving({"n_parallel": 2}, n_waiting=2) as running:
        yield running


@contextlib.contextmanager
def streaming(served: Served, body: dict[str, Any]) -> Iterator[Iterator[str]]:
    """Lines of a stream. Left, the client is gone."""
    with (
        served.client() as client,
        client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response,
    ):
        assert response.status_code == 200, response.read()
        yield response.iter_lines()


class Counted:
    """Decodes of an engine so far, and how many there were whenever an answer was cancelled."""

    def __init__(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        self.at_cancel: list[int] = []
        decode, cancel = served.vlm.engine.decode, Run.cancel

        def counted(batches: Any) -> Any:
            self.n += 1
            return decode(batches)

        def noted(run: Run) -> None:
            self.at_cancel.append(self.n)
            cancel(run)

        monkeypatch.setattr(served.vlm.engine, "decode", counted)
        monkeypatch.setattr(Run, "cancel", noted)


# --- clients that leave ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_leaves_frees_its_sessions_within_one_step(
    served: Served, monkeypatch: pytest.MonkeyPatch, stream: bool, n: int
) -> None:
    counted = Counted(served, monkeypatch)
    with leaving(served) as connection:
        post(connection, asking(0, stream=stream, n=n, **LONG))
        assert served.wait(lambda: counted.n > 12)
    assert served.wait(lambda: served.is_idle)
    assert len(counted.at_cancel) >= n
    assert counted.n - counted.at_cancel[0] <= 1
    assert counted.n < LONG["max_tokens"]
    assert served.post(asking(0)).status_code == 200


def test_a_client_that_leaves_the_queue_holds_nobody_up(served: Served) -> None:
    queue = served.service.queue
    with leaving(served) as first, leaving(served) as second:
        for connection in (first, second):
            post(connection, asking(0, **LONG))
        assert served.wait(lambda: len(served.vlm.engine.sessions) == 2)
        with leaving(served) as waiting:
            post(waiting, asking(1))
            assert served.wait(lambda: queue.n_taken == 3)
        assert served.wait(lambda: queue.n_taken == 2)
        assert len(served.vlm.engine.sessions) == 2
    assert served.wait(lambda: served.is_idle)


# --- clients that wait -------------------------------------------------------------------------


def test_what_is_beyond_the_queue_is_refused_with_when_to_come_again(served: Served) -> None:
    queue = served.service.queue
    with contextlib.ExitStack() as stack:
        for n in range(1, 5):  # two answers, two that wait
            post(stack.enter_context(leaving(served)), asking(0, **LONG))
            assert served.wait(lambda n=n: queue.n_taken + queue.n_waiting == n)
        refused = served.post(asking(0))
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        with served.client() as client:
            assert client.get("/health").status_code == 200
            metrics = client.get("/metrics").text
        assert "llamacpp:requests_processing 2.0" in metrics
        assert "llamacpp:requests_deferred 2.0" in metrics
        assert "cmg:requests_refused_total 1.0" in metrics
    assert served.wait(lambda: served.is_idle)
    assert served.post(asking(0)).status_code == 200


def test_who_waits_is_served_in_order(served: Served) -> None:
    order: list[int] = []

    def ask(i: int) -> None:
        assert served.post(asking(None, f"Say {i}.", max_tokens=4)).status_code == 200
        order.append(i)

    with leaving(served) as first, ThreadPoolExecutor(2) as pool:
        post(first, asking(0, n=2, **LONG))
        assert served.wait(lambda: len(served.vlm.engine.sessions) == 2)
        for i in range(2):
            pool.submit(ask, i)
            assert served.wait(lambda i=i: served.service.queue.n_taken == 3 + i)
        first.close()
    assert sorted(order) == [0, 1]


def test_answers_at_once_are_those_of_each_alone(served: Served) -> None:
    bodies = [asking(i % 3, cmg=["off", None][i % 2], max_tokens=12) for i in range(6)]
    with serving({"prefix_cells": 0, "n_parallel": 3}, n_waiting=8) as other:
        alone = [other.post(body).json()["choices"] for body in bodies]
        with ThreadPoolExecutor(6) as pool:
            together = [response.json()["choices"] for response in pool.map(other.post, bodies)]
    assert together == alone


@contextlib.contextmanager
def leaving(served: Served) -> Iterator[socket.socket]:
    """A connection that is cut behind the block."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        yield connection


def post(connection: socket.socket, body: dict[str, Any], *headers: str) -> None:
    """Sends a chat completion, and waits for nothing."""
    content = json.dumps(body).encode()
    head = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *headers,
    ]
    connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + content)


# --- clients that cheat and dawdle --------------------------------------------------------------


KEYS = ("first-key", "second-key")


def test_with_keys_only_who_has_one_is_answered_and_prompts_are_kept_by_key() -> None:
    with serving(keys=KEYS) as served, served.client() as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEYS[0]}):
            for path in ("/v1/models", "/props", "/slots", "/metrics"):
                assert client.get(path, headers=headers).status_code == 401
            refused = client.post("/v1/chat/completions", json=asking(0), headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/health").status_code == 200

        def n_cached(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            answered = client.post("/v1/chat/completions", json=asking(0), headers=headers)
            n: int = answered.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return n

        assert n_cached(KEYS[0]) == 0
        assert n_cached(KEYS[0]) > 0
        assert n_cached(KEYS[1]) == 0


def test_bodies_and_heads_have_limits() -> None:
    limits = Limits(body_bytes=20_000, header_bytes=4_000, read_seconds=0.5)
    with serving(limits=limits) as served, served.client() as client:
        headers = {"Content-Type": "application/json"}
        large = b" " * 20_001
        for content in (large, (large[i : i + 1000] for i in range(0, len(large), 1000))):
            with contextlib.suppress(httpx.WriteError, httpx.ReadError):
                response = client.post("/v1/chat/completions", content=content, headers=headers)
                assert response.status_code == 413
                assert "20000 bytes" in response.json()["error"]["message"]
        assert client.get("/health", headers={"X-Long": "x" * 5000}).status_code == 431
        with leaving(served) as connection:  # one that has no end
            connection.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 5000)
            assert b" 400 " in connection.recv(4000)
        assert client.post("/v1/chat/completions", json=asking(None)).status_code == 200


@pytest.fixture
def patient() -> Iterator[Served]:
    with serving(limits=Limits(write_seconds=4.0)) as running:
        yield running


def long_answer(served: Served, room: int) -> socket.socket:
    """A client of an answer of some MiB that has room for so many bytes of it."""
    host, port = served.url.removeprefix("http://").split(":")
    body = asking(0, stream=True, logprobs=True, top_logprobs=100, cmg="off", **LONG)
    data = json.dumps(body).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    client.connect((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    return client


def test_who_takes_nothing_of_an_answer_is_let_go(patient: Served) -> None:
    connections = patient.server.server_state.connections
    with long_answer(patient, 4096):
        assert patient.wait(lambda: connections)
        assert patient.wait(lambda: not connections, 60)
        assert patient.wait(lambda: patient.is_idle)
    assert patient.post(asking(0)).status_code == 200


def test_who_takes_it_slowly_gets_all_of_it(patient: Served) -> None:
    taken, n_waits = b"", 0
    with long_answer(patient, 2**17) as client:
        while part := client.recv(16384):
            taken += part
            if len(taken) // 200_000 > n_waits:
                n_waits += 1
                time.sleep(0.3)
    assert n_waits > 3
    assert b"[DONE]" in taken[-100:]


def test_who_sends_slowly_is_waited_for_only_so_long() -> None:
    with serving(limits=Limits(read_seconds=0.5)) as served:
        for sent in (b"", b"GET /health HTTP/1.1\r\nHost: a\r\nX-"):  # a head without end
            with leaving(served) as connection:
                connection.sendall(sent)
                started = time.monotonic()
                assert connection.recv(1000) == b""
                assert time.monotonic() - started < 10
        with leaving(served) as connection:  # the second head of a connection
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"200" in connection.recv(4000)
            connection.sendall(b"GET /hea")
            assert connection.recv(4000) in (b"", b'{"status":"ok"}')
        with leaving(served) as connection:  # a body without end
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{"
            connection.sendall(head)
            assert b" 408 " in connection.recv(4000)
        assert served.post(asking(None)).status_code == 200


def test_pages_elsewhere_may_read_answers_only_where_they_are_named() -> None:
    origin = "https://example.org"
    with serving(origins=(origin,)) as served, served.client(headers={"Origin": origin}) as client:
        allowed = client.get("/health").headers["access-control-allow-origin"]
        assert allowed == origin
        other = client.get("/health", headers={"Origin": "https://example.com"})
        assert "access-control-allow-origin" not in other.headers
    with serving() as served, served.client(headers={"Origin": origin}) as client:
        assert "access-control-allow-origin" not in client.get("/health").headers


def test_signs_of_life_stand_between_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(limits=Limits(ping_seconds=0.05)) as served:
        decode = served.vlm.engine.decode

        def slow(batches: Any) -> Any:
            time.sleep(0.2)
            return decode(batches)

        monkeypatch.setattr(served.vlm.engine, "decode", slow)
        with served.client() as client:
            body = {**asking(None, max_tokens=3), "stream": True}
            lines = client.post("/v1/chat/completions", json=body).text.splitlines()
    assert sum(line.startswith(": ping") for line in lines) >= 2
    assert "data: [DONE]" in lines


# --- its sleep and its end -----------------------------------------------------------------------


def test_a_model_that_nobody_asks_is_freed_and_loaded_again() -> None:
    with serving(sleep_seconds=1.0) as served:
        before = served.post(asking(0)).json()["choices"]
        first = served.vlm
        assert served.wait(lambda: served.service.lifetime.vlm is None)
        with pytest.raises(ModelError):
            first.generate("Hello")
        with served.client() as client:
            assert client.get("/health").status_code == 200
            assert client.get("/props").json()["is_sleeping"] is True
            assert "cmg:asleep 1.0" in client.get("/metrics").text
            assert [s["is_processing"] for s in client.get("/slots").json()] == [False] * 4
        assert served.service.lifetime.vlm is None  # nothing of that woke it
        with ThreadPoolExecutor(3) as pool:  # loaded once, for all that ask
            answers = [r.json()["choices"] for r in pool.map(served.post, [asking(0)] * 3)]
        assert answers == [before] * 3
        with streaming(served, asking(0, max_tokens=300, logit_bias={"2": -100.0})) as lines:
            for _ in lines:
                assert served.service.lifetime.vlm is not None


def test_a_model_that_cannot_be_loaded_again_is_told_and_holds_no_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(sleep_seconds=1.0) as served:
        lifetime, queue = served.service.lifetime, served.service.queue
        load = lifetime._load
        assert served.wait(lambda: lifetime.vlm is None)

        def gone() -> Any:
            raise ModelError("/models/x.gguf is gone")

        monkeypatch.setattr(lifetime, "_load", gone)
        refused = served.post(asking(0))
        assert refused.status_code == 503
        assert "/models" not in refused.text
        assert served.wait(lambda: queue.n_taken == 0)
        monkeypatch.setattr(lifetime, "_load", load)
        assert served.post(asking(0)).status_code == 200


def test_told_to_end_it_lets_answers_end_and_takes_no_new_ones() -> None:
    with program() as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        body = {**asking(0, max_tokens=300, logit_bias={"2": -100.0}), "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            said = [line for line in lines if line.startswith("data: ")]
        assert said[-1] == "data: [DONE]"
        assert json.loads(said[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            client.get("/health")


def test_an_answer_gets_no_longer_than_it_drains() -> None:
    with (
        program("--drain", "1") as (process, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        body = {**asking(0, max_tokens=4000, logit_bias={"2": -100.0}), "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            with contextlib.suppress(httpx.HTTPError):
                assert "data: [DONE]" not in list(lines)
        assert process.wait(20) == 0
        assert time.monotonic() - started < 15


def test_it_listens_at_a_unix_socket_and_takes_keys_from_a_file(tmp_path: Path) -> None:
    path, keys = tmp_path / "socket", tmp_path / "keys"
    keys.write_text("one\n\ntwo\n", "utf-8")
    with program("--unix-socket", str(path), "--api-key-file", str(keys)) as (_, url):
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url=url, timeout=60) as client:
            assert client.get("/v1/models").status_code == 401
            found = client.get("/v1/models", headers={"Authorization": "Bearer two"}).json()
    assert found["data"][0]["id"] == "tiny-llava"
