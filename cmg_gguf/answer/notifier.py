"""Progress is told from a thread of its own, so that the model never waits for who is told."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class Notifier:
    """Calls `told` with each event in order, while the answer goes on.

    So a callback may take its time, ask the same model something, or wait for a thread that does.
    What it raises is raised by `rethrow` and `settle`.
    """

    def __init__(self, told: Callable[..., object] | None) -> None:
        self._told = told
        self._events: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __call__(self, *event: Any) -> None:
        """Tells an event."""
        if self._told is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._tell, name="cmg-progress", daemon=True)
            self._thread.start()
        self._events.put(event)

    def settle(self) -> None:
        """Waits until all is told. Raises what the callback raised."""
        self.stop()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self.rethrow()

    def stop(self) -> None:
        """Nothing more will be told. Waits for nobody."""
        if self._thread is not None:
            self._events.put(None)

    def rethrow(self) -> None:
        """Raises what the callback has raised, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _tell(self) -> None:
        assert self._told is not None
        while (event := self._events.get()) is not None:
            try:
                self._told(*event)
            except BaseException as exc:
                self._error = exc
                return
