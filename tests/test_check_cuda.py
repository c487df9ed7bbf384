"""The check on NVIDIA GPUs, as far as it goes without one."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import cuda_check
import cuda_toolkit
import pytest
from benchmarks.report import ROWS
from cuda_check import (
    KERNELS,
    architecture,
    cuda_objects,
    eager_ratios,
    find_gpu,
    find_source,
    main,
    pack_command,
)
from cuda_toolkit import LATEST_MAJOR, Toolkit, complete, cublas_requirement, find_toolkit
from device_suite import ROOT, CannotRunError, last_counts, requirements

PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
SMI = '#!/bin/sh\ncase "$*" in *compute_cap*) echo 8.9;; *) echo "NVIDIA L4";; esac\n'

NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 12.8, V12.8.93";;
*) echo '#$ _HERE_={root}/bin' >&2; echo '#$ TOP={root}/bin/..' >&2;;
esac
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it but what a test puts there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def put(folder: Path, name: str, script: str) -> None:
    program = folder / name
    program.write_text(script, "utf-8")
    program.chmod(0o755)


# --- pack --------------------------------------------------------------------------------------


def test_what_is_packed_is_what_the_project_names() -> None:
    needed = requirements(PYPROJECT)
    names = {name.split(">")[0].split("=")[0] for name in needed}
    assert {"scikit-build-core", "pybind11", "llama-cpp-python", "numpy", "gguf", "pytest"} <= names
    assert len(needed) == len(set(needed))
    assert "huggingface-hub" in names  # of an extra that the extra `test` names
    assert not any(name.startswith("cmg-gguf") for name in needed)


def test_requirements_with_extras_are_read_whole() -> None:
    text = 'requires = ["a[x,y]>=1", "b"]\ndependencies = [\n  "c",\n  "b",\n]\ntest = ["d[z]"]\n'
    assert requirements(text) == ["a[x,y]>=1", "b", "c", "d[z]"]
    with pytest.raises(CannotRunError, match="dependencies"):
        requirements('requires = ["a"]\n')


def test_a_folder_is_packed_from_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, folder = tmp_path / "index", tmp_path / "packed"
    index.mkdir()
    wheel(index, "somelib", "1.0")
    wheel(index, "nvidia_cublas", f"{LATEST_MAJOR}.1.2")
    wheel(index, "nvidia_cublas", f"{LATEST_MAJOR + 1}.0.0")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(cuda_check, "requirements", lambda text: ["somelib>=1"])
    monkeypatch.setattr(cuda_check, "BUILD_TOOLS", ())
    assert main(["pack", str(folder), "--no-index", "--find-links", str(index)]) == 0
    names = "nvidia_cublas-13.1.2-py3-none-any.whl", "somelib-1.0-py3-none-any.whl"
    assert tuple(sorted(path.name for path in folder.iterdir())) == names


def test_a_failed_download_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_check, "requirements", lambda text: ["no-such-thing"])
    assert main(["pack", str(tmp_path), "--no-index"]) == 2
    assert "failed with status" in capfd.readouterr().err


def test_of_llama_cpp_python_the_sources_are_packed(tmp_path: Path) -> None:
    command = pack_command(tmp_path, ["a"], "--dry-run")
    at = command.index("--no-binary")
    assert command[at + 1] == "llama-cpp-python"
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"a", "--dry-run", "ninja"} <= set(command)


def wheel(folder: Path, name: str, version: str) -> None:
    """An empty wheel."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


# --- run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"), [("9.0\n", "90"), ("8.9\n8.6\n", "89"), (" 12.0 ", "120")]
)
def test_the_architecture_is_that_of_the_first_gpu(answer: str, expected: str) -> None:
    assert architecture(answer) == expected


@pytest.mark.parametrize("answer", ["", "\n", "[N/A]", "9", "9.0a", "Failed to initialize NVML"])
def test_what_is_no_compute_capability_is_refused(answer: str) -> None:
    with pytest.raises(CannotRunError, match="compute capability"):
        architecture(answer)


def test_a_machine_without_a_driver_is_told_so(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(tmp_path)]) == 2
    assert "nvidia-smi is not on PATH" in capsys.readouterr().err


