"""`cmg-gguf serve` as people start it: what it says, what it refuses, keys, names and TLS."""

from __future__ import annotations

import json
import re
import shlex
import socket
import ssl
import sys
from pathlib import Path

import httpx
import pytest
import trustme
from commands import environment, flat, invoke, run
from served import program


def failing(*arguments: str) -> tuple[int, str]:
    """Exit code of a command that ends by itself, and what it says on standard error."""
    ended = run("serve", *arguments, env={**environment(), "COLUMNS": "300"})
    assert ended.stdout == ""
    return ended.returncode, flat(ended.stderr)


def test_the_curl_line_that_it_prints_asks_it() -> None:
    with program() as (process, url):
        assert process.stderr is not None
        words = shlex.split(process.stderr.readline())
        assert words[0] == "curl"
        assert url in words[1]
        body = json.loads(words[words.index("-d") + 1])
        got = httpx.post(words[1], json={**body, "max_tokens": 2}, timeout=60, trust_env=False)
        assert got.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--predict", "0"], 2, "0 tokens are no answer"),
        (["--ssl-keyfile", __file__], 2, "https needs both"),
        (["--api-key", " "], 2, "an empty key is none"),
        (["--api-key-file", "/nowhere/keys"], 1, "/nowhere/keys cannot be read"),
        (["--media-path", "/nowhere"], 1, "/nowhere"),
        (["--parallel", "65"], 2, "less than or equal to 64"),
        (["--no-guidance", "--alpha", "1"], 2, "--no-guidance"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    flags: list[str], code: int, says: str
) -> None:
    result = invoke("serve", *flags)
    assert result.exit_code == code
    assert says in flat(result.output)
    assert "is served at" not in result.output


def test_without_the_servers_libraries_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith("cmg_gguf.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = invoke("serve")
    assert result.exit_code == 1
    assert "pip install 'cmg-gguf[server]'" in flat(result.output)


def test_an_empty_key_file_is_no_open_door(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("\n \n", "utf-8")
    result = invoke("serve", "--api-key-file", str(keys))
    assert result.exit_code == 1
    assert "has no key in it" in flat(result.output)


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, said = failing("--port", str(taken.getsockname()[1]))
    assert code == 1
    assert "address already in use" in said
    assert "name another --port" in said
    assert "Traceback" not in said


def test_keys_names_and_ports_are_read_from_the_environment() -> None:
    env = {"LLAMA_API_KEY": "secret", "LLAMA_ARG_ALIAS": "mine", "LLAMA_ARG_N_PARALLEL": "2"}
    with program(**env) as (_, url), httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
        assert len(client.get("/slots").json()) == 2


def test_it_speaks_https(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    issued.private_key_pem.write_to_path(key)
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    with program("--ssl-keyfile", str(key), "--ssl-certfile", str(chain)) as (_, url):
        assert re.fullmatch(r"https://127\.0\.0\.1:\d+", url)
        assert httpx.get(f"{url}/health", verify=trusted, trust_env=False).status_code == 200
