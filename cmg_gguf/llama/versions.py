"""The versions of llama-cpp-python that this package works with: `OLDEST` and all that follow."""

from __future__ import annotations

import re

OLDEST = "0.3.31"
"""The first whose image encoders are all mended; pictures need no pixels to be cut since 0.3.27."""
NEWEST_TESTED = "0.3.36"
REQUIREMENT = f"llama-cpp-python>={OLDEST}"
REMEDY = f'pip install "{REQUIREMENT},<={NEWEST_TESTED}" --force-reinstall'


def check_version(version: str) -> None:
    """Raises ImportError for a version that lacks what this package calls."""
    if _numbers(version) < _numbers(OLDEST):
        raise ImportError(
            f"llama-cpp-python {version} is too old, {OLDEST} is the first that can be used: "
            f"{REMEDY}"
        )


def untested(version: str) -> str | None:
    """What to tell of a version newer than all that the tests were run with; None for others."""
    if _numbers(version) <= _numbers(NEWEST_TESTED):
        return None
    return (
        f"llama-cpp-python {version} is newer than {NEWEST_TESTED}, the newest that was tested. "
        "What could be tried at import agrees; `cmg-gguf doctor` computes with it"
    )


def unusable(error: Exception) -> str:
    """Why llama-cpp-python cannot be used and what to do about it, of what importing it raised."""
    told = " ".join(str(error).split())
    missing = re.search(r"([^\s/]+): cannot open shared object file", told)
    if missing is None:
        return told
    return (
        f"{told}; add the folder of {missing[1]} to LD_LIBRARY_PATH, or install what does without "
        f"it: {REMEDY} --no-cache-dir"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
