"""The tests and the benchmark on an NVIDIA GPU, on a machine that may have no network.

    scripts/check_cuda pack FOLDER       # with a network: sources and wheels into FOLDER
    scripts/check_cuda run FOLDER        # on the GPU machine: builds, tests, measures
    scripts/check_cuda compile FOLDER    # with nvcc, no GPU: configures, compiles kernels

`pack` runs under the Python version, and on the kind of machine, that `run` will; cuBLAS goes
along, for toolkits without it (scripts/cuda_toolkit.py). `run` builds llama-cpp-python for the
architecture of the GPU at hand and no other, installs this package, runs the chosen tests with all
layers on the GPU (--all: all of them), then the benchmark. What it builds is in FOLDER/work: where
it was stopped, it goes on. `compile` configures the same build and compiles KERNELS (--all: every
file of ggml-cuda, and links it) for one architecture. Progress is on stderr; the last line on
stdout is one JSON object.

Exit status: 0 = all well, 1 = tests or files failed, or a figure is not as expected, 2 = cannot run
here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cuda_toolkit import (
    LATEST_MAJOR,
    Toolkit,
    complete,
    cublas_requirement,
    find_toolkit,
    library_path,
)
from device_suite import (
    ALL_LAYERS,
    BUILD_TOOLS,
    ROOT,
    SOURCE,
    CannotRunError,
    call,
    requirements,
    run_program,
    run_tests,
    say,
    tell,
)
from device_tests import CHOSEN

EAGER_ROW, EAGER_LIMIT = "decode, eager pair", 1.10
"""A GPU computes two rows of a product in the time of one."""
KERNELS = (
    *("ggml-cuda", "getrows", "set-rows", "cpy", "norm", "rope", "unary", "binbcast", "softmax"),
    *("quantize", "mmvf", "mmvq", "mmq", "template-instances/mmq-instance-q4_0"),
    "template-instances/fattn-vec-instance-f16-f16",
)
"""Files of ggml-cuda that a decode of a Q4_0 model, and influence on it, goes through."""


def pack_command(folder: Path, needed: Sequence[str], *options: str) -> list[str]:
    """The pip call that fetches it all: wheels, and of llama-cpp-python the sources."""
    pip = [sys.executable, "-m", "pip", "download", "--dest", str(folder)]
    return [*pip, "--no-binary", SOURCE, "--prefer-binary", *options, *needed, *BUILD_TOOLS]


def architecture(answer: str) -> str:
    """CMAKE_CUDA_ARCHITECTURES for what `nvidia-smi --query-gpu=compute_cap` answers.

    "9.0" -> "90". Of several GPUs, the first. Raises CannotRunError for anything else.
    """
    lines = answer.split()
    if not lines or not (match := re.fullmatch(r"(\d+)\.(\d)", lines[0])):
        raise CannotRunError(
            f"nvidia-smi gave {answer.strip()!r} for the compute capability, not a number like "
            "9.0; update the driver"
        )
    return match.group(1) + match.group(2)


def find_gpu() -> tuple[str, str]:
    """(name, architecture) of the first GPU. Raises CannotRunError where there is none."""
    if shutil.which("nvidia-smi") is None:
        raise CannotRunError("nvidia-smi is not on PATH: no NVIDIA driver here; install one")
    query = ["nvidia-smi", "--format=csv,noheader"]
    answers = []
    for what in ("name", "compute_cap"):
        done = subprocess.run([*query, f"--query-gpu={what}"], capture_output=True, text=True)
        if done.returncode != 0:
            told = (done.stdout + done.stderr).strip()
            raise CannotRunError(f"nvidia-smi sees no GPU: {told or done.returncode}")
        answers.append(done.stdout)
    return answers[0].strip().splitlines()[0], architecture(answers[1])


def find_source(folder: Path) -> Path:
    """The packed sources of llama-cpp-python. Raises CannotRunError where there are none."""
    found = sorted(folder.glob("llama_cpp_python-*.tar.gz"))
    if not found:
        raise CannotRunError(
            f"{folder} holds no sources of {SOURCE}; fill it with `scripts/check_cuda pack` on a "
            "machine with a network"
        )
    return found[-1]


def pack(folder: Path, *options: str) -> int:
    """Fetches everything into the folder; options go to pip."""
    folder.mkdir(parents=True, exist_ok=True)
    major = LATEST_MAJOR if shutil.which("nvcc") is None else find_toolkit().version[0]
    cublas = cublas_requirement(major)
    needed = requirements((ROOT / "pyproject.toml").read_text("utf-8"))
    say(f"fetching sources and wheels into {folder}, about 700 MB, with {cublas}")
    call(pack_command(folder, [*needed, cublas], *options))
    return 0


def run(folder: Path, bench_options: Sequence[str], *, whole: bool) -> int:
    """Builds, tests, measures; prints the summary."""
    name, arch = find_gpu()
    toolkit = find_toolkit()
    source, work = find_source(folder), folder / "work"
    say(f"{name}, architecture {arch}")
    started = time.perf_counter()
    python = _environment(folder, work)
    _build(python, folder, work, source, _flags(toolkit, python, folder, work, arch), arch)
    _install(python, folder, work)
    built = time.perf_counter()
    libraries = [*library_path(python), toolkit.root / "lib64", toolkit.root / "lib"]
    inherited = filter(None, [os.environ.get("LD_LIBRARY_PATH")])
    device = {"LD_LIBRARY_PATH": os.pathsep.join([*map(str, libraries), *inherited])}
    tests = run_tests(python, () if whole else CHOSEN, device=device)
    options = ("--ngl", str(ALL_LAYERS), *bench_options)
    measured = run_program(python, "bench.py", *options, device=device)
    eager = eager_ratios(measured)
    met = bool(eager) and all(ratio <= EAGER_LIMIT for ratio in eager.values())
    summary = {
        "backend": "CUDA",
        "device": name,
        "architecture": arch,
        "toolkit": ".".join(map(str, toolkit.version)),
        "build_seconds": round(built - started),
        "tests": tests,
        "eager_pair": {"wanted": EAGER_LIMIT, "ratios": eager, "met": met},
        "bench": measured,
    }
    tell(summary)
    return 0 if met and tests["status"] == 0 else 1


def compile_only(folder: Path, arch: str, *, whole: bool) -> int:
    """Configures for an architecture, compiles KERNELS or all there is; prints the summary."""
    toolkit = find_toolkit()
    source, work = find_source(folder), folder / "work"
    python = _environment(folder, work)
    flags = _flags(toolkit, python, folder, work, arch)
    build = work / f"compile-{arch}"
    started = time.perf_counter()
    say(f"configuring for architecture {arch} with {' '.join(flags)}")
    cmake, ninja = python.with_name("cmake"), python.with_name("ninja")
    configure = [str(cmake), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *flags]
    call([*configure, "-S", str(_unpacked(source, work)), "-B", str(build)])
    configured = time.perf_counter()
    listed = subprocess.run(
        [ninja, "-C", build, "-t", "targets", "all"], capture_output=True, text=True
    )
    objects = cuda_objects(listed.stdout)
    names = sorted(objects) if whole else list(KERNELS)
    if unknown := sorted(set(names) - set(objects)):
        raise CannotRunError(f"ggml-cuda has no {', '.join(unknown)} to compile here")
    say(f"compiling {len(names)} of ggml-cuda's {len(objects)} files")
    targets = [objects[name] for name in names] + ["ggml-cuda"] * whole
    done = subprocess.run([ninja, "-C", build, "-k", "0", *targets], stdout=sys.stderr)
    failed = [name for name in names if not (build / objects[name]).exists()]
    summary = {
        "backend": "CUDA",
        "device": "none: compiled only",
        "architecture": arch,
        "toolkit": ".".join(map(str, toolkit.version)),
        "flags": flags,
        "configure_seconds": round(configured - started),
        "compile_seconds": round(time.perf_counter() - configured),
        "files": {"all": len(objects), "compiled": len(names) - len(failed), "failed": failed},
        "linked": whole and done.returncode == 0,
    }
    print(json.dumps(summary))
    return 0 if done.returncode == 0 else 1


def cuda_objects(listed: str) -> dict[str, str]:
    """{"softmax": "vendor/.../softmax.cu.o", ...} of what ninja lists as targets."""
    found = re.findall(r"^(\S*/ggml-cuda\.dir/(\S+)\.cu\.o): ", listed, re.MULTILINE)
    return {name: path for path, name in found}


def eager_ratios(measured: Mapping[str, Any]) -> dict[str, float]:
    """Median ratio of the eager pair to plain decoding, by model, from the benchmark's JSON."""
    for row in measured.get("rows", ()):
        if row["name"] == EAGER_ROW:
            return {name: result["median"] for name, result in row["results"].items()}
    return {}


