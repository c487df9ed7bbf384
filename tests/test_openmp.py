"""How long threads spin where they wait: what libgomp has read, by its own account."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cmg_gguf.llama.about import features
from cmg_gguf.llama.openmp import SPINS, VARIABLES

LIBGOMPS_OWN = 300_000
TOLD = """
import json, os
from cmg_gguf.facts import system_facts
from cmg_gguf.llama.openmp import WAITING
left = [name for name in os.environ if name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")]
print(json.dumps([WAITING.by, system_facts()["waiting"], left]))
"""

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64")
    or "OPENMP = 1" not in features()
    or "libgomp" not in Path("/proc/self/maps").read_text("utf-8"),
    reason="llama.cpp is not built with GNU's OpenMP, or not for x86-64",
)


def ran(*command: str, **said: str) -> subprocess.CompletedProcess[str]:
    """A process in whose environment only `said` speaks of waiting; libgomp tells on stderr what
    it has read."""
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, *command],
        env={**environ, **said, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        cwd="/",
        timeout=300,
        check=True,
    )


def spins(done: subprocess.CompletedProcess[str]) -> list[int]:
    """Of each libgomp that was loaded, in this process and in those that it started."""
    return [int(n) for n in re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)]


def told(done: subprocess.CompletedProcess[str]) -> tuple[str, str, list[str]]:
    by, words, left = json.loads(done.stdout)
    return by, words, left


@pytest.mark.parametrize(
    "first", ["", "from cmg_gguf import GuidedVLM", "import cmg_gguf, llama_cpp"]
)
def test_threads_spin_as_long_as_this_package_says_and_programs_it_starts_are_not_told(
    first: str,
) -> None:
    done = ran("-c", first + TOLD)
    by, words, left = told(done)
    assert spins(done) == [SPINS]
    assert (by, left) == ("package", [])
    assert f"{SPINS:,} spins" in words


@pytest.mark.parametrize(
    ("name", "value", "n"), [("GOMP_SPINCOUNT", "77", 77), ("OMP_WAIT_POLICY", "passive", 0)]
)
def test_what_the_user_says_is_left_as_it_is(name: str, value: str, n: int) -> None:
    done = ran("-c", TOLD, **{name: value})
    assert spins(done) == [n]
    assert told(done) == ("user", f"as {name}={value} says", [name])


def test_where_it_is_too_late_nothing_is_set_and_that_is_told() -> None:
    done = ran("-c", "import llama_cpp" + TOLD)
    by, words, left = told(done)
    assert spins(done) == [LIBGOMPS_OWN]
    assert (by, left) == ("loaded", [])
    assert f"{LIBGOMPS_OWN:,} spins" in words
    assert "import cmg_gguf before" in words


def test_what_was_said_too_late_is_told_with_that_doubt() -> None:
    late = "import os, llama_cpp\nos.environ['GOMP_SPINCOUNT'] = '77'"
    done = ran("-c", late + TOLD)
    assert spins(done) == [LIBGOMPS_OWN]
    assert told(done)[1] == "as GOMP_SPINCOUNT=77 says, if that was set before libgomp was loaded"


def test_the_command_line_tells_how_threads_wait() -> None:
    done = ran("-m", "cmg_gguf.cli", "info", "--json")
    assert f"{SPINS:,} spins" in json.loads(done.stdout)["waiting"]
    assert set(spins(done)) == {SPINS}


def test_processes_of_an_evaluation_spin_as_long(tmp_path: Path) -> None:
    command = ["-m", "cmg_gguf.cli", "eval", "scenes", "--pictures", "2", "--limit", "2"]
    done = ran(*command, "--methods", "greedy", "--jobs", "2", "--out", str(tmp_path / "run"))
    assert len(spins(done)) >= 2
    assert set(spins(done)) == {SPINS}
