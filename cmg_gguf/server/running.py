"""The server as a process: uvicorn, its sockets and its end.

    Server(vlm, load, Options(port=8080), name="model").run()

Told to end (SIGTERM, Ctrl-C) it takes nothing new, and gives answers under way `drain_seconds`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cmg_gguf.errors import UnsupportedError
from cmg_gguf.server.app import new_app
from cmg_gguf.server.lifetime import Lifetime
from cmg_gguf.server.limits import Limits
from cmg_gguf.server.media import Media
from cmg_gguf.server.service import Defaults, Service
from cmg_gguf.vlm import GuidedVLM

N_CONNECTIONS = 512
"""Connections and requests at once, beyond which there is 503 at once."""
N_TOLD = 128
"""Connections beyond those that are told so. More are closed: a process has only so many files."""
KEEP_ALIVE_SECONDS = 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """How it is reached, by whom, and how much it takes. unix_socket: instead of host and port, for
    this user and group. names: by which it is asked where there are no keys, see `visitors`.
    sleep_seconds: the model is freed when nobody has asked for so long; None = never. draws_scenes:
    see `Service`."""

    host: str = "127.0.0.1"
    port: int = 8080
    unix_socket: Path | None = None
    ssl_key_file: Path | None = None
    ssl_cert_file: Path | None = None
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    n_waiting: int = 32
    sleep_seconds: float | None = None
    draws_scenes: bool = False
    limits: Limits = field(default_factory=Limits)
    media: Media = field(default_factory=Media)
    defaults: Defaults = field(default_factory=Defaults)


class Server(uvicorn.Server):
    """uvicorn's, with a service behind it."""

    def __init__(
        self, vlm: GuidedVLM, load: Callable[[], GuidedVLM], options: Options, *, name: str
    ) -> None:
        """load: loads the model again, where it sleeps. name: the model's, for clients."""
        self.on_start: Callable[[], None] = lambda: None
        """Called once requests are taken."""
        self._options = options
        self.service = Service(
            vlm,
            Lifetime(vlm, load, options.sleep_seconds),
            name=name,
            defaults=options.defaults,
            media=options.media,
            limits=options.limits,
            n_waiting=options.n_waiting,
            draws_scenes=options.draws_scenes,
        )
        names = (options.host, *options.names)
        app = new_app(self.service, keys=options.keys, origins=options.origins, names=names)
        super().__init__(uvicorn.Config(app, **_settings(options)))

    @property
    def needs_key(self) -> bool:
        """Whether requests must bring an API key."""
        return bool(self._options.keys)

    @property
    def address(self) -> str:
        """Where it is reached, once it listens; for a UNIX socket, what clients call it."""
        scheme = "http" if self._options.ssl_cert_file is None else "https"
        if self._options.unix_socket is not None:
            return f"{scheme}://localhost"
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        named = f"[{host}]" if ":" in host else host
        return f"{scheme}://{named}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says so."""
        path = self._options.unix_socket
        await super().startup(sockets if path is None else [_private_socket(path)])
        if self.started:
            self.on_start()


class Patient(H11Protocol):
    """uvicorn's HTTP/1.1, which waits only so long for a head: from the connection on, and from the
    first byte of each further one; and twice as long for a body, whether it is read or not. A
    client that takes nothing of what it is sent for `write_seconds` is let go."""

    read_seconds, write_seconds = Limits.read_seconds, Limits.write_seconds

    def connection_made(self, transport: Any) -> None:
        """Begins to wait."""
        super().connection_made(transport)
        if len(self.connections) > N_CONNECTIONS + N_TOLD:
            transport.abort()
        self._awaited: Any = h11.IDLE
        self._waiting = self.loop.call_later(self.read_seconds, self.transport.close)
        self._untaken: asyncio.TimerHandle | None = None
        # So that all that is not taken pauses it; with 0, TLS would be paused by nothing at all.
        transport.set_write_buffer_limits(high=1)

    def pause_writing(self) -> None:
        """Waits until something of what is sent is taken."""
        super().pause_writing()
        self._wait_for_taker(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Waits no longer for that."""
        super().resume_writing()
        self._stop_waiting_for_taker()

    def _wait_for_taker(self, n_left: int) -> None:
        self._stop_waiting_for_taker()
        self._untaken = self.loop.call_later(self.write_seconds, self._look_at_taker, n_left)

    def _look_at_taker(self, n_before: int) -> None:
        n_left = self.transport.get_write_buffer_size()
        if n_left < n_before:
            self._wait_for_taker(n_left)
        else:
            self.transport.abort()

    def _stop_waiting_for_taker(self) -> None:
        if self._untaken is not None:
            self._untaken.cancel()

    def data_received(self, data: bytes) -> None:
        """Reads what has come, and waits where that is no whole request."""
        super().data_received(data)
        state = self.conn.their_state
        if state is self._awaited:
            return
        self._waiting.cancel()
        seconds = {h11.IDLE: self.read_seconds, h11.SEND_BODY: 2 * self.read_seconds}
        self._awaited = state if state in seconds else None
        if self._awaited is not None:
            self._waiting = self.loop.call_later(seconds[state], self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._waiting.cancel()
        self._stop_waiting_for_taker()
        super().connection_lost(exc)


def _private_socket(path: Path) -> socket.socket:
    """A UNIX socket that the user and the group may connect to. One that a server has left there is
    replaced. Raises UnsupportedError where it cannot be."""
    with suppress(OSError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o117)
    try:
        made.bind(str(path))
    except OSError as exc:
        made.close()
        raise UnsupportedError(
            f"the socket {path} cannot be made ({exc.strerror}); name another"
        ) from exc
    finally:
        os.umask(before)
    return made


def _settings(options: Options) -> dict[str, Any]:
    limits = options.limits
    patience = {"read_seconds": limits.read_seconds, "write_seconds": limits.write_seconds}
    return {
        "host": options.host,
        "port": options.port,
        "ssl_keyfile": options.ssl_key_file,
        "ssl_certfile": options.ssl_cert_file,
        "http": type("Timed", (Patient,), patience),
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "h11_max_incomplete_event_size": limits.header_bytes,
        "limit_concurrency": N_CONNECTIONS,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": round(limits.drain_seconds),
    }
