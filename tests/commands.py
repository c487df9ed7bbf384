"""The command line, called: in this process, or as a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from typer.testing import CliRunner, Result

from cmg_gguf.cli.app import app

PROGRAM = [sys.executable, "-c", "from cmg_gguf.cli import main; main()"]
COLOURS = ("FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE")


def invoke(*arguments: str, **settings: Any) -> Result:
    """In this process; standard input is no terminal."""
    clean: dict[str, str | None] = {"COLUMNS": "80", **dict.fromkeys(COLOURS)}
    return CliRunner().invoke(app, arguments, env=clean, **settings)


def run(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """As a program of its own, to its end. settings: of `subprocess.run`."""
    usual: dict[str, Any] = {
        "capture_output": True,
        "text": True,
        "cwd": "/",
        "env": environment(),
        "timeout": 120,
        "check": False,
    }
    return subprocess.run([*PROGRAM, *arguments], **{**usual, **settings})


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in COLOURS}


def flat(text: str) -> str:
    """Without the frames and line breaks of rich."""
    return " ".join(text.replace("│", " ").split())
