"""What was looked at and found, and what to do about it. Values, and errors made into them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from cmg_gguf.errors import CMGError
from cmg_gguf.llama.versions import REMEDY

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    name: what it is. status: "warning" = it works, and may not be as meant. found: in one sentence
    or a few words. remedy: what to do about it; "" where there is nothing to do.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def failed(name: str, error: Exception) -> Finding:
    """An error as a finding: its message ends with the remedy, behind the last semicolon."""
    if not isinstance(error, CMGError):
        kind = type(error).__name__
        remedy = "this is a fault of cmg-gguf: report it with all of this page"
        return Finding(name, "failed", f"{kind}: {_flat(str(error))}", remedy)
    found, _, remedy = _flat(str(error)).rpartition("; ")
    return Finding(name, "failed", found or remedy, remedy if found else "")


def unusable(error: Exception) -> str:
    """Why llama-cpp-python cannot be used and what to do about it, of what importing it raised."""
    told = _flat(str(error))
    missing = re.search(r"([^\s/]+): cannot open shared object file", told)
    if missing is None:
        return told
    return (
        f"{told}; add the folder of {missing[1]} to LD_LIBRARY_PATH, or install what does without "
        f"it: {REMEDY} --no-cache-dir"
    )


def looked(name: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What was found by looking, as far as it came; what it raises is the last finding, of this
    name."""
    findings: list[Finding] = []
    try:
        findings.extend(look())
    except Exception as exc:
        findings.append(failed(name, exc))
    return findings


def _flat(text: str) -> str:
    return " ".join(text.split())
