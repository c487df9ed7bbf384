"""A Python of 64-bit Arm with this package in it, on a Debian machine that is none.

Debian's arm64 packages are fetched and unpacked, not installed; llama-cpp-python and this package
are cross-compiled into wheels; Arm's own pip, emulated by qemu-user, installs them beside PyPI's
wheels. What is there already is gone on with; this package is built anew each time.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from device_suite import (
    BUILD_TOOLS,
    ROOT,
    SOURCE,
    CannotRunError,
    call,
    pinned_source,
    requirements,
    say,
)

PACKAGES = ("g++-aarch64-linux-gnu", "qemu-user", "g++", "python3-venv")
"""Of Debian, installed here."""
ARM_PACKAGES = ("python3", "libpython3-dev", "libgomp1", "libstdc++6")
"""Of Debian's arm64, unpacked with what they depend on."""
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
GLIBC = range(17, 37)
"""2.17 to 2.36, Debian 12's: the manylinux wheels that run there."""


@dataclass(frozen=True)
class Board:
    """A core, what llama.cpp is compiled for on it, and qemu's name of it."""

    name: str
    march: str
    cpu: str


BOARDS = {
    "pi5": Board("Cortex-A76: Raspberry Pi 5, Jetson Orin", "armv8.2-a+dotprod+fp16", "cortex-a76"),
    "pi4": Board("Cortex-A72: Raspberry Pi 4", "armv8-a", "cortex-a72"),
}


def arm_python(folder: Path, board: str) -> Path:
    """A program that runs as a Python of the board with this package and what its tests need.

    folder: where all is kept. Raises CannotRunError.
    """
    root = _unpacked(folder)
    builder = _builder(folder)
    llama = _llama_wheel(folder, builder, board)
    ours = _our_wheel(folder, builder, root, llama)
    fetched = _fetched(folder, builder, llama)
    python = folder / board / "bin" / "python"
    _write_python(python, root, BOARDS[board].cpu)
    say("installing all that, by Arm's pip")
    pip = [str(python), str(next(fetched.glob("pip-*.whl")) / "pip"), "install", "--quiet"]
    pip += ["--no-index", "--no-compile", "--disable-pip-version-check"]
    call([*pip, "--find-links", str(fetched), str(llama), *_needed()])
    call([*pip, "--no-deps", "--force-reinstall", str(ours)])
    return python


def _needed() -> list[str]:
    listed = requirements((ROOT / "pyproject.toml").read_text("utf-8"))
    return [line for line in listed if not line.startswith((SOURCE, "scikit-build", "pybind11"))]


def _unpacked(folder: Path) -> Path:
    """The root of an arm64 Debian that holds a Python, its headers and its libraries."""
    root = folder / "root"
    if (root / "usr" / "bin" / PYTHON).exists():
        return root
    apt = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    options = ["APT::Architecture=arm64", "APT::Architectures=arm64", f"Dir::Cache={apt}/cache"]
    options += [f"Dir::State::Lists={apt}/lists", f"Dir::State::status={apt}/status"]
    # As any user may run it; and no other lock than that of its own folder.
    options += ["APT::Sandbox::User=", "Debug::NoLocking=1", "APT::Install-Recommends=0"]
    get = ["apt-get", "--quiet", *(word for option in options for word in ("-o", option))]
    say(f"fetching Debian's {', '.join(ARM_PACKAGES)} for arm64")
    call([*get, "update"])
    call([*get, "install", "--yes", "--download-only", *ARM_PACKAGES])
    part = folder / "root.part"
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        call(["dpkg-deb", "--extract", str(package), str(part)])
    if not (part / "usr" / "bin" / PYTHON).exists():
        (found,) = (part / "usr" / "bin").glob("python3.[0-9]*[0-9]")
        raise CannotRunError(
            f"this is {PYTHON} and Debian's for arm64 {found.name}; run with "
            "PYTHON=/usr/bin/python3 and CMG_VENV=a new folder"
        )
    part.rename(root)
    return root


def _builder(folder: Path) -> Path:
    """The Python of a virtual environment of this machine, with the tools that build."""
    python = folder / "builder" / "bin" / "python"
    if not python.exists():
        call([sys.executable, "-m", "venv", str(folder / "builder")])
    tools = [*BUILD_TOOLS, "scikit-build-core", "pybind11"]
    call([*_pip(python), "install", *tools])
    return python


