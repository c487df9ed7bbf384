"""The public surface: what can be imported, and that importing it says nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cmg_gguf

PUBLIC = [
    "AttentionMass",
    "BackendError",
    "CMGChatHandler",
    "CMGError",
    "CaptionError",
    "ContextLengthError",
    "Contrast",
    "CumulativeMass",
    "Disagreement",
    "EvaluationError",
    "Evidence",
    "EvidenceModel",
    "Guidance",
    "GuidanceError",
    "GuidedVLM",
    "Heat",
    "HubConnectionError",
    "HubError",
    "HubNameError",
    "ImageError",
    "LayerRange",
    "LayerSet",
    "LowestCosine",
    "MeanStd",
    "ModelError",
    "Outcome",
    "Piece",
    "ProjectorError",
    "PromptError",
    "Reply",
    "Request",
    "Sampling",
    "SamplingError",
    "Seconds",
    "Stream",
    "Token",
    "TopRatio",
    "UnsupportedError",
    "Word",
    "__version__",
    "caption",
]


def test_the_public_names_are_these() -> None:
    assert list(cmg_gguf.__all__) == PUBLIC


def test_every_public_name_can_be_imported_and_is_documented() -> None:
    for name in PUBLIC:
        assert getattr(cmg_gguf, name) is not None
        assert getattr(cmg_gguf, name).__doc__, name


def test_every_error_is_a_cmg_error() -> None:
    errors = [getattr(cmg_gguf, name) for name in PUBLIC if name.endswith("Error")]
    assert len(errors) == 15
    assert all(issubclass(error, cmg_gguf.CMGError) for error in errors)
    for error in (
        cmg_gguf.EvaluationError,
        cmg_gguf.CaptionError,
        cmg_gguf.GuidanceError,
        cmg_gguf.HubNameError,
        cmg_gguf.SamplingError,
        cmg_gguf.ImageError,
        cmg_gguf.PromptError,
    ):
        assert issubclass(error, ValueError)


def test_importing_the_package_prints_and_warns_of_nothing() -> None:
    program = "import cmg_gguf; cmg_gguf.GuidedVLM"
    run = subprocess.run(
        # llama_cpp itself leaves two files open.
        [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",  # not in this folder: the package is the installed one
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["GuidedVLM", "Stream", "CMGChatHandler"])
def test_without_its_extension_the_package_says_how_to_install_it(
    tmp_path: Path, name: str
) -> None:
    folder = Path(cmg_gguf.__file__).parent
    shutil.copytree(
        folder, tmp_path / "cmg_gguf", ignore=shutil.ignore_patterns("_core.*", "models", "scenes")
    )
    run = subprocess.run(
        [sys.executable, "-c", f"from cmg_gguf import {name}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 1
    assert "Install the package itself, `pip install .`" in run.stderr
