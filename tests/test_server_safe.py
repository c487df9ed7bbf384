"""What a client must not be able to do: stop the others, learn what is on the machine, be used."""

from __future__ import annotations

import json
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, asking, serving
from starlette.datastructures import Headers

from cmg_gguf import ContextLengthError, ModelError, SamplingError
from cmg_gguf.sampling import check_grammar, schema_of
from cmg_gguf.server import running
from cmg_gguf.server.extent import CHARACTERS, MAX_BIASES, MAX_STOPS, check_extent, check_settings
from cmg_gguf.server.failures import Refused, refused
from cmg_gguf.server.limits import Limits
from cmg_gguf.server.visitors import Visitors

LONE = "\ud83d"
"""Half of an emoji, as a client sends it that cuts texts by UTF-16 units."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(limits=Limits(body_bytes=1 << 20, held_bytes=3 << 19)) as running:
        yield running


@pytest.fixture(scope="module")
def slow_served() -> Iterator[Served]:
    with serving(limits=Limits(read_seconds=1)) as running:
        yield running


def schema(value: Any) -> Any:
    return schema_of({"type": "json_object", "schema": value})


# --- no request costs more than what it is worth ------------------------------------------------


@pytest.mark.parametrize(
    "grammar",
    [
        *("[" * 200_000, '"' + '\\"' * 100_000, '"' + '\\"' * 100_000 + "\\", '"\\' * 100_000),
        *("[\\]" * 60_000, "[" + "\\]" * 100_000 + "\\", "#" * 200_000, "#\n" * 100_000),
    ],
    ids=range(8),
)
def test_a_grammar_is_checked_in_one_pass(grammar: str) -> None:
    started = time.perf_counter()
    check_grammar(grammar)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("pattern", ["{" + "1" * 200_000, "{1" * 100_000, "{," * 100_000])
def test_a_pattern_is_checked_in_one_pass(pattern: str) -> None:
    started = time.perf_counter()
    schema({"pattern": pattern})
    assert time.perf_counter() - started < 2


def test_a_schema_of_any_depth_is_told() -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(900):
        deep = {"properties": {"a": deep}}
    for value in (deep, {"pattern": deep}, {"enum": [deep]}):
        with pytest.raises(SamplingError, match="nests deeper than 200"):
            schema(value)


@pytest.mark.parametrize(
    "ref",
    ["https://example.org/a", "http://127.0.0.1/", "file:///etc/passwd", "//example.org/a", ""],
)
def test_a_schema_refers_to_itself_alone(ref: str) -> None:
    with pytest.raises(SamplingError, match="nothing is fetched"):
        schema({"properties": {"a": {"$ref": ref}}})
    schema({"$ref": "#/$defs/a", "$defs": {"a": {}}})


LONG = [
    [{"role": "user", "content": "a" * (CHARACTERS * 8)}],
    [{"role": "user", "content": [{"type": "text", "text": "a" * (CHARACTERS * 8)}]}],
    [{"role": "user", "content": ""}] * 9,
    [{"role": "user", "content": [{"type": "text", "text": ""}] * 2000}],
    [{"role": "assistant", "content": "", "tool_calls": [{"a": "b" * (CHARACTERS * 8)}]}],
    [{"role": "assistant", "content": "", "tool_calls": [{"image": [["b"] * 2000]}]}],
]


@pytest.mark.parametrize("messages", LONG)
def test_what_no_context_can_hold_is_told_before_it_is_read(messages: Any) -> None:
    with pytest.raises(ContextLengthError, match="longer than 8 tokens can be"):
        check_extent(messages, 8)


def test_pictures_are_no_text() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:" + "A" * 10_000}}
    check_extent([{"role": "user", "content": [part], "images": ["A" * 10_000]}], 8)
    check_extent("a question", 8)
    check_extent([7, {"role": "user", "content": 7}], 8)


def test_there_are_no_more_stops_and_biases_than_tokens_can_be_compared_with() -> None:
    check_settings({"stop": ["a"] * MAX_STOPS, "logit_bias": None})
    with pytest.raises(Refused, match="stop has 65 entries and the limit is 64"):
        check_settings({"stop": ["a"] * (MAX_STOPS + 1)})
    with pytest.raises(Refused, match="logit_bias has 4097 entries"):
        check_settings({"logit_bias": {str(i): 0.0 for i in range(MAX_BIASES + 1)}})


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"messages": [{"role": "user", "content": "a " * 200_000}]}, "messages"),
        ({"stop": ["a"] * 100_000}, "stop"),
        ({"logit_bias": {str(i): 0 for i in range(50_000)}}, "logit_bias"),
        ({"grammar": "root ::= (" * 3_000}, "grammar"),
    ],
)
def test_such_requests_are_refused_at_once_and_others_go_on(
    served: Served, more: dict[str, Any], param: str | None
) -> None:
    started = time.perf_counter()
    got = served.post({**asking(None), **more})
    assert got.status_code == 400
    assert got.json()["error"]["param"] == param
    assert time.perf_counter() - started < 5


def test_bodies_together_have_a_limit(served: Served) -> None:
    """Each is within its own limit, and none of them ends."""
    host, port = served.url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000000\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    with socket.create_connection((host, int(port))) as one:
        one.sendall(head.encode() + b" " * 900_000)
        time.sleep(0.3)
        with socket.create_connection((host, int(port))) as two:
            two.sendall(head.encode() + b" " * 900_000)
            told = two.recv(10_000)
        assert told.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 1" in told or b"retry-after: 1" in told
        one.sendall(b" " * 100_000)
        assert one.recv(10_000).startswith(b"HTTP/1.1 400")  # it was read, and is no JSON
    assert served.post(asking(None, max_tokens=2)).status_code == 200


def test_connections_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "N_TOLD", 4 - running.N_CONNECTIONS)
    with serving() as served:
        host, port = served.url.removeprefix("http://").split(":")
        held = [socket.create_connection((host, int(port))) for _ in range(4)]
        with socket.create_connection((host, int(port))) as over:
            over.settimeout(5)
            with suppress(ConnectionResetError):
                assert over.recv(1) == b""
        for one in held:
            one.close()
        assert served.wait(lambda: served.server.server_state.connections == set())
        assert served.post(asking(None, max_tokens=2)).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HT",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n",
        b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: ",
        b"",
    ],
)
def test_who_sends_a_byte_at_a_time_is_cut_off(slow_served: Served, head: bytes) -> None:
    """Whether the route reads a body or not."""
    host, port = slow_served.url.removeprefix("http://").split(":")
    started = time.monotonic()
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head)
        with suppress(ConnectionError):
            while time.monotonic() < started + 10:
                client.sendall(b"1" if b"chunked" not in head else b"1\r\n1\r\n")
                time.sleep(0.05)
    assert time.monotonic() - started < 4


def test_who_is_slow_and_in_time_is_answered(slow_served: Served) -> None:
    def slowly() -> Iterator[bytes]:
        for byte in json.dumps(asking(None, max_tokens=2)).encode():
            yield bytes([byte])
            time.sleep(0.001)

    with slow_served.client(headers={"Content-Type": "application/json"}) as client:
        for _ in range(2):  # on the same connection
            got = client.post("/v1/chat/completions", content=slowly())
            assert got.status_code == 200
            time.sleep(1.2)  # idle is not slow


# --- whatever is in a text, it is answered ------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", asking(None, LONE, max_tokens=2)),
        ("/v1/chat/completions", asking(None, stop=[LONE], max_tokens=2)),
        ("/v1/responses", {"input": LONE, "instructions": LONE, "max_output_tokens": 2}),
        ("/v1/responses", {"input": "a", "metadata": {"a": LONE}, "max_output_tokens": 2}),
        ("/api/generate", {"model": LONE, "prompt": LONE, "options": {"num_predict": 2}}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_half_a_character_is_no_failure(
    served: Served, path: str, body: dict[str, Any], stream: bool
) -> None:
    content = json.dumps({**body, "stream": stream})
    with served.client(headers={"Content-Type": "application/json"}) as client:
        got = client.post(path, content=content)
    assert got.status_code == 200
    got.content.decode("utf-8")


@pytest.mark.parametrize(
    "content",
    [
        *(b"[" * 100_000, b'{"messages":' + b'[{"a":' * 50_000, b"\xff\xfe", b"", b"null", b"7"),
        *(b'{"messages": [], "seed": ' + b"9" * 5000 + b"}", b'{"messages": [7]}'),
        *(b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', b'"a"'),
        *(b'{"messages": [{"role": "user", "content": "a"}], "top_p": 1e999}', b"{}"),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_what_is_no_request_is_told(served: Served, content: bytes, path: str) -> None:
    with served.client(headers={"Content-Type": "application/json"}) as client:
        got = client.post(path, content=content)
    assert got.status_code == 400
    assert got.json()["error"]["type"] == "invalid_request_error"


# --- errors do not tell what is there ------------------------------------------------------------


def test_a_model_that_cannot_be_loaded_is_not_named() -> None:
    told = refused(ModelError("/home/me/secret.gguf cannot be read"))
    assert (told.status, told.message) == (503, "the model is not loaded; try again later")


FILES = ["/etc/passwd", "/nothing", "file:///etc/passwd", "../../etc/passwd", "/dev/zero"]
HOSTS = ["http://127.0.0.1:1/", "http://localhost/", "https://example.org/a.png", "http://[::1]/"]


def test_pictures_that_are_not_sent_are_refused_alike_on_every_route(served: Served) -> None:
    told: dict[str, set[str]] = {}
    for name in FILES + HOSTS:
        url = {"type": "image_url", "image_url": {"url": name}}
        bodies: dict[str, dict[str, Any]] = {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": [url]}]},
            "/v1/responses": {"input": [{"role": "user", "content": [url]}]},
            "/api/chat": {"messages": [{"role": "user", "content": "", "images": [name]}]},
            "/api/generate": {"prompt": "a", "images": [name]},
        }
        for path, body in bodies.items():
            got = served.post(body, path)
            assert got.status_code == 400
            told.setdefault(path, set()).add(got.text)
    assert {path: len(texts) for path, texts in told.items()} == dict.fromkeys(told, 1)


# --- web pages do not ask in a visitor's name -----------------------------------------------------


def visit(method: str = "POST", visitors: Visitors | None = None, **headers: str) -> bool:
    """Whether a request is let in."""
    named = Headers({name.replace("_", "-"): value for name, value in headers.items()})
    try:
        (visitors or Visitors()).check(named, method)
    except Refused as exc:
        return exc.status != 403
    return True


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1:8080", "localhost:8080", "LOCALHOST", "[::1]:8080", "192.168.1.5", "cmg:8080"),
        *("nas.local", "cmg.internal", "a.localhost:1", socket.gethostname(), "box.home.arpa"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_address_and_a_local_name_are_this_machine(host: str, method: str) -> None:
    assert visit(method, host=host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "1.2.3",
        "a.b.",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_name_that_anyone_can_register_is_not(host: str, method: str) -> None:
    assert not visit(method, host=host)
    assert not visit(method, host=host, origin=f"http://{host}", sec_fetch_site="same-origin")
    name = host.removesuffix(":8080").removesuffix(".")
    assert visit(method, Visitors([name]), host=host)
    assert visit(method, Visitors(origins=[f"https://{name}"]), host=host)


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://[",
        "http://localhost:3000",
        "http://127.0.0.1",
        "file://",
    ],
)
def test_a_page_of_elsewhere_may_look_and_not_ask(origin: str) -> None:
    where: dict[str, Any] = {"host": "localhost:8080", "origin": origin}
    assert not visit(**where)
    assert not visit(**where, sec_fetch_site="cross-site")
    assert not visit(**where, sec_fetch_site="same-site")
    assert visit("GET", **where)
    assert visit(visitors=Visitors(origins=[origin]), **where)
    assert visit(visitors=Visitors(origins=["*"]), **where)


def test_the_servers_own_page_and_programs_may_ask() -> None:
    assert visit(host="localhost:8080", origin="http://localhost:8080")
    assert visit(host="localhost:8080")
    assert visit()
    # Behind a proxy the page has another name than the server; the browser says that they are one.
    assert visit(host="cmg:8080", origin="https://chat.example.org", sec_fetch_site="same-origin")


def test_with_keys_any_page_may_ask_that_has_one() -> None:
    elsewhere = {"Host": "chat.example.org", "Origin": "https://chat.example.org"}
    with serving() as open_to_all:
        got = httpx.post(
            f"{open_to_all.url}/v1/chat/completions", json=asking(None), headers=elsewhere
        )
        assert got.status_code == 403
        assert got.json()["error"]["type"] == "permission_error"
        assert "--server-name" in got.json()["error"]["message"]
    with serving(keys=("k",)) as keyed:
        for key, status in (("k", 200), ("x", 401)):
            headers = {**elsewhere, "Authorization": f"Bearer {key}"}
            body = asking(None, max_tokens=2)
            got = httpx.post(f"{keyed.url}/v1/chat/completions", json=body, headers=headers)
            assert got.status_code == status


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_form_is_no_request(served: Served, kind: str | None) -> None:
    """What a page may send without being asked whether it may."""
    headers = {} if kind is None else {"Content-Type": kind}
    content = json.dumps(asking(None, max_tokens=2)).encode()
    with served.client() as client:
        got = client.post("/v1/chat/completions", content=content, headers=headers)
    assert got.status_code == 400


# --- the socket -----------------------------------------------------------------------------------


def test_a_unix_socket_is_not_for_everyone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for _ in range(2):  # the second time, over what the first has left
        with serving(unix_socket=path):
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode & 0o007 == 0
            transport = httpx.HTTPTransport(uds=str(path))
            with httpx.Client(transport=transport, base_url="http://localhost") as client:
                assert client.get("/health").json() == {"status": "ok"}


def test_pictures_are_large_and_many_at_once_and_nothing_is_left(served: Served) -> None:
    """Sixteen clients that send what is refused: places, bodies and connections are free again."""

    def trouble(i: int) -> None:
        with served.client() as client:
            for body in (
                asking(0, max_tokens=1),
                {**asking(None), "stop": [""]},
                {"messages": "a"},
            ):
                client.post("/v1/chat/completions", json=body)
            client.post("/v1/chat/completions", content=b" " * (1 << 21))

    threads = [threading.Thread(target=trouble, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served.wait(lambda: served.is_idle)
    assert served.wait(lambda: not served.server.server_state.connections)
    assert served.post(asking(0, max_tokens=2)).status_code == 200
