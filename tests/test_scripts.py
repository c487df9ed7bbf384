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


def test_a_program_of_scripts_runs_the_installed_package_from_the_repository_root() -> None:
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    done = subprocess.run(
        ["bash", "-euc", "source scripts/env; run_embedded tune --help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PATH": os.pathsep.join(places)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: tune.py")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_what_is_told_to_be_run_is_there_and_not_run_as_a_module(path: Path) -> None:
    """`python -m` would find the package's sources in the repository, without their extension."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"python3? -m (embedded|benchmarks|cmg_gguf)\b", text)
    for name in re.findall(r"\bscripts/[\w./]*\w", text):
        assert (ROOT / name).exists(), name
