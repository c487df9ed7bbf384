"""How much a request may ask to be read: what would cost minutes before it is told to be too long.

A context of n tokens cannot hold more than so many messages and characters. They are counted before
a template writes them out and a vocabulary cuts them up, which takes a second a megabyte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cmg_gguf.errors import ContextLengthError
from cmg_gguf.prompt.parts import PICTURES
from cmg_gguf.server.failures import Refused

CHARACTERS = 128
"""Of one token, at most: the longest ones of vocabularies are that many spaces."""
MAX_STOPS = 64
"""Stop strings: all are looked for behind each token."""
MAX_BIASES = 4096


def check_extent(messages: object, n_ctx: int) -> None:
    """Raises ContextLengthError where the messages are longer than n_ctx tokens can be. Pictures do
    not count."""
    most, n = CHARACTERS * n_ctx, 0
    rest: list[Any] = []
    for message in messages if isinstance(messages, list) else ():
        n += CHARACTERS
        for name, value in message.items() if isinstance(message, Mapping) else ():
            if name == "content" and isinstance(value, list):
                rest += (part for part in value[: most + 1] if not _is_picture(part))
            elif name != "images":
                rest.append(value)
        while rest and n <= most:
            value = rest.pop()
            n += 1 + (len(value) if isinstance(value, str) else 0)
            if isinstance(value, Mapping):
                rest += value.values()
            elif isinstance(value, list):
                rest += value
        if n > most:
            raise ContextLengthError(
                f"the messages are longer than {n_ctx} tokens can be, which is the context: "
                "shorten them"
            )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises Refused for more of something than each token can be compared with."""
    for name, most in (("stop", MAX_STOPS), ("logit_bias", MAX_BIASES)):
        value = settings.get(name)
        if isinstance(value, list | Mapping) and len(value) > most:
            raise Refused(
                f"{name} has {len(value)} entries and the limit is {most}; give fewer", param=name
            )


def _is_picture(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in PICTURES
