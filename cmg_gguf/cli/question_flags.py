"""Flags that `run` and `chat` share besides model, guidance and sampling."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from cmg_gguf.cli.options import split_images

_asked = partial(typer.Option, rich_help_panel="Question")
_seen = partial(typer.Option, rich_help_panel="Output")

_EVIDENCE = "'--evidence'"
NO_LIMIT = -1
STDIN = "-"
"""The image that standard input holds; a file of that name is "./-"."""


@dataclass(frozen=True, kw_only=True)
class QuestionFlags:
    """What is asked about, and how long the answer may be."""

    image: Annotated[
        list[str] | None,
        _asked(
            "--image",
            metavar="FILE",
            help="An image, seen before the question: a file, a pipe as of <(...), a file: or "
            "data: URL, base64; - = standard input. Repeat it, or put commas between, for several.",
        ),
    ] = None
    system_prompt: Annotated[
        str | None,
        _asked("--system-prompt", "-sys", metavar="TEXT", help="Instruction ahead of it all."),
    ] = None
    predict: Annotated[
        int,
        _asked(
            "--predict",
            "-n",
            min=NO_LIMIT,
            metavar="N",
            help="Most tokens of an answer; -1 = until it ends or the context is full.",
        ),
    ] = NO_LIMIT

    @property
    def images(self) -> list[str]:
        """Image sources in order; `STDIN` at most once. Raises ImageError, BadParameter."""
        images = split_images(self.image or ())
        if images.count(STDIN) > 1:
            raise typer.BadParameter(
                "standard input holds one image; give the others as files", param_hint="'--image'"
            )
        return images

    @property
    def reads_stdin(self) -> bool:
        """Whether an image is read from standard input, so that nothing else is."""
        return STDIN in self.images

    def load_images(self, max_pixels: int | None = None) -> list[NDArray[np.uint8]]:
        """Their pixels, each (H, W, 3) uint8. Before the model is loaded, for that takes longer.

        Raises ImageError.
        """
        from cmg_gguf.prompt.images import load_image

        images = self.images
        if STDIN in images and sys.stdin.isatty():
            raise typer.BadParameter(
                "standard input is a terminal; write - only behind a pipe or <",
                param_hint="'--image'",
            )
        sources = (sys.stdin.buffer if image == STDIN else image for image in images)
        return [load_image(source, max_pixels=max_pixels) for source in sources]

    @property
    def max_tokens(self) -> int | None:
        """The limit as the library takes it. Raises BadParameter for 0."""
        if self.predict == 0:
            raise typer.BadParameter(
                "0 tokens are no answer; give 1 and up, or -1", param_hint="'--predict' / '-n'"
            )
        return None if self.predict == NO_LIMIT else self.predict


def asked(text: str, remedy: str = "it is empty; ask something") -> str:
    """What --prompt says. Raises BadParameter where that is white space alone: nobody asks that,
    with an image or without; a shell did, by a variable that is empty."""
    if not text.strip():
        raise typer.BadParameter(remedy, param_hint="'--prompt' / '-p'")
    return text


@dataclass(frozen=True, kw_only=True)
class ScreenFlags:
    """What is written besides the answer."""

    show_changes: Annotated[
        bool,
        _seen(
            "--show-changes",
            help="Underline the tokens that guidance changed, where the answer goes to a terminal.",
        ),
    ] = False
    evidence: Annotated[
        bool,
        _seen(
            "--evidence",
            help="Mark the words that the picture supports least: in colour on a terminal, as "
            "word[?.31] elsewhere, .31 of 1 being the word's score. By what the model says with "
            "the picture and with it hidden, once the answer is whole; it is no proof that "
            "something is there, or is not.",
        ),
    ] = False
    quiet: Annotated[
        bool, _seen("--quiet", "-q", help="No progress, notes or figures on standard error.")
    ] = False

    def check(self, *, compares: bool = False, blind: bool = False) -> None:
        """Raises BadParameter where an answer would be marked in two ways, or by nothing.

        compares: words that differ are marked. blind: there is no picture.
        """
        if not self.evidence:
            return
        if blind:
            raise typer.BadParameter("it is about a picture; give --image", param_hint=_EVIDENCE)
        if compares or self.show_changes:
            other = "--compare" if compares else "--show-changes"
            raise typer.BadParameter(
                f"{other} marks words as well; leave one of the two out", param_hint=_EVIDENCE
            )
