"""The chosen tests and the benchmark on a Mac's GPU.

    scripts/check_metal [FOLDER]

Needs the command line tools of Xcode and a network. Builds llama-cpp-python with Metal once, into
FOLDER, with an environment of its own, and installs this package there. Progress is on stderr; the
last line on stdout is one JSON object.

Exit status: 0 = all well, 1 = tests failed, 2 = cannot run here.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from device_suite import (
    ALL_LAYERS,
    ROOT,
    CannotRunError,
    environment,
    run_program,
    run_tests,
    say,
    tell,
)
from device_tests import CHOSEN


def check_machine() -> None:
    """Raises CannotRunError where this is no Mac, or nothing compiles."""
    if sys.platform != "darwin":
        raise CannotRunError(f"this is {platform.system()}: Metal runs on macOS alone")
    if shutil.which("xcrun") is None:
        raise CannotRunError("no compiler here; run: xcode-select --install")


def run(folder: Path, *, whole: bool, bench_options: Sequence[str]) -> int:
    """Builds, tests, measures; prints the summary."""
    check_machine()
    python = environment(folder, "-DGGML_METAL=on")
    tests = run_tests(python, () if whole else CHOSEN)
    bench = ("--ngl", str(ALL_LAYERS), *bench_options)
    summary = {
        "backend": "Metal",
        "device": platform.processor() or platform.machine(),
        "tests": tests,
        "bench": run_program(python, "bench.py", *bench),
        "bench_device": run_program(python, "bench_device.py"),
    }
    tell(summary)
    return 0 if tests["status"] == 0 else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; see above."""
    parser = argparse.ArgumentParser(
        prog="check_metal",
        description="Tests and benchmark on a Mac's GPU.",
        epilog="More options go to bench.py.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "metal")
    parser.add_argument("--all", action="store_true", help="all tests, not the chosen ones")
    args, options = parser.parse_known_args(argv)
    try:
        return run(args.folder.resolve(), whole=args.all, bench_options=options)
    except CannotRunError as exc:
        say(f"check_metal: {exc}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
