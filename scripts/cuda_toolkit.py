"""NVIDIA's compiler on this machine, and what its toolkit lacks of what ggml-cuda is built with.

A toolkit may be nvcc and the runtime alone. Then cuBLAS comes from NVIDIA's wheel, and where there
is no libcuda to link with (a driver's, or the toolkit's stub of it), ggml-cuda is built without
virtual memory, which is all that it needs it for.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from device_suite import CannotRunError, call

LATEST_MAJOR = 13
"""Packed for, where no nvcc says otherwise."""
_SYSTEM_LIBRARIES = (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu"))
_ON_LIBRARIES = ("cublas", "cublasLt")


def cublas_requirement(major: int) -> str:
    """The wheel of cuBLAS for a toolkit, as NVIDIA names it: 13 -> "nvidia-cublas==13.*"."""
    return f"nvidia-cublas=={major}.*" if major >= 13 else f"nvidia-cublas-cu{major}=={major}.*"


@dataclass(frozen=True)
class Toolkit:
    """root: with bin, include and lib64, or lib. version: (major, minor)."""

    root: Path
    version: tuple[int, int]

    @property
    def libraries(self) -> list[Path]:
        """Folders that linkers look in, those of stubs last."""
        found = [self.root / name for name in ("lib64", "lib")]
        found += sorted(self.root.glob("targets/*/lib"))
        return [*found, *(folder / "stubs" for folder in found), *_SYSTEM_LIBRARIES]

    def holds(self, library: str) -> bool:
        """Whether a linker finds it: an unversioned lib*.so."""
        return any((folder / f"lib{library}.so").exists() for folder in self.libraries)


def find_toolkit() -> Toolkit:
    """That of the nvcc on PATH. Raises CannotRunError where CUDA code cannot be compiled."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CannotRunError(
            "nvcc is not on PATH; install the CUDA toolkit, or add its bin folder "
            "(often /usr/local/cuda/bin) to PATH"
        )
    version = re.search(r"release (\d+)\.(\d+)", _answer(nvcc, "--version"))
    # What is on PATH may be a link or a script: the compiler itself says where it is.
    root = re.search(r"^#\$ TOP=(.+)$", _answer(nvcc, "--dryrun", "-E", "any.cu"), re.MULTILINE)
    if version is None or root is None:
        raise CannotRunError(f"{nvcc} names neither its version nor its folder; is it NVIDIA's?")
    return Toolkit(Path(root.group(1)).resolve(), (int(version.group(1)), int(version.group(2))))


def complete(toolkit: Toolkit, python: Path, work: Path, install: Sequence[str]) -> list[str]:
    """CMake's arguments for what the toolkit lacks; cuBLAS is installed where that is it.

    python: of the environment that it goes into. install: the pip command that does so, without
    the package. work: where links are put.
    """
    found = [] if toolkit.holds("cuda") else ["-DGGML_CUDA_NO_VMM=on"]
    if toolkit.holds("cublas"):
        return found
    call([*install, cublas_requirement(toolkit.version[0])])
    links = work / "cublas"
    links.mkdir(parents=True, exist_ok=True)
    for name in _ON_LIBRARIES:
        link = links / f"lib{name}.so"
        link.unlink(missing_ok=True)
        link.symlink_to(_installed(python, f"lib{name}.so.*"))
        found.append(f"-DCUDA_{name}_LIBRARY={link}")
    return [*found, f"-DCMAKE_CUDA_FLAGS=-I{_installed(python, 'cublas_v2.h').parent}"]


def library_path(python: Path) -> list[Path]:
    """Where cuBLAS lies in this environment, for LD_LIBRARY_PATH; nothing, if not there."""
    return sorted({path.parent for path in _nvidia(python, "libcublas.so.*")})


def _installed(python: Path, pattern: str) -> Path:
    """A file of NVIDIA's wheels. Raises CannotRunError."""
    found = _nvidia(python, pattern)
    if not found:
        raise CannotRunError(f"NVIDIA's wheels hold no {pattern}; pack the folder again")
    return found[0]


def _nvidia(python: Path, pattern: str) -> list[Path]:
    folder = python.parent.parent / "lib"
    return sorted(folder.glob(f"python*/site-packages/nvidia/*/*/{pattern}"))


def _answer(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr
