"""When something counts as hanging, and calls that might.

assert in_time(vlm.close) is None
assert isinstance(in_time(lambda: list(stream)), ModelError)
"""

from __future__ import annotations

import threading
from collections.abc import Callable

PATIENCE = 120.0
"""Seconds. Long, for a busy machine: what is well waits for none of it."""


def in_time(call: Callable[[], object]) -> object:
    """What a call gives or raises. Fails where it does not come back."""
    came: list[object] = []

    def run() -> None:
        try:
            came.append(call())
        except BaseException as exc:
            came.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert came, f"still waiting after {PATIENCE:.0f} s"
    return came[0]
