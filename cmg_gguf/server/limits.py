"""What a request may be and take, at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """body_bytes: of a request's body. heat_bytes: of the weights of one answer's heat. held_bytes:
    of the bodies of all requests under way. header_bytes: of a request's head. read_seconds: in
    which head and body must have come. write_seconds: in which a client must have taken some of
    what it is sent. max_tokens: of an answer; None = until the context is full. ping_seconds:
    between the signs of life of a stream that has nothing to say. drain_seconds: that answers under
    way get when the server is told to end."""

    body_bytes: int = 32 * 2**20
    heat_bytes: int = 8 * 2**20
    held_bytes: int = 256 * 2**20
    header_bytes: int = 64 * 2**10
    read_seconds: float = 30.0
    write_seconds: float = 60.0
    max_tokens: int | None = None
    ping_seconds: float = 15.0
    drain_seconds: float = 30.0

    def tokens(self, wanted: int | None) -> int | None:
        """Of an answer that asked for so many, None = no limit of its own."""
        known = [n for n in (wanted, self.max_tokens) if n is not None]
        return min(known, default=None)
