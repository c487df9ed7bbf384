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


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
