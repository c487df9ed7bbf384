"""How long llama.cpp's threads spin where they wait for each other, a few hundred times a token.

GNU's OpenMP (libgomp) lets a thread spin 300,000 times before it sleeps: 3.3 ms on a Xeon, as long
as a scheduler's slice. On idle cores a wait ends long before that. Where other programs have the
cores, the thread that is waited for may not be running, and one that spins can keep it from that: a
token takes up to seven times as long. So, unless the user says otherwise, they spin for `SPINS`.

libgomp reads its environment once, when it is loaded. So this module is imported before everything
that loads it, and llama.cpp's room takes back what was set, for it is not meant for other programs
that this one starts. What was loaded earlier by others stays as it is: `WAITING` says so.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SPINS = 3000
"""33 microseconds there: on idle cores as fast as 300,000, beside busy programs as fast as none."""
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""With which a user says otherwise."""
MAPS = Path("/proc/self/maps")
"""What is loaded in this process."""
REMEDY = f"import cmg_gguf before torch, llama_cpp and the like, or set GOMP_SPINCOUNT={SPINS}"


@dataclass(frozen=True)
class Waiting:
    """Who decides how threads wait, and in words how.

    by: "package" = this package; "user" = the environment; "loaded" = nobody any more, for libgomp
    was loaded before; "runtime" = the OpenMP runtime by itself, where nothing is set.
    """

    by: Literal["package", "user", "loaded", "runtime"]
    told: str


def restore() -> None:
    """Takes back what was set, for when libgomp has read it."""
    if WAITING.by == "package" and os.environ.get("GOMP_SPINCOUNT") == str(SPINS):
        del os.environ["GOMP_SPINCOUNT"]


def _decided() -> Waiting:
    said = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    is_loaded = sys.platform == "linux" and "libgomp" in MAPS.read_text("utf-8", "replace")
    if said:
        doubt = ", if that was set before libgomp was loaded" if is_loaded else ""
        return Waiting("user", f"as {' and '.join(said)} says{doubt}")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return Waiting("runtime", "as the OpenMP runtime does by itself")
    if is_loaded:
        told = "300,000 spins, libgomp's own, for it was loaded before cmg_gguf was imported"
        logging.getLogger(__name__).info("threads wait %s; %s", told, REMEDY)
        return Waiting("loaded", f"{told}; on busy cores: {REMEDY}")
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    return Waiting("package", f"{SPINS:,} spins, then asleep (where OpenMP is GNU's)")


WAITING = _decided()
