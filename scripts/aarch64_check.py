"""The package on 64-bit Arm, emulated by qemu-user: tests, and captions beside this machine's.

    scripts/check_aarch64 [FOLDER] [--board pi5|pi4] [--scenes N] [--tests TEST ...]

Installs Debian's cross compiler and emulator (as root; else says which are missing), builds as
scripts/aarch64_build.py says, into FOLDER (default: ~/.cache/cmg-gguf/aarch64), and runs the quick
tests of TESTS, or those named. The built-in model's captions, plain and guided, are then compared
with those of the package installed for the Python that runs this, and the first logits as well.
About ten minutes of two cores for the build, once, and half an hour of one for the tests. Progress
is on stderr; the last line on stdout is one JSON object.

Exit status: 0 = all well, 1 = tests failed or a caption differs, 2 = cannot run here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from aarch64_build import BOARDS, PACKAGES, arm_python, machine
from device_suite import (
    CannotRunError,
    install_packages,
    run_program,
    run_pytest,
    say,
    tell,
)

TESTS = (
    "test_masks.py",
    "test_influence.py",
    "test_plan_parts.py",
    "test_plan_forks.py",
    "test_fork.py",
    "test_policies.py",
    "test_selections.py",
    "test_graph_patch.py",
    "test_sampling.py",
    "test_exact.py",
    "test_stepping.py",
    "test_paired_engine.py",
    "test_generation.py",
    "test_encoder_mend.py",
    "test_prompts.py",
    "test_embedded.py",
    "test_repacking.py",
    "test_doctor.py",
    "test_cli.py",
)
"""What the extension does to graphs, masks, forks and samplers; the engine, whole answers, prompts,
the demo, the self-test, the command line."""
LEFT_OUT = {
    "the other quick tests": "servers, evaluation, pictures and files: mostly Python, and slow in "
    "an emulator; --tests runs them",
}


def compare(here: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """Of two outputs of aarch64_captions.py: captions that are the same word for word, those that
    are not, and the largest difference of first logits beside their standard deviation."""
    kinds = ("plain", "guided")
    pairs = [
        (number, kind, mine, other)
        for number, (mines, others) in enumerate(
            zip(here["captions"], there["captions"], strict=True)
        )
        for kind, mine, other in zip(kinds, mines, others, strict=True)
    ]
    differing = [
        {"scene": number, "branch": kind, here["machine"]: mine, there["machine"]: other}
        for number, kind, mine, other in pairs
        if mine != other
    ]
    found: dict[str, Any] = {"captions": len(pairs), "same": len(pairs) - len(differing)}
    for name in ("l_o", "l_d"):
        mine, other = np.array(here[name]), np.array(there[name])
        found[name] = {"largest": float(abs(mine - other).max()), "deviation": float(mine.std())}
    return {**found, "differing": differing}


def demo(python: Path) -> str:
    """What `cmg-gguf demo` prints on that Python."""
    program = "from cmg_gguf.cli import main; main()"
    command = [str(python), "-c", program, "demo", "--save", str(python.parent.parent / "demo")]
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, cwd=python.parent, check=True
    ).stdout


def run(folder: Path, board: str, n_scenes: int, tests: Sequence[str]) -> int:
    """Builds, tests, compares; prints the summary."""
    install_packages(PACKAGES)
    python, here = arm_python(folder, board), Path(sys.executable)
    told = machine(python)
    say(told)
    shown = demo(python)
    say(shown)
    same_demo = shown == demo(here)
    captions = compare(
        *(run_program(one, "aarch64_captions.py", str(n_scenes)) for one in (here, python))
    )
    say(f"running quick tests of {len(tests)} files")
    tested = run_pytest(python, tests, "--quick")
    summary = {
        "machine": told,
        "board": BOARDS[board].name,
        "demo": "the same" if same_demo else "differs",
        "captions": captions,
        "tests": tested,
    }
    tell(summary, LEFT_OUT)
    return 0 if tested["status"] == 0 and same_demo and not captions["differing"] else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; see above."""
    parser = argparse.ArgumentParser(
        prog="check_aarch64", description="Tests and captions on 64-bit Arm, emulated."
    )
    parser.add_argument("folder", type=Path, nargs="?", default="~/.cache/cmg-gguf/aarch64")
    parser.add_argument("--board", choices=BOARDS, default="pi5")
    parser.add_argument("--scenes", type=int, default=4, help="whose captions are compared")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files within tests/")
    args = parser.parse_args(argv)
    try:
        return run(args.folder.expanduser().resolve(), args.board, args.scenes, args.tests)
    except CannotRunError as exc:
        say(f"check_aarch64: {exc}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
