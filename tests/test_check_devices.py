"""The checks on Vulkan and on a Mac, as far as they go without building anything."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import metal_check
import pytest
import vulkan_check
from device_suite import (
    ROOT,
    CannotRunError,
    call,
    install_packages,
    missing,
    pinned_source,
    read_report,
    run_program,
    run_tests,
    tell,
)
from device_tests import ALSO_ON_TWO, CHOSEN, LEFT_OUT, ON_LAVAPIPE, ON_MESA_22
from vulkan_check import PACKAGES, headers, lavapipe, mesa_major, on_lavapipe

from cmg_gguf.llama.versions import REQUIREMENT


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_chosen_tests_are_there_and_each_is_named_once() -> None:
    assert len(set(CHOSEN)) == len(CHOSEN)
    for name in (*CHOSEN, *ALSO_ON_TWO):
        file, _, test = name.partition("::")
        assert (ROOT / "tests" / file).is_file(), name
        assert not test or test.partition("[")[0] in functions_of(file), name


def test_what_is_run_on_two_devices_is_run_on_one_as_well() -> None:
    chosen_files = {name for name in CHOSEN if "::" not in name}
    assert all(name in CHOSEN or name.partition("::")[0] in chosen_files for name in ALSO_ON_TWO)


# --- one run ------------------------------------------------------------------------------------

TESTS = """
import os
import pytest

def test_well(record_property):
    record_property("figure", "eager 0.01")
    record_property("other", "no figure")
    assert os.environ["CMG_TEST_NGL"] == "99"
    assert os.environ["OF_THE_DEVICE"] == "told"

def test_ill():
    assert False

@pytest.mark.skip(reason="no such device")
def test_not_run():
    pass
"""


def test_a_run_tells_counts_failures_skips_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(TESTS, "utf-8")
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n", "utf-8")
    monkeypatch.setattr("device_suite.ROOT", tmp_path)
    found = run_tests(Path(sys.executable), ["test_some.py"], {"OF_THE_DEVICE": "told"})
    assert {name: found[name] for name in ("status", "passed", "failed", "skipped")} == {
        "status": 1,
        "passed": 1,
        "failed": 1,
        "skipped": 1,
    }
    assert found["figures"] == ["eager 0.01"]
    assert [name.rpartition("::")[2] for name in found["failures"]] == ["test_ill"]
    assert found["skips"] == ["test_not_run: no such device"]
    assert "test_ill" in capfd.readouterr().err


def test_an_error_in_a_fixture_is_a_failure() -> None:
    xml = '<s><testcase classname="a.b" name="c"><error message="x"/></testcase></s>'
    assert read_report(xml)["failures"] == ["a.b::c"]


def test_a_program_is_asked_for_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scripts").mkdir()
    program = tmp_path / "scripts" / "some.py"
    program.write_text("import sys\nprint('table')\nprint('{\"n\": %s}' % sys.argv[1])\n", "utf-8")
    monkeypatch.setattr("device_suite.ROOT", tmp_path)
    assert run_program(Path(sys.executable), "some.py", "3") == {"n": 3}
    program.write_text("raise SystemExit(4)\n", "utf-8")
    assert run_program(Path(sys.executable), "some.py") == {"status": 4}


def test_the_summary_is_one_line_that_says_what_was_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tell({"backend": "some"}, {"flash attention": "it crashes"})
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {
        "backend": "some",
        "left_out": {"flash attention": "it crashes"},
    }
    assert shown.out.count("\n") == 1
    assert "flash attention: it crashes" in shown.err
    assert LEFT_OUT.keys().isdisjoint(ON_LAVAPIPE)


def test_a_command_that_fails_is_told() -> None:
    with pytest.raises(CannotRunError, match="status 3"):
        call([sys.executable, "-c", "raise SystemExit(3)"])


def test_the_sources_are_those_that_the_project_pins() -> None:
    assert pinned_source((ROOT / "pyproject.toml").read_text("utf-8")).startswith(REQUIREMENT)


# --- Vulkan -------------------------------------------------------------------------------------


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """A PATH with nothing on it but these."""
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


QUERY = 'case "$*" in *glslc) exit 1;; *) printf installed;; esac'


def test_packages_that_are_missing_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, monkeypatch, dpkg_query=QUERY)
    assert missing(PACKAGES) == ["glslc"]


def test_whoever_may_not_install_packages_is_told_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, monkeypatch, dpkg_query=QUERY, apt_get="exit 9")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(CannotRunError, match=r"as root: apt-get install glslc$"):
        install_packages(PACKAGES)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(CannotRunError, match="status 9"):
        install_packages(PACKAGES)


def test_a_system_that_is_no_debian_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(tmp_path, monkeypatch)
    assert vulkan_check.main([str(tmp_path)]) == 2
    assert "no Debian" in capsys.readouterr().err


def test_lavapipe_is_the_only_driver_that_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vulkan_check, "DRIVERS", tmp_path)
    with pytest.raises(CannotRunError, match="no lavapipe"):
        lavapipe()
    for name in ("intel_icd.x86_64.json", "lvp_icd.x86_64.json"):
        (tmp_path / name).touch()
    found = lavapipe()
    assert found["VK_DRIVER_FILES"] == str(tmp_path / "lvp_icd.x86_64.json")
    assert found["CMG_TEST_FLASH"] == "0"


@pytest.mark.parametrize(("version", "major"), [("22.3.6-1+deb12u1", 22), ("25.0.7-2", 25)])
def test_what_mesa_22_cannot_run_is_one_of_the_chosen_tests(
    version: str, major: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, monkeypatch, dpkg_query=f"printf {version}")
    assert mesa_major() == major
    assert set(ON_MESA_22) < set(CHOSEN)
    chosen, left_out = on_lavapipe(major)
    assert set(CHOSEN) - set(chosen) == (set(ON_MESA_22) if major == 22 else set())
    assert ON_LAVAPIPE.keys() <= left_out.keys()
    assert (ON_MESA_22.keys() <= left_out.keys()) == (major == 22)


def test_the_header_that_fills_debians_up_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/others")
    first, others = headers()["CPLUS_INCLUDE_PATH"].split(":")
    assert others == "/others"
    assert "#include_next <vulkan/vulkan.hpp>" in (Path(first) / "vulkan" / "vulkan.hpp").read_text(
        "utf-8"
    )


# --- launchers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["check_vulkan", "check_metal"])
def test_the_launcher_runs_its_program(name: str) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / name, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: {name}" in done.stdout


def test_another_system_has_no_metal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert metal_check.main([]) == 2
    assert "Metal runs on macOS alone" in capsys.readouterr().err
