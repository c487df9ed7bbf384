"""Requests made from the server's own description, right and wrong: none may meet a fault of it.

    python scripts/fuzz_server.py                # a few minutes
    python scripts/fuzz_server.py --examples 20

Starts `cmg-gguf serve` on the built-in pair, and has `schemathesis` (extra `[fuzz]`) ask every
route of /openapi.json. Exit code 1 where an answer has a status of 500 and above.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from soak_server import serving


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; schemathesis' exit code."""
    parser = argparse.ArgumentParser(description="Requests made from the server's description.")
    parser.add_argument("--examples", type=int, default=100, help="for each route")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    program = shutil.which("schemathesis", path=sysconfig.get_path("scripts"))
    if program is None:
        print("schemathesis is not installed: pip install '.[fuzz]'", file=sys.stderr)
        return 1
    with serving("-np", "4", "--queue", "64", "-n", "8", "-t", "1") as (_, url):
        flags = ["--checks", "not_a_server_error", "--max-examples", str(options.examples)]
        flags += ["--seed", str(options.seed), "--workers", "2", "--suppress-health-check", "all"]
        command = [str(Path(program)), "run", f"{url}/openapi.json", *flags]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
