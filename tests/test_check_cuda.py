"""The check on NVIDIA GPUs, as far as it goes without one."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import cuda_check
import pytest
from benchmarks.report import ROWS
from cuda_check import (
    architecture,
    eager_ratios,
    find_gpu,
    find_source,
    main,
    pack_command,
)
from device_suite import ROOT, CannotRunError, last_counts, requirements

PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
SMI = '#!/bin/sh\ncase "$*" in *compute_cap*) echo 8.9;; *) echo "NVIDIA L4";; esac\n'


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
    monkeypatch.setattr(cuda_check, "requirements", lambda text: ["somelib>=1"])
    monkeypatch.setattr(cuda_check, "BUILD_TOOLS", ())
    assert main(["pack", str(folder), "--no-index", "--find-links", str(index)]) == 0
    assert [path.name for path in folder.iterdir()] == ["somelib-1.0-py3-none-any.whl"]


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
    put(programs, "nvcc", "#!/bin/sh\n")
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
