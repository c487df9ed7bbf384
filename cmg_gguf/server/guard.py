"""Ahead of every route: who may ask, and how much and how slowly a request may come.

A body is read here, whole, so that a client that sends slowly or without end meets these limits and
nothing else. Keys are compared in constant time.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cmg_gguf.server.failures import Refused, response
from cmg_gguf.server.lifetime import Lifetime
from cmg_gguf.server.limits import Limits
from cmg_gguf.server.visitors import Visitors

OPEN = ("/health", "/healthz", "/v1/health")
"""Paths that need no key, beside the page and its files."""


class Keys:
    """API keys. Of each, only its digest is held. Empty: everybody may ask."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def salt(self, headers: Headers) -> str:
        """What tells a key's prompts from those of others. Raises Refused where the key is none of
        these."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        # All are compared, so that the time tells nothing of which it was.
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(found):
            raise Refused(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return digest.hex()


class Guard:
    """An ASGI application around another. visitors: are asked where there are no keys. free: paths
    that need no key."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        limits: Limits,
        lifetime: Lifetime,
        visitors: Visitors,
        free: Sequence[str] = (),
    ) -> None:
        self._app, self._keys, self._limits = app, keys, limits
        self._lifetime, self._visitors, self._free = lifetime, visitors, (*OPEN, *free)
        self._n_held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers, path = Headers(scope=scope), scope["path"]
            self._check_head(scope)
            if not self._keys:
                self._visitors.check(headers, scope["method"])
            elif path not in self._free:
                scope["cmg_salt"] = self._keys.salt(headers)
            if scope["method"] in ("GET", "HEAD", "OPTIONS"):
                await self._app(scope, receive, send)
                return
            body = await self._body(headers, receive)
        except Refused as exc:
            await response(exc, scope["path"])(scope, receive, send)
            return
        try:
            with self._lifetime.used():
                await self._app(scope, _replayed(body, receive), send)
        finally:
            self._n_held -= len(body)

    def _check_head(self, scope: Scope) -> None:
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._limits.header_bytes:
            raise Refused(
                f"the head has {size} bytes and the limit is {self._limits.header_bytes}; send "
                "fewer headers",
                431,
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body, which counts as held. Raises Refused where it is too large, or does not
        come in time, or too much is held already."""
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > self._limits.body_bytes:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read(receive), self._limits.read_seconds)
        except asyncio.TimeoutError:
            raise Refused(
                f"the body did not come within {self._limits.read_seconds:g} s; send it faster",
                408,
                headers={"Connection": "close"},
            ) from None

    async def _read(self, receive: Receive) -> bytes:
        parts = bytearray()
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused("the client went away", 499)
                part = message.get("body", b"")
                parts += part
                self._n_held += len(part)
                self._check_held(len(parts))
                if not message.get("more_body", False):
                    return bytes(parts)
        except BaseException:
            self._n_held -= len(parts)
            raise

    def _check_held(self, n_own: int) -> None:
        if n_own > self._limits.body_bytes:
            raise self._too_large()
        if self._n_held > self._limits.held_bytes:
            raise Refused(
                f"the requests under way have {self._n_held} bytes and the limit is "
                f"{self._limits.held_bytes}; try again soon",
                503,
                headers={"Connection": "close", "Retry-After": "1"},
            )

    def _too_large(self) -> Refused:
        return Refused(
            f"the body is too large: the limit is {self._limits.body_bytes} bytes; send smaller "
            "pictures",
            413,
            headers={"Connection": "close"},
        )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read, and then what else comes."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
