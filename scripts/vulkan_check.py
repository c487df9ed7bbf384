"""The chosen tests and a small benchmark over ggml's Vulkan backend, on a Debian machine.

    scripts/check_vulkan          # Mesa's lavapipe: a Vulkan device in software
    scripts/check_vulkan --gpu    # the machine's own GPU

Installs Debian's packages (as root; else says which are missing), builds llama-cpp-python with
Vulkan once, into FOLDER, with an environment of its own, and installs this package there. About 20
minutes for the build and 10 for the rest on two cores. Progress is on stderr; the last line on
stdout is one JSON object.

Exit status: 0 = all well, 1 = tests failed, 2 = cannot run here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from device_suite import (
    ROOT,
    CannotRunError,
    environment,
    install_packages,
    run_program,
    run_tests,
    say,
    tell,
)
from device_tests import ALSO_ON_TWO, CHOSEN, LEFT_OUT, ON_LAVAPIPE, ON_MESA_22

PACKAGES = ("mesa-vulkan-drivers", "libvulkan-dev", "glslc", "spirv-headers", "g++")
DRIVERS = Path("/usr/share/vulkan/icd.d")
LAVAPIPE = {
    "GGML_VK_VISIBLE_DEVICES": "0",  # it is a CPU device, which ggml passes over unless told
    "GGML_VK_DISABLE_F16": "1",
    "CMG_TEST_FLASH": "0",
}
TWICE = {"GGML_VK_VISIBLE_DEVICES": "0,0"}
"""The same device twice: a layer's cache lies where the layer does."""


def lavapipe() -> dict[str, str]:
    """The environment in which ggml finds lavapipe and no other. Raises CannotRunError."""
    files = sorted(DRIVERS.glob("lvp_icd*.json"))
    if not files:
        raise CannotRunError(f"{DRIVERS} names no lavapipe; reinstall mesa-vulkan-drivers")
    return {**LAVAPIPE, "VK_DRIVER_FILES": str(files[0]), "VK_ICD_FILENAMES": str(files[0])}


def mesa_major() -> int:
    """22 of "22.3.6-1+deb12u1", Debian's version of Mesa."""
    query = ["dpkg-query", "--show", "--showformat=${Version}", "mesa-vulkan-drivers"]
    return int(subprocess.check_output(query, text=True).split(".")[0])


def on_lavapipe(mesa: int) -> tuple[Sequence[str], dict[str, str]]:
    """The tests that are run on lavapipe of that Mesa; what is left out, and why."""
    crashing = ON_MESA_22 if mesa == 22 else {}
    chosen = [name for name in CHOSEN if name not in crashing]
    return chosen, {**LEFT_OUT, **ON_LAVAPIPE, **crashing}


def headers() -> dict[str, str]:
    """What the build needs where Debian's Vulkan headers lack a type that ggml names."""
    places = [str(ROOT / "scripts" / "vulkan"), os.environ.get("CPLUS_INCLUDE_PATH", "")]
    return {"CPLUS_INCLUDE_PATH": os.pathsep.join(filter(None, places))}


def run(folder: Path, *, gpu: bool, bench_options: Sequence[str]) -> int:
    """Builds, tests, measures; prints the summary."""
    install_packages(PACKAGES)
    device = {} if gpu else lavapipe()
    chosen, left_out = (CHOSEN, LEFT_OUT) if gpu else on_lavapipe(mesa_major())
    python = environment(folder, "-DGGML_VULKAN=on", **headers())
    tests = run_tests(python, chosen, device=device)
    twice = run_tests(python, ALSO_ON_TWO, device={**device, **TWICE})
    summary = {
        "backend": "Vulkan",
        "device": "the machine's GPU" if gpu else "lavapipe",
        "tests": tests,
        "two_devices": twice,
        "bench": run_program(python, "bench_device.py", *bench_options, device=device),
    }
    tell(summary, left_out)
    return 0 if tests["status"] == twice["status"] == 0 else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; see above."""
    parser = argparse.ArgumentParser(
        prog="check_vulkan",
        description="Tests and a small benchmark over ggml's Vulkan backend.",
        epilog="More options go to bench_device.py.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "vulkan")
    parser.add_argument("--gpu", action="store_true", help="the machine's GPU, not lavapipe")
    args, options = parser.parse_known_args(argv)
    try:
        return run(args.folder.resolve(), gpu=args.gpu, bench_options=options)
    except CannotRunError as exc:
        say(f"check_vulkan: {exc}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
