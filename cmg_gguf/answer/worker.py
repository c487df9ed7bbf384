"""The thread that a scheduler works in, and its end.

It stays for a while behind the last answer, for each new thread that computes costs OpenMP a team
of its own. Meanwhile it holds nothing: a model that is dropped is freed. None is left where the
interpreter is taken down.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from contextlib import suppress
from typing import Protocol

from cmg_gguf.answer.changes import Changes

IDLE_SECONDS = 5.0
"""For how long a thread without work waits for some."""


class Worked(Protocol):
    """What a thread works for: see `cmg_gguf.answer.scheduler.Scheduler`."""

    @property
    def has_work(self) -> bool: ...
    @property
    def is_idle(self) -> bool: ...
    def work(self) -> bool: ...
    def resign(self) -> bool: ...
    def close_if_at_work(self) -> None: ...


_worked: weakref.WeakSet[Worked] = weakref.WeakSet()
_threads: dict[threading.Thread, Changes] = {}
_exiting = threading.Event()


def start(worked: Worked, changes: Changes) -> None:
    """Starts a thread. changes: told where there may be work."""
    arguments = weakref.ref(worked), changes
    threading.Thread(target=_live, args=arguments, name="cmg-engine", daemon=True).start()


def close_at_exit(worked: Worked) -> None:
    """Closes it before anything of it is freed, if it is at work then: what is registered last is
    called first, and what frees the contexts was registered before any was made."""
    if not _worked:
        atexit.unregister(_end_all)
        atexit.register(_end_all)
    _worked.add(worked)


def report(error: BaseException) -> None:
    """Tells an error that is no answer's: to the hook that is told what ends a thread."""
    told = type(error), error, error.__traceback__, threading.current_thread()
    with suppress(BaseException):  # the hook may be the caller's, and the thread goes on
        threading.excepthook(threading.ExceptHookArgs(told))


def _live(worked: weakref.ref[Worked], changes: Changes) -> None:
    _threads[threading.current_thread()] = changes
    try:
        while _work_for(worked):
            changes.wait_for(lambda: _is_wanted(worked), IDLE_SECONDS)
            if _is_over(worked):
                return
    finally:
        del _threads[threading.current_thread()]


# Functions of their own, so that no frame of the thread holds anything while it waits.


def _work_for(worked: weakref.ref[Worked]) -> bool:
    found = worked()
    return found is not None and found.work()


def _is_wanted(worked: weakref.ref[Worked]) -> bool:
    found = worked()
    return found is None or found.has_work or _exiting.is_set()


def _is_over(worked: weakref.ref[Worked]) -> bool:
    found = worked()
    return found is None or (found.is_idle and found.resign())


def _end_all() -> None:
    for worked in tuple(_worked):
        worked.close_if_at_work()
    _exiting.set()
    for thread, changes in tuple(_threads.items()):
        changes.tell()
        thread.join()
