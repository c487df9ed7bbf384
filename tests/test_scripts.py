"""The scripts beside the package: they run what is installed, and are there by the names told."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import pythons_check
from device_suite import CannotRunError

import cmg_gguf

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [
    *ROOT.glob("*.md"),
    *(ROOT / ".github").rglob("*.md"),
    *(ROOT / ".github").rglob("*.yml"),
    *(path for path in (ROOT / "scripts").rglob("*") if path.suffix in ("", ".py", ".md")),
    *(ROOT / "cmg_gguf").rglob("*.md"),
]
TEXTS = [path for path in TEXTS if path.is_file()]


def bash(text: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", f"source scripts/env; {text}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environ},
        timeout=60,
        check=False,
    )


def test_a_program_of_scripts_runs_the_installed_package_from_the_repository_root() -> None:
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    done = bash("run_embedded tune --help", PATH=os.pathsep.join(places))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: tune.py")


def test_what_people_run_first_shares_one_environment() -> None:
    for name in ("demo", "test", "check"):
        assert re.search(r"^use_env$", (ROOT / "scripts" / name).read_text("utf-8"), re.MULTILINE)


def test_an_environment_is_made_once_and_again_for_what_it_lacks(tmp_path: Path) -> None:
    """python stands in for itself: pip says what it is asked for, and fails when told to."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *pip?install*) echo "$*"; echo "$*" >> {tmp_path}/asked; '
        f'test ! -e {tmp_path}/broken;; *) exec {sys.executable} "$@";; esac\n'
    )
    python.chmod(0o755)
    (tmp_path / "bin" / "pip").touch()
    asked = tmp_path / "asked"
    (tmp_path / "broken").touch()
    failed = bash("use_env; echo not reached", CMG_VENV=str(tmp_path))
    assert failed.returncode == 1
    assert not failed.stdout
    assert "pip install --verbose .[test,dev]" in failed.stderr
    (tmp_path / "broken").unlink()
    assert asked.read_text() == "-m pip install --verbose .[test,dev]\n"
    for extras in ("", "", "judge", "", "judge"):
        assert bash(f"use_env {extras}", CMG_VENV=str(tmp_path)).returncode == 0
    assert [line.split()[-1] for line in asked.read_text().splitlines()] == [
        ".[test,dev]",
        ".[test,dev]",
        ".[test,dev,judge]",
    ]


def test_what_is_missing_to_install_is_told_at_once_and_nothing_is_made(tmp_path: Path) -> None:
    place = tmp_path / "venv"
    environ = {"CMG_VENV": str(place), "CXX": "c++99", "PYTHON": "python3.99"}
    done = bash("use_env; echo not reached", **environ)
    assert (done.returncode, done.stdout) == (1, "")
    assert "a C++ compiler (Debian: g++)" in done.stderr
    assert "python3.99 (Debian: python3, python3-venv, python3-dev)" in done.stderr
    assert not place.exists()


def test_an_environment_that_was_left_half_made_is_made_again(tmp_path: Path) -> None:
    """As by Debian's Python without its package python3-venv: there is a Python and no pip."""
    venv, python = tmp_path / "venv", tmp_path / "python"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    python.write_text(
        f'#!/bin/sh\ntest "$2" = venv || exec {sys.executable} "$@"\n touch $3/bin/pip'
    )
    python.chmod(0o755)
    for told in ("Making a virtual environment", ""):
        done = bash(f"enter_env {venv}; command -v python", PYTHON=str(python))
        assert done.stdout.strip() == str(venv / "bin" / "python"), done.stderr
        assert told in done.stderr
        assert bool(done.stderr) == bool(told)


def test_pythons_are_found_by_version_and_path_and_one_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """python3.99 on the path does not run, as pyenv's of a version that is not chosen."""
    monkeypatch.setattr(pythons_check, "PYENV", tmp_path)
    assert pythons_check.find(sys.executable) == Path(sys.executable)
    broken = tmp_path / "python3.99"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(CannotRunError, match=r"no Python 3\.99 on the path or in"):
        pythons_check.find("3.99")
    for version in ("3.99.2", "3.99.10"):
        (tmp_path / version / "bin").mkdir(parents=True)
        (tmp_path / version / "bin" / "python").symlink_to(sys.executable)
    assert pythons_check.find("3.99") == tmp_path / "3.99.10" / "bin" / "python"


def test_a_table_tells_what_each_python_came_to() -> None:
    outcomes = [
        pythons_check.Outcome("3.10.13", {"passed": 3, "skipped": 1}, 0),
        pythons_check.Outcome("3.13.0", {"passed": 2, "failed": 1, "errors": 1}, 1),
    ]
    assert pythons_check.table(outcomes).splitlines()[2:] == [
        "| 3.10.13 | 3 | 0 | 1 |",
        "| 3.13.0 | 2 | 2 | 0 |",
    ]


def test_the_version_is_written_once_and_the_changelog_has_its_notes() -> None:
    """A release takes them from there: see scripts/release."""
    assert importlib.metadata.version("cmg-gguf") == cmg_gguf.__version__
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text("utf-8")
    changelog = (ROOT / ".github" / "CHANGELOG.md").read_text("utf-8")
    heading = rf"^## {re.escape(cmg_gguf.__version__)}\n\s*\S"
    assert re.search(heading, changelog, re.MULTILINE)


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name
)
def test_a_workflow_runs_scripts_that_are_there_with_flags_that_they_take(path: Path) -> None:
    """And nothing else: what it does can be done by hand."""
    commands = re.findall(r"\brun: *(.*)", path.read_text("utf-8"))
    assert commands
    for command in commands:
        name, *flags = command.split()
        script = ROOT / name
        assert script.parent == ROOT / "scripts"
        assert os.access(script, os.X_OK)
        for flag in flags:
            assert re.search(rf"^#   {name} .*{flag}\b", script.read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_what_is_told_to_be_run_is_there_and_not_run_as_a_module(path: Path) -> None:
    """`python -m` would find the package's sources in the repository, without their extension."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"python3? -m (embedded|benchmarks|cmg_gguf)\b", text)
    for name in re.findall(r"\bscripts/[\w./]*\w", text):
        assert (ROOT / name).exists(), name
