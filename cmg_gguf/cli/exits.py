"""How a command ends.

0    done
1    error: one line on standard error. Also for a bug, with its traceback; and at the end of a chat
     whose lines came from no terminal, if one of them failed
2    wrong use of the command line
130  stopped with Ctrl-C; what was written stays
141  nobody reads standard output any more; nothing is said
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from cmg_gguf.cli.screen import print_error
from cmg_gguf.doctor.finding import unusable
from cmg_gguf.errors import CMGError, UnsupportedError

INTERRUPTED = 130
UNREAD = 141


@contextmanager
def manners() -> Iterator[None]:
    """Turns the errors that users meet into those exits. Bugs pass."""
    try:
        yield
        sys.stdout.flush()
    except CMGError as exc:
        print_error(exc)
        raise typer.Exit(1) from exc
    except KeyboardInterrupt as exc:
        raise typer.Exit(INTERRUPTED) from exc
    except BrokenPipeError as exc:
        # Or the interpreter would try once more to flush, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(UNREAD) from exc


def load_library() -> None:
    """Imports what takes long. Raises UnsupportedError if llama-cpp-python is not as needed."""
    try:
        import cmg_gguf.vlm  # noqa: F401
    except (ImportError, OSError, RuntimeError) as exc:
        raise UnsupportedError(unusable(exc)) from exc
