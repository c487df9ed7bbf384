"""A model hub on loopback: it speaks the protocol of huggingface.co, and notes what it is asked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Asked(NamedTuple):
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    """repos: the files of each repository. token: without it, they are not there. gated:
    repositories that nobody may download from. stalls_at: a download ends in silence behind that
    many bytes. ignores_ranges: as some mirrors do. broken: what a file is sent as, against its
    checksum. status: what every request is answered with.
    """

    repos: Mapping[str, Mapping[str, bytes]]
    token: str | None = None
    gated: frozenset[str] = frozenset()
    stalls_at: int | None = None
    ignores_ranges: bool = False
    broken: dict[str, bytes] = field(default_factory=dict)
    status: int | None = None
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> Hub:
        self._released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No one listens any more. Does nothing the second time."""
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def release(self) -> None:
        """Ends the connections that are stalled."""
        self._released.set()

    def stall(self) -> None:
        """Returns when it is released, or the hub stops."""
        self._released.wait(60)

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def downloads(self) -> list[tuple[str, str | None]]:
        """Name and range of every file that was asked for."""
        return [(a.path.rpartition("/")[2], a.range) for a in self.asked if _is_download(a)]


def _is_download(asked: Asked) -> bool:
    return asked.method == "GET" and "/resolve/" in asked.path


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self) -> None:
            asked = Asked(
                self.command, self.path, self.headers["Range"], self.headers["Authorization"]
            )
            hub.asked.append(asked)
            if hub.status is not None:
                return self._send(hub.status, b"", {})
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/models/"):
                repo, name = path.removeprefix("api/models/").partition("/revision/")[0], None
            else:
                repo, _, name = path.replace("/resolve/main/", "\n").partition("\n")
            files = hub.repos.get(repo)
            if hub.token and asked.token not in (None, f"Bearer {hub.token}"):
                refusal = "Invalid credentials in Authorization header"
                return self._send(401, b"", {"X-Error-Message": refusal})
            if files is None or (hub.token and asked.token is None):
                return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
            if name is None:
                about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
                return self._send(200, json.dumps(about).encode(), {})
            if repo in hub.gated:
                return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
            if name not in files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self._file(name, files[name], asked.range)

        def _file(self, name: str, content: bytes, wanted: str | None) -> None:
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            content = hub.broken.get(name, content)
            if wanted is None or hub.ignores_ranges:
                return self._send(200, content, headers)
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[start:], headers)

        def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.stalls_at is not None and status in (200, 206) and len(content) > hub.stalls_at:
                self.wfile.write(content[: hub.stalls_at])
                hub.stall()
                self.close_connection = True
            else:
                self.wfile.write(content)

    return Handler
