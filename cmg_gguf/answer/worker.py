"""The thread that a scheduler works in, and its end.

It stays for a while behind the last answer, for each new thread that computes costs OpenMP a team
of its own. Meanwhile it holds nothing: a model that is dropped is freed. None is left where the
interpreter is taken down.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from contextlib import AbstractContextManager, suppress
from typing import Protocol, TypeAlias

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


Lock: TypeAlias = AbstractContextManager[object]

_worked: weakref.WeakSet[Worked] = weakref.WeakSet()
_threads: dict[threading.Thread, tuple[Lock, threading.Condition]] = {}
_exiting = threading.Event()


def start(worked: Worked, lock: Lock, changed: threading.Condition) -> None:
    """Starts a thread. changed: notified where there may be work. lock: the one it is made of."""
    arguments = weakref.ref(worked), lock, changed
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


def _live(worked: weakref.ref[Worked], lock: Lock, changed: threading.Condition) -> None:
    _threads[threading.current_thread()] = lock, changed
    try:
        while _work_for(worked):
            with lock:
                changed.wait_for(lambda: _is_wanted(worked), IDLE_SECONDS)
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
    for thread, (lock, changed) in tuple(_threads.items()):
        with lock:
            changed.notify_all()
        thread.join()
