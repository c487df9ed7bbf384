"""The quick tests on several versions of Python, each with the wheel that is built for it.

    scripts/check_pythons [--core | --whole] [--work DIR] [--llama WHEEL] [PYTHON ...]

PYTHON: a version that is on the path as python3.x or that pyenv has, or an interpreter's path. The
wheel of llama-cpp-python works with every Python: it is taken from pip, which builds it once. One
Python after another; at the end a table on stdout.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from device_suite import (
    ROOT,
    SOURCE,
    CannotRunError,
    call,
    last_counts,
    pinned_source,
    say,
    watched,
)
from versions_check import TESTS

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PYENV = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"


@dataclass(frozen=True)
class Outcome:
    """Of one Python. status: of pytest, 0 if all is well."""

    python: str
    counts: dict[str, int]
    status: int


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all is well on every Python."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pythons", nargs="*", default=PYTHONS)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--core", action="store_true", help="only those that check_versions runs")
    which.add_argument("--whole", action="store_true", help="all tests, not the quick ones alone")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/cmg-gguf/pythons"))
    parser.add_argument("--llama", type=Path, help=f"wheel of {SOURCE}; default: pip's")
    told = parser.parse_args(arguments)
    work = told.work.expanduser().resolve()
    tests = [] if told.whole else ["--quick"]
    tests += [str(ROOT / "tests" / name) for name in TESTS] if told.core else []
    try:
        interpreters = [find(python) for python in told.pythons]
        llama = (told.llama or llama_wheel(work, interpreters[0])).resolve()
        outcomes = [run(work, interpreter, llama, tests) for interpreter in interpreters]
    except CannotRunError as exc:
        say(str(exc))
        return 1
    print(table(outcomes))
    return 0 if all(outcome.status == 0 for outcome in outcomes) else 1


def find(python: str) -> Path:
    """The interpreter of a version or a path. Raises CannotRunError where there is none."""
    newest_last = sorted(
        (path for path in PYENV.glob("*/bin/python") if path.parts[-3].startswith(f"{python}.")),
        key=lambda path: [int(part) for part in re.findall(r"\d+", path.parts[-3])],
    )
    told = [shutil.which(f"python{python}"), shutil.which(python), *reversed(newest_last)]
    for path in told:
        if path is not None and works(path):
            return Path(path)
    raise CannotRunError(f"no Python {python} on the path or in {PYENV}: pyenv install {python}")


def works(python: str | Path) -> bool:
    """Whether it runs: pyenv puts names on the path for versions that are not chosen, too."""
    return subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: Python x result."""
    rows = ["| Python | passed | failed | skipped |", "|---|---|---|---|"]
    for one in outcomes:
        bad = one.counts.get("failed", 0) + one.counts.get("errors", 0)
        passed, skipped = one.counts.get("passed", 0), one.counts.get("skipped", 0)
        rows.append(f"| {one.python} | {passed} | {bad} | {skipped} |")
    return "\n".join(rows)


def llama_wheel(work: Path, interpreter: Path) -> Path:
    """The wheel of llama-cpp-python, for every Python."""
    folder = work / "llama"
    if not list(folder.glob("*.whl")):
        say(f"the wheel of {SOURCE}: where pip has none, about six minutes of two cores, once")
        command = [str(interpreter), "-m", "pip", "wheel", "--quiet", "--no-deps"]
        needed = pinned_source((ROOT / "pyproject.toml").read_text("utf-8"))
        call([*command, "--wheel-dir", str(folder), needed])
    return max(folder.glob("*.whl"))


def run(work: Path, interpreter: Path, llama: Path, tests: Sequence[str]) -> Outcome:
    """Builds the wheel with that Python, installs it and runs the tests that these arguments of
    pytest name."""
    version = subprocess.check_output(
        [interpreter, "-c", "import platform; print(platform.python_version())"], text=True
    ).strip()
    venv = work / version
    python = venv / "bin" / "python"
    if not python.exists():
        call([str(interpreter), "-m", "venv", str(venv)])
    say(f"building and installing for Python {version}")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    call([*pip, "install", str(llama)])
    call([*pip, "install", "--find-links", str(llama.parent), f"{ROOT}[test]"])
    say(f"testing on Python {version}")
    command = [str(venv / "bin" / "pytest"), "-q", "-p", "no:cacheprovider", *tests]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    status, output = watched(command, ROOT, PATH=path)
    return Outcome(version, last_counts(output), status)


if __name__ == "__main__":
    sys.exit(main())
