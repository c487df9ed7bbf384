"""Peak memory of a fresh process that answers one request.

Plain or guided, with the weights mapped from the file (their pages count as resident) or read into
memory. What an accelerator holds is not in it.

    measure_memory(subject, n_threads=2, n_gpu_layers=0)
    # {"memory, mapped, plain": [1212.0], "memory, mapped, guided": [1212.1], ...}
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmg_gguf import Guidance, GuidedVLM
from cmg_gguf.guidance import PLAIN

if TYPE_CHECKING:
    from benchmarks.ratios import Times
    from benchmarks.subjects import Subject

N_ANSWER = 16
LOADS = ("mapped", "read")
KINDS = {"plain": PLAIN, "guided": Guidance()}


def measure_memory(
    subject: Subject, n_threads: int, n_gpu_layers: int, report: Callable[[], None]
) -> Times:
    """MiB by way of loading and of asking. report: called after each process."""
    peaks: Times = {}
    for load in LOADS:
        for kind in KINDS:
            request = {
                "paths": [str(path) for path in subject.pair],
                "messages": subject.messages(),
                "kind": kind,
                "settings": {
                    "n_ctx": 2048,
                    "n_threads": n_threads,
                    "n_gpu_layers": n_gpu_layers,
                    "use_mmap": load == "mapped",
                },
            }
            done = subprocess.run(
                [sys.executable, __file__],
                input=json.dumps(request),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            peaks[f"memory, {load}, {kind}"] = [float(done.stdout)]
            report()
    return peaks


def answer(request: dict[str, Any]) -> float:
    """Answers one request; the peak memory of this process in MiB."""
    vlm = GuidedVLM(*request["paths"], **request["settings"])
    vlm.create_chat_completion(
        request["messages"],
        guidance=KINDS[request["kind"]],
        temperature=0,
        max_tokens=N_ANSWER,
    )
    return peak_mib()


def peak_mib() -> float:
    """The most memory that was resident in this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with that of the parent process
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    print(answer(json.load(sys.stdin)))
