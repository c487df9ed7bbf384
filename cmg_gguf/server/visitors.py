"""Web pages must not ask in a visitor's name.

A server without keys trusts whoever reaches it, and a browser reaches it for every page that it
shows. Two things give such a page away: it came from elsewhere (`Origin`), or it has its own name
lead to this machine (DNS rebinding), which then stands in `Host`. An address, or a name that no one
can register, was asked by who knows this machine.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers

from cmg_gguf.errors import shown
from cmg_gguf.server.failures import Refused

_LOCAL = (".localhost", ".local", ".internal", ".home.arpa")
"""Domains that are nobody's."""


class Visitors:
    """Which requests may have come by way of a browser.

    names: by which the server is known, besides those above. origins: of pages elsewhere that may
    ask; "*" = all.
    """

    def __init__(self, names: Iterable[str] = (), origins: Iterable[str] = ()) -> None:
        self._origins = frozenset(origins)
        known = [*names, *(_name(origin.partition("://")[2]) for origin in self._origins)]
        self._names = {name.lower() for name in (*known, socket.gethostname())}

    def check(self, headers: Headers, method: str) -> None:
        """Raises Refused for a request that a page elsewhere has sent."""
        host = headers.get("host", "")
        if host and not self._knows(host):
            raise Refused(
                f"this server does not know itself as {shown(host)}: ask it by its address, or "
                "start it with --server-name for that name, or with --api-key",
                403,
                kind="permission_error",
            )
        if method in ("GET", "HEAD", "OPTIONS") or headers.get("sec-fetch-site") == "same-origin":
            return
        origin = headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins:
            return
        if origin.partition("://")[2].lower() != host.lower():
            raise Refused(
                f"web pages of {shown(origin)} may not ask here: start the server with "
                "--cors-origin for them, or with --api-key",
                403,
                kind="permission_error",
            )

    def _knows(self, host: str) -> bool:
        name = _name(host)
        return "." not in name or name.endswith(_LOCAL) or name in self._names or _is_address(name)


def _name(host: str) -> str:
    """The name in a `Host` header, without port, brackets and the root's dot."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
