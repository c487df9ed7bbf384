"""What llama.cpp allocated is freed by compiled code: in Python's, a Ctrl-C would be lost."""

from __future__ import annotations

import ast
import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cmg_gguf.llama.owned import owned

PACKAGE = Path(__file__).parents[1] / "cmg_gguf"
C = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
"""raise(number) and putchar(character) stand for what frees a pointer: they tell when it did."""


def test_a_ctrl_c_while_something_is_freed_is_not_lost() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in range(3):
            dropped = [owned(signal.SIGINT, C["raise"])]
            with pytest.raises(KeyboardInterrupt):
                dropped.clear()
            closed = owned(signal.SIGINT, C["raise"])
            with pytest.raises(KeyboardInterrupt):
                closed.close()
            assert not closed.is_open
    finally:
        signal.signal(signal.SIGINT, before)


PROGRAM = """
import ctypes
from cmg_gguf.llama.owned import owned
putchar = ctypes.CDLL({library!r}).putchar
made = lambda character, *kept: owned(ord(character), putchar, *kept)
{lines}
"""


@pytest.mark.parametrize(
    ("lines", "printed"),
    [
        ("a = made('a'); b = made('b'); c = made('c')", "cba"),  # by the end of Python
        ("a = made('a'); b = made('b'); c = made('c'); del b", "bca"),
        ("a = made('a'); a.close(); a.close(); b = made('b')", "ab"),
        ("kept = made('a'); b = made('b', kept); del kept; c = made('c'); del b", "bac"),
        ("kept = made('a'); b = made('b', kept); del kept; c = made('c'); b.close()", "bac"),
        ("a = made('a', made('b', made('c')))", "abc"),  # made from the inside out
        ("a = made('a'); none = made('\\0'); none = made('\\0')", "a"),  # of null, nothing
    ],
)
def test_what_is_owned_is_freed_once_and_in_order(lines: str, printed: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(library=C._name, lines=lines)],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=120,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, printed, "")


def test_what_is_owned_is_open_until_it_is_closed() -> None:
    one = owned(1, C["abs"])
    assert one.is_open
    one.close()
    assert not one.is_open
    assert not owned(0, C["abs"]).is_open


def test_no_python_code_is_run_where_an_object_is_dropped() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.FunctionDef) and node.name == "__del__")
        or (isinstance(node, ast.Attribute) and node.attr == "finalize")
    ]
    assert found == []
