"""What the checks of other machines share: check_cuda, check_metal, check_vulkan, check_aarch64.

On a device: the tests of `device_tests.CHOSEN`, or all of them, with all layers on it; then a
benchmark. Then one JSON line on stdout that can be pasted into an issue. Progress is on stderr.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from device_tests import CHOSEN, LEFT_OUT

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "llama-cpp-python"
BUILD_TOOLS = ("cmake>=3.24", "ninja", "pip", "setuptools", "wheel")
ALL_LAYERS = 99


class CannotRunError(Exception):
    """What is missing, and what to do about it."""


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def call(command: Sequence[str], **environment: str) -> None:
    """Runs a command, its output on stderr. Raises CannotRunError if it fails."""
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=sys.stderr)
    if done.returncode != 0:
        raise CannotRunError(f"this failed with status {done.returncode}: {' '.join(command)}")


def watched(command: Sequence[str], folder: str | Path, **environ: str) -> tuple[int, str]:
    """Exit status and output of a command that runs in a folder; each line is told as it comes."""
    lines = []
    environment = {**os.environ, **environ}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            lines.append(line)
            say(line.rstrip())
    return running.returncode, "".join(lines)


def missing(packages: Sequence[str]) -> list[str]:
    """Those of Debian's packages that are not installed."""
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}"]
    return [
        name
        for name in packages
        if subprocess.run([*query, name], capture_output=True, text=True).stdout != "installed"
    ]


def install_packages(packages: Sequence[str]) -> None:
    """Of Debian, those that are missing. Raises CannotRunError where there is no apt-get, or no
    right to use it."""
    if shutil.which("dpkg-query") is None or shutil.which("apt-get") is None:
        raise CannotRunError("this is no Debian: dpkg-query and apt-get are not on PATH")
    names = missing(packages)
    if not names:
        return
    if os.geteuid() != 0:
        raise CannotRunError(f"run as root: apt-get install {' '.join(names)}")
    say(f"installing {' '.join(names)}")
    call(["apt-get", "update", "--quiet"])
    call(["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *names])


def requirements(pyproject: str) -> list[str]:
    """What building, installing and testing this package takes, by its pyproject.toml.

    The lists `requires`, `dependencies` and the extra `test`, as they stand there; where one names
    other extras of the package, what those list.
    """
    found: list[str] = []
    names = ["requires", "dependencies", "test"]
    for name in names:
        listed = re.search(rf'^{name} = \[((?:[^]"]|"[^"]*")*)\]', pyproject, re.MULTILINE)
        if listed is None:
            raise CannotRunError(f"pyproject.toml has no list named {name}")
        for line in re.findall(r'"([^"]+)"', listed.group(1)):
            extras = re.fullmatch(r"cmg-gguf\[([\w,]+)\]", line)
            if extras is None:
                found.append(line)
            else:
                names += [extra for extra in extras.group(1).split(",") if extra not in names]
    return list(dict.fromkeys(found))


def pinned_source(pyproject: str) -> str:
    """The requirement that names llama-cpp-python."""
    return next(line for line in requirements(pyproject) if line.startswith(SOURCE))


def environment(work: Path, backend_flags: str, **building: str) -> Path:
    """A Python with this package on a llama-cpp-python that is built for the device, once.

    work: holds the virtual environment and the built wheel, and is gone on with where there are.
    backend_flags: CMAKE_ARGS. building: more of the environment of that build.
    """
    python, wheels = work / "venv" / "bin" / "python", work / "wheels"
    if not python.exists():
        say("making a virtual environment")
        call([sys.executable, "-m", "venv", str(work / "venv")])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    needed = requirements(pyproject)
    call([*pip, "install", *BUILD_TOOLS, "scikit-build-core", "pybind11"])
    if not list(wheels.glob("llama_cpp_python-*.whl")):
        say(f"building {SOURCE} with {backend_flags}: about 20 minutes of one core, once")
        # Not into pip's cache, where others would take it for one of the CPU.
        build = ["wheel", "--no-cache-dir", "--no-deps", "--no-binary", SOURCE]
        options = ["--wheel-dir", str(wheels), pinned_source(pyproject)]
        call([*pip, *build, *options], CMAKE_ARGS=backend_flags, **building)
    say("installing this package and what its tests need")
    call([*pip, "install", "--no-deps", *map(str, wheels.glob("llama_cpp_python-*.whl"))])
    call([*pip, "install", *needed])
    call([*pip, "install", "--no-build-isolation", "--force-reinstall", "--no-deps", str(ROOT)])
    return python


def run_tests(
    python: Path, tests: Sequence[str] = CHOSEN, device: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """{"status", "passed", "failed", ..., "failures", "figures"}: of tests with all layers on the
    device. device: its environment."""
    say(f"running {'all tests' if not tests else 'the chosen tests'} with all layers on the device")
    return run_pytest(python, tests, **{**(device or {}), "CMG_TEST_NGL": str(ALL_LAYERS)})


def run_pytest(python: Path, tests: Sequence[str], *options: str, **environ: str) -> dict[str, Any]:
    """{"status", "passed", "failed", ..., "failures", "figures"} of these tests, or all."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
        command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        command += ["--override-ini", "junit_family=xunit1", f"--junit-xml={report}"]
        named = [str(ROOT / "tests" / name) for name in tests or ("",)]
        # From elsewhere: the installed package is tested, not the sources.
        status, output = watched([*command, *named], folder, **environ)
        found = read_report(report.read_text("utf-8")) if report.exists() else {}
    return {"status": status, **last_counts(output), **found}


def read_report(xml: str) -> dict[str, Any]:
    """What pytest's JUnit file says beside the counts: names that failed, skips by reason, and the
    properties named "figure"."""
    failures, skipped, figures = [], [], []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(f"{case.get('classname')}::{case.get('name')}")
        if (skip := case.find("skipped")) is not None:
            skipped.append(f"{case.get('name')}: {skip.get('message')}")
        figures += [
            str(entry.get("value"))
            for entry in case.iter("property")
            if entry.get("name") == "figure"
        ]
    return {"failures": failures, "skips": skipped, "figures": figures}


def last_counts(output: str) -> dict[str, int]:
    """{"passed": 700, ...} from pytest's last line."""
    lines = output.strip().splitlines()
    return {word: int(n) for n, word in re.findall(r"(\d+) ([a-z]+)", lines[-1] if lines else "")}


def run_program(
    python: Path, script: str, *options: str, device: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The JSON object that a program of this folder prints last; {"status"} if it failed."""
    say(f"measuring: {script}")
    done = subprocess.run(
        [str(python), str(ROOT / "scripts" / script), *options],
        env={**os.environ, **(device or {})},
        cwd=python.parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    say(done.stdout)
    if done.returncode != 0 or not done.stdout.strip():
        return {"status": done.returncode}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def tell(summary: Mapping[str, Any], left_out: Mapping[str, str] = LEFT_OUT) -> None:
    """What was left out and why, on stderr; the summary as one line of JSON on stdout."""
    say("left out:")
    for what, why in left_out.items():
        say(f"  {what}: {why}")
    print(json.dumps({**summary, "left_out": dict(left_out)}))
