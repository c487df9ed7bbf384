"""What llama.cpp allocated is freed by compiled code: in Python's, a Ctrl-C would be lost."""

from __future__ import annotations

import ast
import ctypes
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE

from cmg_gguf.llama.owned import Owned, address, making

PACKAGE = Path(__file__).parents[1] / "cmg_gguf"
C = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
"""raise(number) and putchar(character) stand for what frees a pointer: they tell when it did."""


GIVING = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
GIVEN = GIVING(lambda pointer: pointer)


def owned(pointer: int, free: Any, holder: object = None) -> Owned:
    """As if llama.cpp had allocated it."""
    made = making(GIVEN, free)(pointer)
    if holder is not None:
        made.hold(holder)
    return made


class Holder:
    """Of something that is owned."""

    owned: object


def test_a_ctrl_c_while_something_is_freed_is_not_lost() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in range(3):
            holders = [Holder()]
            holders[0].owned = owned(signal.SIGINT, C["raise"], holders[0])
            with pytest.raises(KeyboardInterrupt):
                holders.clear()
            dropped = [owned(signal.SIGINT, C["raise"])]
            with pytest.raises(KeyboardInterrupt):
                dropped.clear()
            closed = owned(signal.SIGINT, C["raise"])
            with pytest.raises(KeyboardInterrupt):
                closed.close()
            assert not closed
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="sigsuspend")
def test_a_ctrl_c_while_something_is_allocated_leaves_nothing(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    """sigsuspend lets the signal through that waits, and gives -1."""
    make, no_signals = making(C.sigsuspend, C.putchar), ctypes.create_string_buffer(128)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            pytest.fail(f"not interrupted: {make(no_signals)}")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, before)
    C.fflush(None)
    assert capfdbinary.readouterr().out == b"\xff"


PROGRAM = """
import ctypes, gc
from cmg_gguf.llama.owned import making
C = ctypes.CDLL({library!r})
C.toascii.argtypes = [ctypes.c_int]
make = making(C.toascii, C.putchar)  # which gives what it is given

class Holder:
    def __init__(self, character, *kept, **attributes):
        vars(self).update(attributes)
        self.owned = make(ord(character))
        self.owned.hold(self, *kept)

    def close(self):
        self.owned.close()

class Finalized:
    def __del__(self):
        C.putchar(ord("b"))

{lines}
"""


@pytest.mark.parametrize(
    ("lines", "printed"),
    [
        ("a = Holder('a'); b = Holder('b'); c = Holder('c')", "cba"),  # by the end of Python
        ("a = Holder('a'); b = Holder('b'); c = Holder('c'); del b", "bca"),
        ("a = Holder('a'); b = Holder('b'); del a.owned", "ab"),
        ("a = Holder('a'); a.close(); a.close(); b = Holder('b')", "ab"),
        ("a = Holder('a'); b = Holder('b', a); del a; c = Holder('c'); del b", "bac"),
        ("a = Holder('a'); b = Holder('b', a); del a; c = Holder('c'); b.close()", "bac"),
        ("a = Holder('a', Holder('b', Holder('c')))", "abc"),  # made from the inside out
        ("a = Holder('a'); none = Holder('\\0'); none = Holder('\\0')", "a"),  # of null, nothing
        # Before what a holder has is dropped, and before finalizers of what is dropped with it.
        ("a = Holder('a', of=Holder('b')); del a", "ab"),
        ("a = Holder('a', of=Finalized()); a.of.by = a; del a; gc.collect()", "ab"),
        ("b = Finalized(); b.by = Holder('a', of=b); del b; gc.collect()", "ab"),
    ],
)
def test_what_is_owned_is_freed_once_and_in_order(lines: str, printed: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(library=C._name, lines=lines)],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=PATIENCE,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, printed, "")


def test_what_is_owned_is_true_until_it_is_closed() -> None:
    one = owned(1, C["abs"])
    assert one
    assert one.pointer == 1
    one.close()
    assert not one
    assert one.pointer == 0
    assert not owned(0, C["abs"])


@pytest.mark.skipif(sys.platform != "linux", reason="a semaphore that is no file")
def test_who_closes_what_another_thread_frees_waits_for_that() -> None:
    semaphore = ctypes.create_string_buffer(64)
    C.sem_init(semaphore, 0, 0)
    one = owned(address(semaphore), C.sem_wait)
    first, second = (threading.Thread(target=one.close, daemon=True) for _ in range(2))
    first.start()
    deadline = time.monotonic() + PATIENCE
    while one and time.monotonic() < deadline:
        time.sleep(0.001)
    second.start()
    second.join(0.2)
    assert first.is_alive()
    assert second.is_alive()
    C.sem_post(semaphore)
    for thread in (first, second):
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_no_python_code_is_run_where_an_object_is_dropped() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.FunctionDef) and node.name == "__del__")
        or (isinstance(node, ast.Attribute) and node.attr == "finalize")
    ]
    assert found == []
