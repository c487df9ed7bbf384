"""`--quick`: one to thirteen minutes, by the machine, in which every module is at work.

Left out are tests marked `slow`, and all but the first and the last case of a test that has many.
A run of all that is left then fails if it called no function of some module. That is seen by a
profiler, and not asked on a Python whose profiler crashes: the run says so.
"""

from __future__ import annotations

import ast
import cProfile
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

import cmg_gguf

PACKAGE = Path(cmg_gguf.__file__).parent
UNSEEN = {"cli/__init__.py", "cli/__main__.py", "llama/native.py", "llama/openmp.py"}
"""Modules that are called where it is not seen: in programs of their own, or when imported."""
CRASHES = (3, 11) <= sys.version_info < (3, 11, 7)
"""Whether this Python keeps what a generator no longer holds in its frame while it is profiled: a
garbage collection by another thread then reads freed memory. 3.11.2, Debian 12's, does; 3.11.7 and
3.10, 3.12 do not."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a few minutes that cover every module")


def pytest_configure(config: pytest.Config) -> None:
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if config.option.quick and whole and not (config.option.keyword or config.option.markexpr):
        config.pluginmanager.register(NotAsked() if CRASHES else Reached(), "reached")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.quick:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {item for alike in cases.values() for item in (alike[0], alike[-1])}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


class Reached:
    """Fails a run that called no function of some module."""

    def __init__(self) -> None:
        self._missed: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        profile = cProfile.Profile()
        profile.enable(subcalls=False, builtins=False)
        try:
            result = yield
        finally:
            profile.disable()
        called = {
            entry.code.co_filename
            for entry in profile.getstats()
            if not isinstance(entry.code, str) and entry.code.co_name != "<module>"
        }
        self._missed = sorted(callable_modules() - called)
        session.testsfailed += bool(self._missed)
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for path in self._missed:
            terminalreporter.write_line(f"NO FUNCTION CALLED in {path}", red=True)


class NotAsked:
    """Says that nobody looks whether a function of each module was called."""

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        version = sys.version.split()[0]
        terminalreporter.write_line(
            f"Not asked whether every module was at work: Python {version} can crash where threads "
            "are profiled; 3.11.7 and later do not",
            yellow=True,
        )


def callable_modules() -> set[str]:
    """Files of the package in which a function does something."""
    return {
        str(path)
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).as_posix() not in UNSEEN
        and any(_does_something(node) for node in ast.walk(ast.parse(path.read_bytes())))
    }


def _does_something(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not all(
        isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) for line in node.body
    )
