"""`cmg-gguf chat`: a conversation about images."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
from numpy.typing import NDArray

from cmg_gguf.cli.asker import Asker, Stopped, system_messages, user_message
from cmg_gguf.cli.evidence import print_marked
from cmg_gguf.cli.exits import load_library, manners
from cmg_gguf.cli.guidance_flags import GuidanceFlags
from cmg_gguf.cli.model_flags import ModelFlags
from cmg_gguf.cli.options import is_file
from cmg_gguf.cli.output import AnswerWriter, write
from cmg_gguf.cli.question_flags import QuestionFlags, ScreenFlags
from cmg_gguf.cli.sampling_flags import SamplingFlags
from cmg_gguf.cli.screen import Screen, print_error
from cmg_gguf.errors import CMGError, ContextLengthError
from cmg_gguf.guidance import Guidance

if TYPE_CHECKING:
    from cmg_gguf.reply import Reply
    from cmg_gguf.sampling import Sampling

PROMPT = "> "
HELP = """\
/image FILE  attach an image to the next message
/clear       forget the conversation and its images
/help        this list
/quit        leave; so does Ctrl-D
Ctrl-C stops an answer; what has been said of it stays in the conversation."""
EXAMPLES = """\
Examples:

  cmg-gguf chat -m llava.gguf --mmproj mmproj.gguf --image kitchen.jpg

  cmg-gguf chat ... -sys "Answer in one word." --show-changes

  cmg-gguf chat ... < questions.txt            one question a line, one answer each