def _environment(folder: Path, work: Path) -> Path:
    """The Python of a virtual environment in the work folder, with the tools that build."""
    python = work / "venv" / "bin" / "python"
    if not python.exists():
        say("making a virtual environment")
        call([sys.executable, "-m", "venv", str(work / "venv")])
    _pip(python, folder, work, "install", *BUILD_TOOLS, "scikit-build-core", "pybind11")
    return python


def _flags(toolkit: Toolkit, python: Path, folder: Path, work: Path, arch: str) -> list[str]:
    """CMake's arguments for one architecture, with this toolkit."""
    install = _pip_command(python, folder, work, "install")
    lacking = complete(toolkit, python, work, install)
    return ["-DGGML_CUDA=on", f"-DCMAKE_CUDA_ARCHITECTURES={arch}", *lacking]


def _unpacked(source: Path, work: Path) -> Path:
    """The sources' folder."""
    unpacked = work / source.name.removesuffix(".tar.gz")
    if not unpacked.exists():
        with tarfile.open(source) as archive:
            archive.extractall(work, filter="data")
    return unpacked


def _build(
    python: Path, folder: Path, work: Path, source: Path, flags: Sequence[str], arch: str
) -> None:
    """A wheel of llama-cpp-python for this architecture, if there is none yet."""
    wheels = work / f"wheels-{arch}"
    if not list(wheels.glob("llama_cpp_python-*.whl")):
        say(f"building {SOURCE} for architecture {arch}; stopped, it goes on where it was")
        # Not isolated and in a folder that stays: an interrupted build is not lost.
        _pip(
            python,
            folder,
            work,
            *("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(wheels)),
            f"--config-settings=build-dir={work / f'build-{arch}'}",
            str(_unpacked(source, work)),
            CMAKE_ARGS=shlex.join(flags),
        )
    for wheel in wheels.glob("*.whl"):
        shutil.copy(wheel, _wheels(work))


def _install(python: Path, folder: Path, work: Path) -> None:
    say("installing this package and what its tests need")
    options = ("--no-build-isolation", "--force-reinstall", "--no-deps")
    _pip(python, folder, work, "install", SOURCE)
    _pip(python, folder, work, "install", *options, str(ROOT))
    needed = requirements((ROOT / "pyproject.toml").read_text("utf-8"))
    _pip(python, folder, work, "install", *needed)


def _wheels(work: Path) -> Path:
    folder = work / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _pip(python: Path, folder: Path, work: Path, *arguments: str, **environment: str) -> None:
    command, *rest = arguments
    call([*_pip_command(python, folder, work, command), *rest], **environment)


def _pip_command(python: Path, folder: Path, work: Path, command: str) -> list[str]:
    """pip without a network: from the folder, and from what was built here, which comes first."""
    places = ["--no-index", "--find-links", str(_wheels(work)), "--find-links", str(folder)]
    return [str(python), "-m", "pip", command, *places, "--disable-pip-version-check"]


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="check_cuda", description="Tests and benchmark on an NVIDIA GPU, without a network."
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="pack|run|compile")
    for name, what, rest in (
        ("pack", "fetch sources and wheels; needs a network", "pip download"),
        ("run", "build, test and measure; needs a GPU and nvcc", "bench.py"),
        ("compile", "configure and compile kernels; needs nvcc", None),
    ):
        step = steps.add_parser(name, help=what, epilog=rest and f"More options go to {rest}.")
        step.add_argument("folder", type=Path)
        if name == "run":
            step.add_argument("--all", action="store_true", help="all tests, not the chosen ones")
        if name == "compile":
            step.add_argument("--all", action="store_true", help="all files, and link them")
            step.add_argument("--architecture", default="90", help="default: %(default)s, Hopper")
    args, options = parser.parse_known_args(argv)
    if args.step == "compile" and options:
        parser.error(f"unknown options: {' '.join(options)}")
    return args, options


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; see above."""
    args, options = _arguments(argv)
    folder = args.folder.resolve()
    try:
        if args.step == "pack":
            return pack(folder, *options)
        if args.step == "compile":
            return compile_only(folder, args.architecture, whole=args.all)
        return run(folder, options, whole=args.all)
    except CannotRunError as exc:
        say(f"check_cuda: {exc}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
