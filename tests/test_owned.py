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

import pytest
from patience import PATIENCE

from cmg_gguf.llama.owned import owned

PACKAGE = Path(__file__).parents[1] / "cmg_gguf"
C = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
"""raise(number) and putchar(character) stand for what frees a pointer: they tell when it did."""


class Holder:
    """Of something that is owned."""

    owned: object


def test_a_ctrl_c_while_something_is_freed_is_not_lost() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in range(3):
            holders = [Holder()]
            holders[0].owned = owned(holders[0], signal.SIGINT, C["raise"])
            with pytest.raises(KeyboardInterrupt):
                holders.clear()
            holder = Holder()
            dropped = [owned(holder, signal.SIGINT, C["raise"])]
            with pytest.raises(KeyboardInterrupt):
                dropped.clear()
            closed = owned(holder, signal.SIGINT, C["raise"])
            with pytest.raises(KeyboardInterrupt):
                closed.close()
            assert not closed.is_open
    finally:
        signal.signal(signal.SIGINT, before)


PROGRAM = """
import ctypes, gc
from cmg_gguf.llama.owned import owned
putchar = ctypes.CDLL({library!r}).putchar

class Holder:
    def __init__(self, character, *kept, **attributes):
        vars(self).update(attributes)
        self.owned = owned(self, ord(character), putchar, *kept)

    def close(self):
        self.owned.close()

class Finalized:
    def __del__(self):
        putchar(ord("b"))

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


def test_what_is_owned_is_open_until_it_is_closed() -> None:
    one = owned(C, 1, C["abs"])
    assert one.is_open
    one.close()
    assert not one.is_open
    assert not owned(C, 0, C["abs"]).is_open


@pytest.mark.skipif(sys.platform != "linux", reason="a semaphore that is no file")
def test_who_closes_what_another_thread_frees_waits_for_that() -> None:
    semaphore = ctypes.create_string_buffer(64)
    C.sem_init(semaphore, 0, 0)
    one = owned(C, semaphore, C.sem_wait)
    first, second = (threading.Thread(target=one.close, daemon=True) for _ in range(2))
    first.start()
    deadline = time.monotonic() + PATIENCE
    while one.is_open and time.monotonic() < deadline:
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
