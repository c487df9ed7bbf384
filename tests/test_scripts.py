"""The scripts beside the package: they run what is installed, and are there by the names told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [
    *ROOT.glob("*.md"),
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
        f'#!/bin/sh\ncase "$*" in *pip*) echo "$*"; echo "$*" >> {tmp_path}/asked; '
        f'test ! -e {tmp_path}/broken;; *) exec {sys.executable} "$@";; esac\n'
    )
    python.chmod(0o755)
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


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_what_is_told_to_be_run_is_there_and_not_run_as_a_module(path: Path) -> None:
    """`python -m` would find the package's sources in the repository, without their extension."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"python3? -m (embedded|benchmarks|cmg_gguf)\b", text)
    for name in re.findall(r"\bscripts/[\w./]*\w", text):
        assert (ROOT / name).exists(), name