def test_a_driver_without_a_gpu_is_told(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(programs, "nvidia-smi", "#!/bin/sh\necho No devices were found\nexit 6\n")
    assert main(["run", str(tmp_path)]) == 2
    assert "sees no GPU: No devices were found" in capsys.readouterr().err


def test_a_gpu_without_a_compiler_is_told(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(programs, "nvidia-smi", SMI)
    assert find_gpu() == ("NVIDIA L4", "89")
    assert main(["run", str(tmp_path)]) == 2
    assert "nvcc is not on PATH" in capsys.readouterr().err


def test_an_empty_folder_is_told_before_anything_is_built(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(programs, "nvidia-smi", SMI)
    put(programs, "nvcc", NVCC.format(root=tmp_path))
    assert main(["run", str(tmp_path)]) == 2
    assert "check_cuda pack" in capsys.readouterr().err
    (tmp_path / "llama_cpp_python-0.3.36.tar.gz").touch()
    assert find_source(tmp_path).name == "llama_cpp_python-0.3.36.tar.gz"


@pytest.mark.parametrize("argv", [[], ["pack"], ["build", "folder"]])
def test_a_step_and_a_folder_are_needed(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(argv)
    assert info.value.code == 2


def test_the_launcher_passes_everything_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "check_cuda", "run", str(tmp_path)],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "check_cuda: " in done.stderr


# --- the toolkit -------------------------------------------------------------------------------


def test_the_toolkit_is_found_where_the_compiler_says(programs: Path, tmp_path: Path) -> None:
    put(programs, "nvcc", NVCC.format(root=tmp_path / "cuda"))
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    assert find_toolkit() == Toolkit(tmp_path / "cuda", (12, 8))
    put(programs, "nvcc", "#!/bin/sh\necho something else\n")
    with pytest.raises(CannotRunError, match="neither its version nor its folder"):
        find_toolkit()


@pytest.mark.parametrize("major", [11, 12])
def test_cublas_has_the_name_of_its_time(major: int) -> None:
    assert cublas_requirement(major) == f"nvidia-cublas-cu{major}=={major}.*"
    assert cublas_requirement(13) == "nvidia-cublas==13.*"


def test_a_whole_toolkit_lacks_nothing(tmp_path: Path) -> None:
    for name in ("lib64/libcublas.so", "lib64/stubs/libcuda.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert complete(Toolkit(tmp_path, (13, 0)), Path("python"), tmp_path, ["false"]) == []


def test_what_a_bare_compiler_lacks_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_toolkit, "_SYSTEM_LIBRARIES", ())
    toolkit, python = Toolkit(tmp_path / "cuda", (13, 0)), tmp_path / "venv" / "bin" / "python"
    with pytest.raises(CannotRunError, match=r"hold no libcublas\.so\.\*; pack the folder again"):
        complete(toolkit, python, tmp_path, ["true"])
    wheel = tmp_path / "venv" / "lib" / "python3.11" / "site-packages" / "nvidia" / "cu13"
    names = "lib/libcublas.so.13", "lib/libcublasLt.so.13", "include/cublas_v2.h"
    for name in names:
        (wheel / name).parent.mkdir(parents=True, exist_ok=True)
        (wheel / name).touch()
    asked = tmp_path / "asked"
    put(tmp_path, "pip", f'#!/bin/sh\necho "$@" > {asked}\n')
    assert complete(toolkit, python, tmp_path, [str(tmp_path / "pip"), "install"]) == [
        "-DGGML_CUDA_NO_VMM=on",
        f"-DCUDA_cublas_LIBRARY={tmp_path / 'cublas' / 'libcublas.so'}",
        f"-DCUDA_cublasLt_LIBRARY={tmp_path / 'cublas' / 'libcublasLt.so'}",
        f"-DCMAKE_CUDA_FLAGS=-I{wheel / 'include'}",
    ]
    assert asked.read_text() == "install nvidia-cublas==13.*\n"
    assert (tmp_path / "cublas" / "libcublas.so").resolve() == wheel / names[0]
    assert cuda_toolkit.library_path(python) == [wheel / "lib"]


# --- compile -----------------------------------------------------------------------------------


def test_files_are_found_among_the_targets_of_ninja() -> None:
    folder = "vendor/llama.cpp/ggml/src/ggml-cuda/CMakeFiles/ggml-cuda.dir"
    listed = (
        f"{folder}/softmax.cu.o: CUDA_COMPILER__ggml-cuda_unscanned_Release\n"
        f"{folder}/template-instances/mmq-instance-q4_0.cu.o: CUDA_COMPILER__ggml-cuda\n"
        "vendor/ggml/src/CMakeFiles/ggml-cpu.dir/ops.cpp.o: CXX_COMPILER__ggml-cpu\n"
        "ggml-cuda: phony\n"
    )
    assert cuda_objects(listed) == {
        name: f"{folder}/{name}.cu.o"
        for name in ("softmax", "template-instances/mmq-instance-q4_0")
    }
    assert len(KERNELS) == len(set(KERNELS))


def test_compiling_needs_a_compiler_and_sources_and_no_gpu(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", str(tmp_path)]) == 2
    assert "nvcc is not on PATH" in capsys.readouterr().err
    put(programs, "nvcc", NVCC.format(root=tmp_path))
    assert main(["compile", str(tmp_path)]) == 2
    assert "check_cuda pack" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compile", str(tmp_path), "--no-such-option"])


# --- the summary -------------------------------------------------------------------------------


def test_ratios_of_the_eager_pair_are_found_in_the_benchmark() -> None:
    rows = [
        {"name": "decode, plain", "results": {"q4_0": {"median": 1.0}}},
        {"name": "decode, eager pair", "results": {"q4_0": {"median": 1.05}}},
    ]
    assert eager_ratios({"rows": rows}) == {"q4_0": 1.05}
    assert eager_ratios({"status": 1}) == {}


def test_the_row_it_looks_for_is_one_of_the_benchmark() -> None:
    assert cuda_check.EAGER_ROW in {row.name for row in ROWS}


def test_counts_are_read_from_the_last_line_of_pytest() -> None:
    assert last_counts("...\n3 failed, 700 passed, 2 skipped in 9.1s\n") == {
        "failed": 3,
        "passed": 700,
        "skipped": 2,
    }
    assert last_counts("") == {}
