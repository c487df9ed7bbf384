"""The server as a process: uvicorn, its sockets and its end.

    Server(vlm, load, Options(port=8080), name="model").run()

Told to end (SIGTERM, Ctrl-C) it takes nothing new, and gives answers under way `drain_seconds`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cmg_gguf.server.app import new_app
from cmg_gguf.server.lifetime import Lifetime
from cmg_gguf.server.limits import Limits
from cmg_gguf.server.media import Media
from cmg_gguf.server.service import Defaults, Service
from cmg_gguf.vlm import GuidedVLM

N_CONNECTIONS = 512
"""Connections and requests at once, beyond which there is 503 at once."""
KEEP_ALIVE_SECONDS = 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """How it is reached, by whom, and how much it takes. unix_socket: instead of host and port.
    sleep_seconds: the model is freed when nobody has asked for so long; None = never."""

    host: str = "127.0.0.1"
    port: int = 8080
    unix_socket: Path | None = None
    ssl_key_file: Path | None = None
    ssl_cert_file: Path | None = None
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    n_waiting: int = 32
    sleep_seconds: float | None = None
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
        )
        app = new_app(self.service, keys=options.keys, origins=options.origins)
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
        await super().startup(sockets)
        if self.started:
            self.on_start()


class Patient(H11Protocol):
    """uvicorn's HTTP/1.1, which waits only so long for a head: from the connection on, and from the
    first byte of each further one."""

    read_seconds = Limits.read_seconds

    def connection_made(self, transport: Any) -> None:
        """Begins to wait."""
        super().connection_made(transport)
        self._waiting = self.loop.call_later(self.read_seconds, self.transport.close)

    def data_received(self, data: bytes) -> None:
        """Reads what has come, and waits where that is no whole head."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._waiting.cancel()
        elif self._waiting.cancelled():
            self._waiting = self.loop.call_later(self.read_seconds, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._waiting.cancel()
        super().connection_lost(exc)


def _settings(options: Options) -> dict[str, Any]:
    limits = options.limits
    where: dict[str, Any] = {"host": options.host, "port": options.port}
    if options.unix_socket is not None:
        where = {"uds": str(options.unix_socket)}
    return {
        **where,
        "ssl_keyfile": options.ssl_key_file,
        "ssl_certfile": options.ssl_cert_file,
        "http": type("Timed", (Patient,), {"read_seconds": limits.read_seconds}),
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "h11_max_incomplete_event_size": limits.header_bytes,
        "limit_concurrency": N_CONNECTIONS,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": round(limits.drain_seconds),
    }
