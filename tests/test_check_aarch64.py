"""The check on 64-bit Arm, as far as it goes without building anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import aarch64_build
import pytest
from aarch64_build import BOARDS, _needed, _unpacked, _write_python
from aarch64_check import LEFT_OUT, TESTS, compare
from device_suite import ROOT, CannotRunError


def outcome(machine: str, *guided: str, shift: float = 0.0) -> dict[str, object]:
    logits = [[1.0 + shift, -1.0]]
    return {
        "machine": machine,
        "captions": [["plain", words] for words in guided],
        "l_o": logits,
        "l_d": [[2.0, 0.0]],
    }


def test_captions_that_differ_are_told_word_for_word() -> None:
    same = compare(outcome("x86_64", "a cat", "a dog"), outcome("aarch64", "a cat", "a dog"))
    assert (same["captions"], same["same"], same["differing"]) == (4, 4, [])
    found = compare(
        outcome("x86_64", "a cat", "a dog"), outcome("aarch64", "a cat", "a fox", shift=0.25)
    )
    assert found["same"] == 3
    assert found["differing"] == [
        {"scene": 1, "branch": "guided", "x86_64": "a dog", "aarch64": "a fox"}
    ]
    assert found["l_o"] == {"largest": 0.25, "deviation": 1.0}
    assert found["l_d"]["largest"] == 0.0


def test_captions_that_are_missing_are_no_agreement() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare(outcome("x86_64", "a cat", "a dog"), outcome("aarch64", "a cat"))


def test_the_tests_are_there_and_each_is_named_once() -> None:
    assert len(set(TESTS)) == len(TESTS)
    assert [name for name in TESTS if not (ROOT / "tests" / name).is_file()] == []
    assert LEFT_OUT


def test_what_is_built_here_is_not_looked_for_on_pypi() -> None:
    assert not [line for line in _needed() if line.startswith("llama")]
    assert any(line.startswith("numpy") for line in _needed())


@pytest.mark.parametrize("board", BOARDS)
def test_the_python_of_a_board_and_its_children_run_in_the_emulator(
    board: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator = tmp_path / "path with spaces" / "qemu-aarch64"
    emulator.parent.mkdir()
    emulator.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n', "utf-8")
    emulator.chmod(0o755)
    monkeypatch.setenv("PATH", f"{emulator.parent}:/usr/bin:/bin")
    python, root = tmp_path / "a board" / "bin" / "python", tmp_path / "a root"
    _write_python(python, root, BOARDS[board].cpu)
    told = subprocess.run([python, "-c", "a b"], capture_output=True, text=True, check=True)
    program = str(root / "usr" / "bin" / aarch64_build.PYTHON)
    options = ["-cpu", BOARDS[board].cpu, "-L", str(root), "-0", str(python)]
    assert told.stdout.splitlines() == [*options, program, "-c", "a b"]
    assert f"home = {root}/usr/bin" in (tmp_path / "a board" / "pyvenv.cfg").read_text("utf-8")


def test_another_python_than_debians_is_told_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(command: list[str]) -> None:
        folder = tmp_path / "root.part" / "usr" / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "python3.99").touch()

    monkeypatch.setattr("aarch64_build.call", fetched)
    with pytest.raises(CannotRunError, match=r"python3\.99; run with PYTHON=/usr/bin/python3"):
        _unpacked(tmp_path)


def test_the_program_tells_its_usage() -> None:
    program = ROOT / "scripts" / "aarch64_check.py"
    done = subprocess.run([sys.executable, program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: check_aarch64" in done.stdout