def _pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]


CROSS = (
    "-DCMAKE_SYSTEM_NAME=Linux",
    "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
)
TAGGED = {"_PYTHON_HOST_PLATFORM": "linux-aarch64"}
"""How Python's sysconfig, and so a wheel's tag, is told of another machine."""


def _llama_wheel(folder: Path, builder: Path, board: str) -> Path:
    """llama-cpp-python with its libraries, for the board, built once."""
    wheels = folder / f"llama-{board}"
    if not (found := sorted(wheels.glob("*_aarch64.whl"))):
        march = BOARDS[board].march
        say(f"building {SOURCE} for {march}: about ten minutes of two cores, once")
        flags = [*CROSS, "-DGGML_NATIVE=OFF", f"-DGGML_CPU_ARM_ARCH={march}"]
        pinned = pinned_source((ROOT / "pyproject.toml").read_text("utf-8"))
        # Not into pip's cache, where others would take it for one of this machine.
        options = ["--no-cache-dir", "--no-deps", "--no-binary", SOURCE, "--no-build-isolation"]
        command = [*_pip(builder), "wheel", *options, "--wheel-dir", str(wheels), pinned]
        jobs = str(len(os.sched_getaffinity(0)))
        call(command, CMAKE_ARGS=shlex.join(flags), CMAKE_BUILD_PARALLEL_LEVEL=jobs, **TAGGED)
        found = sorted(wheels.glob("*_aarch64.whl"))
    return found[-1]


def _our_wheel(folder: Path, builder: Path, root: Path, llama: Path) -> Path:
    """This package for any aarch64, with the headers of that llama-cpp-python."""
    say("building this package")
    wheels, headers = folder / "cmg-gguf", folder / "headers"
    for place in (wheels, headers):
        shutil.rmtree(place, ignore_errors=True)
    there = ["--target", str(headers), "--platform", "linux_aarch64", "--no-deps"]
    call([*_pip(builder), "install", *there, str(llama)])
    include = root / "usr" / "include"
    suffix = f".cpython-{sys.version_info.major}{sys.version_info.minor}-aarch64-linux-gnu.so"
    flags = [*CROSS, f"-DPython_INCLUDE_DIR={include / PYTHON}"]
    flags += [f"-DPYTHON_MODULE_EXTENSION={suffix}"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)]
    call(
        [*_pip(builder), "wheel", *options],
        CMAKE_ARGS=shlex.join(flags),
        CXXFLAGS=f"-idirafter {include}",
        PYTHONPATH=str(headers),
        **TAGGED,
    )
    (wheel,) = wheels.glob("*_aarch64.whl")
    return wheel


def _fetched(folder: Path, builder: Path, llama: Path) -> Path:
    """PyPI's wheels of what the tests need, for aarch64."""
    say("fetching what the tests need, for aarch64")
    wheels = folder / "wheels"
    tags = ["linux_aarch64", "manylinux2014_aarch64"]
    tags += [f"manylinux_2_{n}_aarch64" for n in GLIBC]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    options = ["--dest", str(wheels), "--only-binary=:all:", *platforms]
    call([*_pip(builder), "download", *options, "pip", str(llama), *_needed()])
    return wheels


def _write_python(python: Path, root: Path, cpu: str) -> None:
    """A virtual environment whose Python is a script: it and its children run in qemu."""
    python.parent.mkdir(parents=True, exist_ok=True)
    home = root / "usr" / "bin"
    (python.parent.parent / "pyvenv.cfg").write_text(f"home = {home}\n", "utf-8")
    qemu = ["qemu-aarch64", "-cpu", cpu, "-L", str(root)]
    python.write_text(
        f'#!/bin/sh\nexec {shlex.join(qemu)} -0 "$0" {shlex.quote(str(home / PYTHON))} "$@"\n',
        "utf-8",
    )
    python.chmod(0o755)


def machine(python: Path) -> str:
    """What that Python says of itself and of llama.cpp's kernels."""
    program = (
        "import platform, llama_cpp; print(platform.machine(), platform.python_version(),"
        " llama_cpp.__version__, llama_cpp.llama_print_system_info().decode())"
    )
    return subprocess.check_output(
        [str(python), "-c", program], text=True, cwd=python.parent
    ).strip()
