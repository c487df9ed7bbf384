"""One wheel of this package on several versions of llama-cpp-python, each built from source.

    scripts/check_versions [--work DIR] [--wheel FILE] [VERSION ...]

The wheel is built once, with the headers of the newest of them; then, for each version, a virtual
environment gets that wheel, the tests below are run and the self-test of `cmg-gguf doctor`. At the
end a table on stdout. A version takes six minutes of two cores to build, once: its wheel is kept
in --work (default: ~/.cache/cmg-gguf/versions), where one that is there already is used.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from device_suite import ROOT, CannotRunError, call, last_counts, requirements, say

SOURCE = "llama-cpp-python"
VERSIONS = ("0.3.31", "0.3.35", "0.3.36")
"""The oldest that is supported, one between, the newest that was there."""
TESTS = (
    "test_versions.py",
    "test_exact.py",
    "test_graph_patch.py",
    "test_influence.py",
    "test_influence_device.py",
    "test_encoder_mend.py",
    "test_generation.py",
    "test_fork.py",
    "test_states.py",
    "test_sampling.py",
    "test_reference.py",
    "test_tiles.py",
    "test_vlm.py",
    "test_log.py",
    "test_doctor.py",
)
"""What the extension does to graphs, memory and samplers, and whole answers."""


@dataclass(frozen=True)
class Outcome:
    """Of one version. doctor: exit status of `cmg-gguf doctor`, 0 if all is well."""

    version: str
    counts: dict[str, int]
    doctor: int

    @property
    def is_well(self) -> bool:
        bad = self.counts.get("failed", 0) + self.counts.get("errors", 0)
        return self.doctor == 0 and bad == 0 and self.counts.get("passed", 0) > 0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all is well on every version."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--work", type=Path, default=Path("~/.cache/cmg-gguf/versions"))
    parser.add_argument("--wheel", type=Path, help="of this package; default: it is built")
    told = parser.parse_args(arguments)
    work = told.work.expanduser().resolve()
    try:
        pythons = {version: environment(work, version) for version in told.versions}
        wheel = told.wheel or build(work, pythons[told.versions[-1]])
        outcomes = [run(pythons[version], version, wheel.resolve()) for version in told.versions]
    except CannotRunError as exc:
        say(str(exc))
        return 1
    print(table(outcomes))
    return 0 if all(outcome.is_well for outcome in outcomes) else 1


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: version x result."""
    rows = ["| llama-cpp-python | passed | failed | skipped | doctor |", "|---|---|---|---|---|"]
    for one in outcomes:
        bad = one.counts.get("failed", 0) + one.counts.get("errors", 0)
        doctor = "well" if one.doctor == 0 else f"status {one.doctor}"
        passed, skipped = one.counts.get("passed", 0), one.counts.get("skipped", 0)
        rows.append(f"| {one.version} | {passed} | {bad} | {skipped} | {doctor} |")
    return "\n".join(rows)


def environment(work: Path, version: str) -> Path:
    """Its Python, with that llama-cpp-python and what the tests need."""
    python, wheels = work / version / "bin" / "python", work / "wheels"
    if not python.exists():
        call([sys.executable, "-m", "venv", str(work / version)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if not list(wheels.glob(f"llama_cpp_python-{version}-*.whl")):
        say(f"building {SOURCE} {version}: about six minutes of two cores, once")
        options = ["--no-cache-dir", "--no-deps", "--no-binary", SOURCE, "--wheel-dir", str(wheels)]
        call([*pip, "wheel", *options, f"{SOURCE}=={version}"])
    say(f"installing {SOURCE} {version} and what the tests need")
    needed = requirements((ROOT / "pyproject.toml").read_text("utf-8"))
    others = [one for one in needed if not one.startswith((SOURCE, "cmg-gguf"))]
    (built,) = wheels.glob(f"llama_cpp_python-{version}-*.whl")
    call([*pip, "install", str(built), *others])
    return python


def build(work: Path, python: Path) -> Path:
    """This package's wheel, with the headers of that Python's llama-cpp-python."""
    say("building this package's wheel")
    folder = work / "cmg-gguf"
    for old in folder.glob("cmg_gguf-*.whl"):
        old.unlink()
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    call([*pip, "install", "cmake>=3.24", "ninja"])
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    call([*pip, "wheel", *options])
    (wheel,) = folder.glob("cmg_gguf-*.whl")
    return wheel


def run(python: Path, version: str, wheel: Path) -> Outcome:
    """Installs the wheel, runs the tests and the self-test."""
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    call([*pip, "install", "--no-deps", "--force-reinstall", str(wheel)])
    say(f"testing on {SOURCE} {version}")
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--quick"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    here = {"cwd": str(python.parent), "stdout": subprocess.PIPE, "text": True}
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    environ = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([*command, *tests], env=environ, **here)  # type: ignore[call-overload]
    say(done.stdout[-8000:])
    doctor = subprocess.run([str(python), "-m", "cmg_gguf.cli", "doctor"], env=environ, **here)  # type: ignore[call-overload]
    say(doctor.stdout)
    return Outcome(version, last_counts(done.stdout), doctor.returncode)


if __name__ == "__main__":
    sys.exit(main())
