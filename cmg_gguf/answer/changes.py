"""How threads wait for what others change.

    changes.wait_for(lambda: box.is_full)    # under no lock
    box.is_full = True
    changes.tell()

In place of a `threading.Condition`, which an interrupt can leave with its lock held for ever, or
not held where it should be: who waits here holds nothing, and waits in compiled code.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable


class Changes:
    """Wakes who waits for a change."""

    def __init__(self) -> None:
        self._waiting: set[queue.SimpleQueue[None]] = set()

    def tell(self) -> None:
        """Something has changed."""
        for news in tuple(self._waiting):
            news.put(None)

    def wait_for(self, there: Callable[[], bool], seconds: float | None = None) -> None:
        """Waits until there(), which is asked behind each change; for so long at most."""
        news: queue.SimpleQueue[None] = queue.SimpleQueue()
        end = None if seconds is None else time.monotonic() + seconds
        try:
            self._waiting.add(news)  # before it is asked: no change is missed
            while not there():
                news.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
        except queue.Empty:
            pass
        finally:
            self._waiting.discard(news)
