"""Who asks: by which key, and whether still."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

from fastapi import Request

from cmg_gguf.server.failures import CLIENT_GONE, Refused

Result = TypeVar("Result")


def salt_of(http: Request) -> str | None:
    """What tells this client's kept prompts from those of other keys; None where there are no
    keys."""
    found: str | None = http.scope.get("cmg_salt")
    return found


async def unless_gone(http: Request, work: Awaitable[Result]) -> Result:
    """What comes of `work`, which is cancelled where the client goes away meanwhile: Refused, which
    nobody reads. The body must have been read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused("the client went away", CLIENT_GONE)
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await leaving


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