"""


@manners()
def chat(
    *,
    question: QuestionFlags,
    guidance: GuidanceFlags,
    sampling: SamplingFlags,
    model: ModelFlags,
    screen: ScreenFlags,
) -> None:
    """Talk about images, turn by turn.

    Within the chat, /image FILE attaches an image, /clear starts over, /help lists the rest.
    Answers go to standard output; all else goes to standard error. Where lines come from a pipe or
    a file, one that failed makes the exit code 1 at the end.
    """
    load_library()
    screen.check()
    settings, draw = guidance.guidance(model.own_settings), sampling.sampling()
    err = Screen(quiet=screen.quiet, progress=not model.verbose)
    if idle := sampling.idle():
        err.note(f"{', '.join(idle)} without effect: --temp 0 always takes the best token")
    model.check()
    if question.reads_stdin:
        raise typer.BadParameter(
            "standard input holds what you say; give the image as a file", param_hint="'--image'"
        )
    images = list(zip(question.images, question.load_images(model.max_pixels), strict=True))
    asker = Asker.open(
        model, guidance, err, max_tokens=question.max_tokens, evidence=screen.evidence
    )
    with asker.vlm:
        talk = Chat(asker, settings, draw, show_changes=screen.show_changes)
        talk.begin(question.system_prompt, images)
        typed = sys.stdin.isatty()
        if typed:
            err.aside(f"{asker.vlm.model.describe()}; /help lists the commands")
        for line in lines(err):
            if not talk.take(line):
                break
    if talk.failed and not typed:  # who types has seen it
        raise typer.Exit(1)


class Chat:
    """A conversation: its history, and the images that wait for the next message.

    failed: whether a line could not be done.
    """

    def __init__(
        self, asker: Asker, guidance: Guidance, sampling: Sampling, *, show_changes: bool
    ) -> None:
        self._asker = asker
        self._guidance = guidance
        self._sampling = sampling
        self._write = AnswerWriter(show_changes=show_changes)
        self._system: str | None = None
        self._history: list[dict[str, Any]] = []
        self._waiting: list[NDArray[np.uint8]] = []
        self.failed = False

    def begin(self, system: str | None, images: Sequence[tuple[str, NDArray[np.uint8]]]) -> None:
        """Sets the instruction and attaches the first images: (name, (H, W, 3) uint8)."""
        self._system = system
        for name, pixels in images:
            self._attach(name, pixels)

    def take(self, line: str) -> bool:
        """Does what a line says; False if it says to leave. Errors become a line of their own."""
        text = line.strip()
        try:
            if text.startswith("/"):
                return self._obey(*text.split(maxsplit=1))
            if text:
                self._answer(text)
        except CMGError as exc:
            self.failed = True
            print_error(exc)
            if isinstance(exc, ContextLengthError) and self._history:
                self._asker.screen.tell("/clear makes room")
        return True

    def _obey(self, command: str, rest: str = "") -> bool:
        from cmg_gguf.prompt.images import load_image

        screen = self._asker.screen
        if command == "/quit":
            return False
        if command == "/image" and rest:
            self._attach(
                path := _path(rest), load_image(path, max_pixels=self._asker.vlm.max_pixels)
            )
        elif command == "/image":
            self.failed = True
            screen.tell("/image takes the path of an image: /image kitchen.jpg")
        elif command == "/clear":
            self._history.clear()
            self._waiting.clear()
            screen.tell("the conversation starts anew, without images")
        elif command == "/help":
            screen.tell(HELP)
        else:
            self.failed = True
            screen.tell(f"there is no command {command}; /help lists them")
        return True

    def _attach(self, source: str, pixels: NDArray[np.uint8]) -> None:
        self._waiting.append(pixels)
        height, width, _ = pixels.shape
        named = source.startswith("file:") or is_file(source)
        name = Path(source).name if named else "image"
        self._asker.screen.tell(f"{name}, {width} x {height} pixels, goes with the next message")

    def _answer(self, text: str) -> None:
        """A turn. It is kept if something was said, else its images go on waiting."""
        question = user_message(text, self._waiting)
        said = ""
        try:
            reply = self._say([*system_messages(self._system), *self._history, question])
            said = reply.text
            self._asker.summarise(reply, load=False)
        except KeyboardInterrupt as exc:
            said = getattr(exc, "text", said)
            self._asker.screen.tell("stopped" if said else "stopped before the first word")
        if said:
            self._history += [question, {"role": "assistant", "content": said}]
            self._waiting = []

    def _say(self, messages: list[dict[str, Any]]) -> Reply:
        if self._asker.evidence is not None:  # known only of a whole answer
            try:
                reply = self._asker.ask(messages, self._guidance, self._sampling)
            except Stopped as exc:  # what stays in the conversation has been seen
                write(f"{exc.text}\n" if exc.text else "")
                raise
            print_marked(reply)
            if reply.evidence is None:
                self._asker.screen.note("no image was shown yet, so no word is marked")
        else:
            with self._write.line() as show:
                reply = self._asker.ask(messages, self._guidance, self._sampling, show)
        return reply


def lines(screen: Screen) -> Iterator[str]:
    """What is typed, or stands in a file, line by line. Ctrl-C twice raises KeyboardInterrupt."""
    typed = sys.stdin.isatty()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() its editing and history)
    warned = False
    while True:
        try:
            line = _read(typed)
        except EOFError:
            if typed:
                screen.tell("")
            return
        except KeyboardInterrupt:
            if warned or not typed:
                screen.tell("")
                raise
            warned = True
            screen.tell("\nCtrl-C once more leaves; so does Ctrl-D")
            continue
        warned = False
        yield line


def _read(typed: bool) -> str:
    if typed and not sys.stdout.isatty():
        # input() would write its prompt into the answers.
        sys.stderr.write(PROMPT)
        sys.stderr.flush()
        return input()
    return input(PROMPT if typed else "")


def _path(text: str) -> str:
    """The path in a command, as written or as a shell quotes it."""
    with suppress(OSError, ValueError):  # a name that no file can have, or a lone quote
        if not Path(text).exists() and len(words := shlex.split(text)) == 1:
            text = words[0]
    return str(Path(text).expanduser()) if text.startswith("~") else text
