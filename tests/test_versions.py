"""Versions of llama-cpp-python: which are refused, which told about; and what stands in for what
the older ones lack."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment, flat, run
from guided import open_vlm
from prompts import picture
from tiny_llava import TinyPair
from versions_check import TESTS, VERSIONS, Outcome, table

from cmg_gguf.doctor.finding import unusable
from cmg_gguf.llama import chunks
from cmg_gguf.llama.versions import (
    NEWEST_TESTED,
    OLDEST,
    REMEDY,
    REQUIREMENT,
    check_version,
    untested,
)

ROOT = Path(__file__).resolve().parent.parent

IMPORT = """
import ctypes, sys, llama_cpp
llama_cpp.__version__ = {version!r}
{before}
import cmg_gguf.llama.native
print("imported")
"""
WITHOUT_ROPE = """
from cmg_gguf import _core
NAME = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)
real = NAME(("ggml_op_name", llama_cpp.llama_cpp._lib))
fake = NAME(lambda number: b"OTHER" if real(number) == b"ROPE" else real(number))
bind = _core.bind_api
_core.bind_api = lambda addresses: bind(
    {**addresses, "ggml_op_name": ctypes.cast(fake, ctypes.c_void_p).value}
)
"""


def imported(version: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """A process in which llama-cpp-python says that it is of that version."""
    return subprocess.run(
        [sys.executable, "-c", IMPORT.format(version=version, before=before)],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("version", ["0.3.30", "0.2.90", "0.3"])
def test_a_version_that_lacks_what_is_called_is_refused_with_what_to_install(version: str) -> None:
    with pytest.raises(ImportError, match=f"{version} is too old, {OLDEST} is the first") as error:
        check_version(version)
    assert str(error.value).endswith(REMEDY)


@pytest.mark.parametrize("version", [OLDEST, "0.3.33", NEWEST_TESTED, f"{NEWEST_TESTED}.post1"])
def test_of_a_tested_version_nothing_is_told(version: str) -> None:
    check_version(version)
    assert untested(version) is None


@pytest.mark.parametrize("version", ["0.3.37", "0.3.100", "0.4.0", "1.0.0rc1"])
def test_a_newer_version_is_used_and_told_about(version: str) -> None:
    check_version(version)
    told = untested(version)
    assert told is not None
    assert f"{version} is newer than {NEWEST_TESTED}" in told


def test_an_old_version_ends_the_import_and_a_newer_one_does_not() -> None:
    old, newer = imported("0.3.26"), imported("0.9.0")
    assert old.returncode == 1
    assert f"ImportError: llama-cpp-python 0.3.26 is too old, {OLDEST} is" in old.stderr
    assert (newer.returncode, newer.stdout) == (0, "imported\n")
    assert "UserWarning: llama-cpp-python 0.9.0 is newer than" in newer.stderr


def test_a_newer_version_without_an_operation_is_refused_by_its_name() -> None:
    ended = imported("0.9.0", WITHOUT_ROPE)
    assert ended.returncode == 1
    assert "the loaded ggml has no operation ROPE. llama-cpp-python 0.9.0 is" in ended.stderr
    assert REMEDY in ended.stderr


@pytest.mark.parametrize("command", [["run", "-p", "What is it?"], ["doctor"]])
def test_a_build_whose_libraries_are_not_found_is_told_with_what_to_do(
    command: list[str], tmp_path: Path
) -> None:
    lost = "libcublas.so.13: cannot open shared object file: No such file or directory"
    (tmp_path / "llama_cpp.py").write_text(f"raise RuntimeError('Failed to load x.so: {lost}')")
    ended = run(*command, env={**environment(), "PYTHONPATH": str(tmp_path)})
    told = flat(ended.stdout + ended.stderr)
    assert ended.returncode == 1
    assert f"x.so: {lost}; add the folder of libcublas.so.13 to LD_LIBRARY_PATH, or" in told
    assert f"{REMEDY} --no-cache-dir" in told
    assert unusable(RuntimeError("something\n else")) == "something else"


def test_the_metadata_and_the_readme_name_these_versions() -> None:
    assert (ROOT / "pyproject.toml").read_text("utf-8").count(f'"{REQUIREMENT}"') == 2
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"`llama-cpp-python` ({OLDEST} or newer, tested to {NEWEST_TESTED})" in readme


def test_the_check_runs_what_there_is_from_the_oldest_to_the_newest() -> None:
    assert VERSIONS[0] == OLDEST
    assert VERSIONS[-1] == NEWEST_TESTED
    assert all((ROOT / "tests" / name).exists() for name in TESTS)


def test_a_version_is_well_where_all_that_was_run_passed() -> None:
    well = Outcome("0.3.30", {"passed": 7, "skipped": 1}, 0)
    bad = [Outcome("1", {}, 0), Outcome("1", {"passed": 7, "failed": 1}, 0)]
    bad += [Outcome("1", {"passed": 7, "errors": 2}, 0), Outcome("1", {"passed": 7}, 1)]
    assert well.is_well
    assert not any(one.is_well for one in bad)
    assert table([well, *bad[-2:]]).splitlines()[2:] == [
        "| 0.3.30 | 7 | 0 | 1 | well |",
        "| 1 | 7 | 2 | 0 | well |",
        "| 1 | 7 | 0 | 0 | status 1 |",
    ]


PROMPTS: list[tuple[tuple[chunks.Part | None, ...], bool]] = [
    ((("A <image> b", False), None), True),
    ((None, ("c", True), ("", False), ("</s>d", True), None, ("</s>", False)), True),
    ((("x\0y", True), None, None), False),
]


@pytest.mark.skipif(not chunks.HAS_PARTS, reason="there is nothing to compare with")
@pytest.mark.parametrize(("parts", "add_bos"), PROMPTS, ids=str)
def test_a_prompt_is_cut_the_same_image_by_image(
    pair: TinyPair, parts: tuple[chunks.Part | None, ...], add_bos: bool
) -> None:
    vlm = open_vlm(pair)
    images = tuple(picture(i) for i in range(parts.count(None)))
    source, projector = chunks.Source(parts, images, add_bos), vlm.projector
    cut = []
    for way in (chunks.at_once, chunks.one_by_one):
        bitmaps = [chunks._bitmap(image, i, False) for i, image in enumerate(images)]
        cut.append(way(projector._mtmd, source, [bitmap.pointer for bitmap in bitmaps]))
    assert [told(one) for one in cut[0]] == [told(one) for one in cut[1]]
    assert sum(isinstance(one, chunks.Chunk) for one in cut[0]) == len(images)


def told(one: object) -> object:
    if isinstance(one, chunks.Chunk):
        return one.image, one.n_tokens, one.n_pos
    return list(one)  # type: ignore[call-overload]
