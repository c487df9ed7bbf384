"""The command line: `cmg-gguf run`, `chat`, `caption`, `info` and `eval`.

The answer goes to standard output and everything else to standard error. How a command ends is
said in `cmg_gguf.cli.exits`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line, by default the process' own, and exits."""
    _prepare_streams()
    try:
        from cmg_gguf.cli.app import NAME, app
        from cmg_gguf.cli.screen import print_warning
    except KeyboardInterrupt:
        sys.exit(130)
    warnings.showwarning = lambda message, *_: print_warning(message)
    app(args=arguments, prog_name=NAME)


def _prepare_streams() -> None:
    """Text that a stream cannot encode or decode must not end a conversation."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (open to the end)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
