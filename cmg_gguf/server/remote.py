"""What an allowed host sends, over a connection to an address that was checked.

    hosts = [Host.of("pics.example.org"), Host.of("192.168.1.5:8080")]
    content = await fetched("https://pics.example.org/1.jpg", hosts, max_bytes=1 << 20)

A name is looked up once. Each address that comes must be a public one, and the connection goes to
these and nowhere else, whatever the name says later; TLS is checked against the name. No redirect
is followed, no proxy and no cookie is used. A host in a private network is allowed by its address,
and asked for by it.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network
from typing import Any

import anyio
import httpcore

from cmg_gguf.errors import ImageError, shown

_PORTS = {"http": 80, "https": 443}
_AUTHORITY = r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?"
_HOST = re.compile(_AUTHORITY)
_URL = re.compile(rf"(?P<scheme>https?)://{_AUTHORITY}(?P<target>/[!-~]*)?", re.IGNORECASE)
"""Nothing else may stand in it: no user, no backslash, no space. So no two readers differ on it."""
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE)
"""A last label with which a name is another spelling of an address: 127.1, 0x7f000001."""

_GLOBAL_V6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_NOT_PUBLIC = tuple(
    ip_network(block)
    for block in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20")
)
"""Protocols' own and tunnels (6to4, Teredo), in which other addresses hide: beside those that
`ipaddress` knows in every version."""

_HEADERS: dict[bytes | str, bytes | str] = {
    "User-Agent": "cmg-gguf",
    "Accept": "image/*",
    "Accept-Encoding": "identity",
}


@dataclass(frozen=True)
class Host:
    """A host that pictures are fetched from. name: in lower case; or an address, as `ipaddress`
    writes it. port: None = 80 for http and 443 for https."""

    name: str
    port: int | None = None

    @classmethod
    def of(cls, text: str) -> Host:
        """NAME, NAME:PORT, 192.0.2.1, [2001:db8::1]:PORT. Raises ImageError for what is none."""
        found = _HOST.fullmatch(text)
        name = _name(found) if found else None
        port = int(found["port"]) if found and found["port"] else None
        if name is None or (port is not None and not 1 <= port <= 65535):
            raise ImageError(
                f"host {shown(text)} is none: give a name or an address, as pics.example.org, "
                "pics.example.org:8443, 192.0.2.1 or [2001:db8::1]"
            )
        return cls(name, port)


@dataclass(frozen=True)
class _Target:
    """What a URL says. path: with the query."""

    scheme: str
    name: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """As it stands in the header `Host`."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        return name if self.port == _PORTS[self.scheme] else f"{name}:{self.port}"


def is_remote(text: str) -> bool:
    """Whether it means to be an http or https URL."""
    return text[:8].lower().startswith(("http:", "https:"))


async def fetched(
    url: str, hosts: Sequence[Host], *, max_bytes: int, tls: ssl.SSLContext | None = None
) -> bytes:
    """What a URL of one of `hosts` holds. Takes as long as the host does: limit it from outside.

    tls: None = the system's certificates.

    Raises ImageError, which says why: not for who asks.
    """
    target = _target(url)
    if not any(_allows(host, target) for host in hosts):
        raise ImageError(f"{shown(url)} is at {target.name}:{target.port}, which is not allowed")
    try:
        addresses = await _addresses(target)
        return await _get(target, addresses, max_bytes, tls or _system_tls())
    except ImageError:
        raise
    # Resolvers, TLS and hosts fail in any way there is; it must not tell one from another.
    except Exception as exc:
        raise ImageError(f"{shown(url)} cannot be fetched: {type(exc).__name__} {exc}") from exc


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether it is one of the public Internet: not private, loopback, link-local, multicast,
    reserved, nor an IPv6 address in which an IPv4 one hides, but for NAT64's if that is public."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _GLOBAL_V6:
            return False
    blocks = (block for block in _NOT_PUBLIC if block.version == address.version)
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in block for block in blocks)
    )


def _target(url: str) -> _Target:
    found = _URL.fullmatch(url.partition("#")[0])
    name = _name(found) if found else None
    if found is None or name is None:
        raise ImageError(f"{shown(url)} is no URL of a host, or not plainly spelled")
    scheme = found["scheme"].lower()
    return _Target(scheme, name, int(found["port"] or _PORTS[scheme]), found["target"] or "/")


def _name(found: re.Match[str]) -> str | None:
    """The host in its one spelling; None for an address that has another."""
    text = (found["v6"] or found["name"]).lower()
    if found["v6"] is None and not _NUMBER.fullmatch(text.rpartition(".")[2]):
        return text
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None


def _allows(host: Host, target: _Target) -> bool:
    return (target.name, target.port) == (host.name, host.port or _PORTS[target.scheme])


async def _addresses(target: _Target) -> list[str]:
    """Where to connect to: an address that was allowed as such, or all that its name has now."""
    try:
        return [str(ipaddress.ip_address(target.name))]
    except ValueError:
        pass
    answers = await anyio.getaddrinfo(target.name, target.port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(answer[4][0]) for answer in answers]
    if not addresses or not all(map(is_public, addresses)):
        raise ImageError(f"{target.name} is {', '.join(map(str, addresses))}: not public")
    return [str(address) for address in dict.fromkeys(addresses)]


@cache
def _system_tls() -> ssl.SSLContext:
    return ssl.create_default_context()


async def _get(
    target: _Target, addresses: Sequence[str], max_bytes: int, tls: ssl.SSLContext
) -> bytes:
    url = httpcore.URL(scheme=target.scheme, host=target.name, port=target.port, target=target.path)
    headers = {**_HEADERS, "Host": target.authority}
    pinned = _Pinned(addresses)
    content = bytearray()
    async with (
        httpcore.AsyncConnectionPool(ssl_context=tls, network_backend=pinned) as pool,
        pool.stream("GET", url, headers=headers) as response,
    ):
        if response.status != 200:
            raise ImageError(f"{target.name} answers with status {response.status}")
        async for part in response.aiter_stream():
            content += part
            if len(content) > max_bytes:
                raise ImageError(f"{target.name} sends more than {max_bytes} bytes")
    return bytes(content)


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to the first of `addresses` that answers, whatever host is named."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self, host: str, port: int, *arguments: Any, **settings: Any
    ) -> httpcore.AsyncNetworkStream:
        refused: Exception = httpcore.ConnectError("no address")
        for address in self._addresses:
            try:
                return await self._backend.connect_tcp(address, port, *arguments, **settings)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                refused = exc
        raise refused
