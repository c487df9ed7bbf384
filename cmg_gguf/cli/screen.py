"""Everything that is written but the answer: progress, notes, figures, errors. Standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cmg_gguf.cli.options import format_numbers
from cmg_gguf.errors import ContextLengthError

if TYPE_CHECKING:
    from cmg_gguf.reply import Reply

Phase = Literal["download", "load", "encode", "prefill", "decode", "examine"]

TOLD_EVERY = 30.0
"""Seconds between two lines of progress, where there is no terminal to show it on."""

_DOING: dict[Phase, str] = {
    "download": "downloading the model",
    "load": "loading the model",
    "encode": "encoding the images",
    "prefill": "reading the prompt",
    "decode": "answering",
    "examine": "examining",
}


def print_error(exc: Exception) -> None:
    """Writes "error: ..." in one line."""
    flag = " (--ctx-size, -c)" if isinstance(exc, ContextLengthError) else ""
    message = f" {_flat(str(exc))}{flag}"
    _line(Console(stderr=True), Text.assemble(("error:", "bold red"), message))


def print_warning(message: Warning | str) -> None:
    """Writes "warning: ..." in one line."""
    told = f" {_flat(str(message))}"
    _line(Console(stderr=True), Text.assemble(("warning:", "bold yellow"), told))


class Screen:
    """Standard error during a command. quiet: nothing but errors. progress: whether to show it."""

    def __init__(self, *, quiet: bool = False, progress: bool = True) -> None:
        self._console = Console(stderr=True)
        self._quiet = quiet
        self._is_thinking = False
        self._shows_progress = progress and not quiet and self._console.is_interactive

    def note(self, text: str) -> None:
        """Writes "note: ..." in one line."""
        if not self._quiet:
            _line(self._console, Text.assemble(("note:", "bold"), f" {_flat(text)}"))

    def tell(self, text: str) -> None:
        """Writes text that answers a command, whether quiet or not."""
        _line(self._console, Text(text))

    def aside(self, text: str) -> None:
        """Writes a line that need not be read."""
        if not self._quiet:
            _line(self._console, Text(text, style="dim"))

    @property
    def shows_reasoning(self) -> bool:
        """Whether `think` writes anything."""
        return not self._quiet

    def think(self, text: str) -> None:
        """Writes some of what a model thinks before it answers, at once."""
        if text and not self._quiet:
            self._is_thinking = True
            self._console.out(text, style="dim", highlight=False, end="")

    def end_thought(self) -> None:
        """Ends the line that `think` has begun, if it has."""
        if self._is_thinking:
            self._is_thinking = False
            self._console.out("")

    @contextmanager
    def waiting(self, phase: Phase) -> Iterator[Waiting]:
        """Shows progress from `phase` on; after the block nothing of it is left."""
        said = not self._quiet and not self._console.is_interactive
        waiting = Waiting(self._console, shown=self._shows_progress, said=said)
        waiting.begin(phase)
        try:
            yield waiting
        finally:
            waiting.stop()

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Shows how much of much is done, as told by (done, total), its speed and time left: where
        it is no terminal, in a line every `TOLD_EVERY` seconds."""
        if not self._quiet and not self._console.is_interactive:
            yield _Lines(self._console, what)
            return
        columns = (
            *(SpinnerColumn(), "{task.description}", BarColumn(bar_width=24)),
            *(MofNCompleteColumn(), _Speed(), TimeRemainingColumn()),
        )
        with Progress(
            *columns,
            console=self._console,
            transient=True,
            disable=not self._shows_progress,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as progress:
            tasks: list[TaskID] = []

            def count(done: int, total: int) -> None:
                if not tasks:  # what was done before is no speed
                    tasks.append(progress.add_task(what, completed=done, total=total))
                progress.update(tasks[0], completed=done)

            yield count


class _Lines:
    """Progress as lines of a log."""

    def __init__(self, console: Console, what: str) -> None:
        self._console, self._what = console, what
        self._first: tuple[float, int] | None = None
        self._told = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._told = (now, done), now
        if now - self._told < TOLD_EVERY or done == total:
            return
        self._told = now
        started, before = self._first
        speed = (done - before) / (now - started)
        left = f", {duration((total - done) / speed)} left" if speed else ""
        words = f"{done} of {total} {self._what}, {speed:.2f}/s{left}"
        _line(self._console, Text(words, style="dim"))


class _Speed(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.2f}/s", style="dim")


class Waiting:
    """One line that says what takes time. Call it as `cmg_gguf.vlm.Progress`.

    said: where nothing is shown, one line says at least what takes minutes.
    """

    def __init__(self, console: Console, *, shown: bool, said: bool = False) -> None:
        self._console, self._said = console, said
        self._progress = Progress(
            SpinnerColumn(),
            "{task.description}",
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._shown = shown
        self._phase: Phase | None = None
        self._task = TaskID(0)

    def begin(self, phase: Phase) -> None:
        """Shows `phase`, of which it is not known how long it takes."""
        if phase == self._phase or not self._shown:
            return
        if self._phase is None:
            self._progress.start()
        else:
            self._progress.remove_task(self._task)
        self._phase = phase
        self._task = self._progress.add_task(_DOING[phase], total=None)

    def __call__(self, phase: Phase, done: int, total: int) -> None:
        if phase == "encode" and done == total:
            self.begin("prefill")
            return
        self.begin(phase)
        self._update(completed=done, total=total)
        if phase == "download":
            self._downloading(done, total)

    def _downloading(self, done: int, total: int) -> None:
        doing = _DOING["download"]
        self._update(description=f"{doing}, {size(done)} of {size(total)}")
        if self._said:
            self._said = False
            rest = f", {size(done)} of it are there" if done else ""
            _line(self._console, Text(f"{doing}, {size(total)}{rest}", style="dim"))

    def answering(self, n_tokens: int) -> None:
        """Shows how far an answer is that is not shown itself."""
        self.begin("decode")
        self._update(description=f"answering, {count(n_tokens, 'token')}")

    def stop(self) -> None:
        """Takes the line away. Does nothing the second time."""
        if self._phase is not None:
            self._progress.stop()
            self._phase = None

    def _update(self, **values: Any) -> None:
        if self._shown:
            self._progress.update(self._task, **values)


def summary(reply: Reply, *, load: float | None = None, max_tokens: int | None = None) -> str:
    """The figures of an answer in one line: tokens, changed tokens, speed, seconds, layers."""
    n, seconds = len(reply.tokens), reply.seconds
    prompt = f"prompt ({reply.n_reused_tokens} reused)" if reply.n_reused_tokens else "prompt"
    pictures = (
        f"image ({count(reply.n_image_tokens, 'token')})" if reply.n_image_tokens else "image"
    )
    phases = {"load": load, pictures: seconds.encode, prompt: seconds.prefill}
    parts = [f"{count(n, 'token')}, {reply.n_changed} changed"]
    if reply.finish_reason == "length":
        parts.append("cut off by -n" if n == max_tokens else "cut off: the context is full")
    if seconds.decode > 0:
        parts.append(f"{n / seconds.decode:.1f} tokens/s")
    parts.append(
        ", ".join(
            f"{name} {value:.2f} s"
            for name, value in {**phases, "answer": seconds.decode}.items()
            if value is not None
        )
    )
    if reply.mended:
        parts.append(f"encoder mended: {', '.join(reply.mended)}")
    return " · ".join([*parts, _masked(reply)])


def count(n: int, what: str) -> str:
    """A number and what it counts: "1 token", "2 tokens"."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def duration(seconds: float) -> str:
    """A time to wait: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def size(n: int) -> str:
    """A number of bytes: "1.5 MiB"."""
    value = float(n)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def _masked(reply: Reply) -> str:
    if not reply.guidance.contrasts:
        return "plain decoding"
    if not reply.n_image_tokens:
        return "no image, not guided"
    if not reply.layers:
        return "no layer masked"
    word = "layer" if len(reply.layers) == 1 else "layers"
    return f"{word} {format_numbers(reply.layers)} masked"


def _flat(text: str) -> str:
    return " ".join(text.split())


def _line(console: Console, text: Text) -> None:
    # Soft wrap: the terminal breaks the line, not rich, so that in a file it is one.
    console.print(text, soft_wrap=True, highlight=False)
