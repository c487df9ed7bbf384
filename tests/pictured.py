"""A host on loopback that sends pictures, and all that a bad host may send instead."""

from __future__ import annotations

import io
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image
from prompts import picture


def png(seed: int = 0, size: int = 56) -> bytes:
    """A PNG file of `prompts.picture(seed, size)`."""
    stream = io.BytesIO()
    Image.fromarray(picture(seed, size)).save(stream, "PNG")
    return stream.getvalue()


@dataclass
class PictureHost:
    """asked: each path and `Host` header so far. stopping: ends what is slow."""

    port: int
    asked: list[tuple[str, str]] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def picture_host(tls: ssl.SSLContext | None = None) -> Iterator[PictureHost]:
    host = PictureHost(0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(host))
    server.daemon_threads = True
    host.port = server.server_address[1]
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield host
    finally:
        host.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(host: PictureHost) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            host.asked.append((self.path, self.headers["Host"]))
            with suppress(OSError):  # the client has gone
                getattr(self, self.path.strip("/").partition("?")[0].replace(".", "_"))()

        def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

        def a_png(self) -> None:
            self._send(png())

        def redirect(self) -> None:
            self._send(b"", 302, Location="/a.png")

        def redirect_to_file(self) -> None:
            self._send(b"", 302, Location="file:///etc/passwd")

        def missing(self) -> None:
            self._send(png(), 404)

        def text(self) -> None:
            self._send(b"secret: 42")

        def cut(self) -> None:
            self._send(png()[:-40])

        def shorter_than_said(self) -> None:
            self._send(png(), Content_Length="100000")

        def longer_than_said(self) -> None:
            self._send(png()[:50], Content_Length="50")

        def compressed(self) -> None:
            self._send(b"\x1f\x8b" + bytes(100), Content_Encoding="gzip")

        def large(self) -> None:
            self._send(png(size=400))

        def no_http(self) -> None:
            self.wfile.write(b"220 mail.example.org ESMTP\r\n")

        def endless(self) -> None:
            self._send(png())
            while not host.stopping.is_set():
                self.wfile.write(bytes(1 << 16))

        def slow(self) -> None:
            self._send(b"", Content_Length="100000")
            while not host.stopping.wait(0.02):
                self.wfile.write(b"\x89")

        def slow_header(self) -> None:
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
            while not host.stopping.wait(0.02):
                self.wfile.write(b"x")

        def silent(self) -> None:
            host.stopping.wait(60)

    return Handler
