"""`cmg-gguf heatmap`: where a model looks while it answers, as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cmg_gguf.cli.asker import Asker, system_messages, user_message
from cmg_gguf.cli.exits import load_library, manners
from cmg_gguf.cli.guidance_flags import GuidanceFlags
from cmg_gguf.cli.model_flags import ModelFlags
from cmg_gguf.cli.output import AnswerWriter
from cmg_gguf.cli.question_flags import QuestionFlags, ScreenFlags, asked
from cmg_gguf.cli.sampling_flags import SamplingFlags
from cmg_gguf.cli.screen import Screen, count
from cmg_gguf.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

    from cmg_gguf.heat.drawing import Pixels
    from cmg_gguf.heat.maps import Layers
    from cmg_gguf.reply import Reply

FORMATS = (".png", ".jpg", ".jpeg", ".webp")
ONE_WORD_EDGE, SHEET_EDGE = 480, 240
EXAMPLES = """\
How to read it:

  Violet is a little more than usual, yellow much more; where a place gets no more than usual the
  picture stays grey. "Usual" is the mean of all tokens of the answer: a few places get much
  attention from every token, whatever it says (attention sinks), and would drown the rest; with
  --absolute they are seen. The thin lines are the edges of image tokens: nothing finer is known.
  Attention says what the model reads for a word, not why it says it: a bright object is no proof
  that a word is grounded, nor a dark one that it is made up.

Examples:

  cmg-gguf heatmap --image cmg-gguf-demo/scene.png -p "Describe the image." -o sheet.png

  cmg-gguf heatmap ... --word fork             one word, large; of a word said twice the first

  cmg-gguf heatmap ... --layer 5               one layer; masked = those that guidance masks

  cmg-gguf heatmap ... --alpha 0               the same of the plain answer
"""


_shown = partial(typer.Option, rich_help_panel="Output")


@dataclass(frozen=True, kw_only=True)
class HeatFlags:
    """What is drawn, and where it is written."""

    word: Annotated[
        list[str] | None,
        _shown(
            "--word",
            metavar="WORD",
            help="A word of the answer; repeat it for several. Default: a sheet of the words that "
            "can name something.",
        ),
    ] = None
    layer: Annotated[
        str,
        _shown(
            "--layer",
            metavar="N|mean|masked",
            help="One layer by its number, the mean of all that attend, or of those that guidance "
            "masks.",
        ),
    ] = "mean"
    absolute: Annotated[
        bool,
        _shown(
            "--absolute",
            help="Show attention itself, not how it differs from that of the answer's tokens on "
            "average.",
        ),
    ] = False
    output: Annotated[
        Path,
        _shown(
            "--output",
            "-o",
            metavar="FILE",
            dir_okay=False,
            help=f"The picture that is written: {', '.join(FORMATS)}.",
        ),
    ] = Path("heatmap.png")

    @property
    def layers(self) -> Layers:
        """As the library takes it. Raises BadParameter."""
        if self.layer == "mean":
            return "mean"
        if self.layer == "masked":
            return "masked"
        if self.layer.isdecimal():
            return int(self.layer)
        raise typer.BadParameter(
            f"{self.layer!r} is no layer: give its number, mean or masked",
            param_hint="'--layer'",
        )

    def check(self) -> None:
        """Raises BadParameter for what cannot be, before the model is loaded."""
        _ = self.layers
        if self.output.suffix.lower() not in FORMATS:
            raise typer.BadParameter(
                f"{self.output.name} names no picture format that is written: end it with "
                f"{', '.join(FORMATS)}",
                param_hint="'--output' / '-o'",
            )


@manners()
def heatmap(
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", rich_help_panel="Question", help="The question."
        ),
    ] = "Describe the image.",
    *,
    question: QuestionFlags,
    guidance: GuidanceFlags,
    sampling: SamplingFlags,
    model: ModelFlags,
    heat: HeatFlags,
    screen: ScreenFlags,
) -> None:
    """Draw where the model looks for each word of its answer.

    The colours mean the same on every picture, and the picture says what.
    """
    load_library()
    model.check()
    heat.check()
    text, draw = asked(prompt), sampling.sampling()
    settings = guidance.guidance(model.own_settings)
    pixels = question.load_images(model.max_pixels)
    if not pixels:
        raise typer.BadParameter("there is nothing to look at; give one", param_hint="'--image'")
    err = Screen(quiet=screen.quiet, progress=not model.verbose)
    asker = Asker.open(model, guidance, err, max_tokens=question.max_tokens)
    messages = [*system_messages(question.system_prompt), user_message(text, pixels)]
    with asker.vlm:
        with AnswerWriter(show_changes=screen.show_changes).line() as write:
            reply = asker.ask(messages, settings, draw, write, heat=True)
        asker.summarise(reply)
    words = _words(reply, heat.word)
    save(drawn(pixels, reply, words, layer=heat.layers, relative=not heat.absolute), heat.output)
    err.aside(f"written: {heat.output}, with {count(len(words), 'word')}")


def drawn(
    pixels: list[Pixels],
    reply: Reply,
    words: dict[str, tuple[int, ...]],
    *,
    layer: Layers = "mean",
    relative: bool = True,
) -> Image.Image:
    """The sheet of some words of an answer about these pictures."""
    from cmg_gguf.heat.sheet import sheet

    assert reply.heat is not None
    edge = ONE_WORD_EDGE if len(words) == 1 else SHEET_EDGE
    return sheet(
        pixels, reply.heat, words, title=reply.text, layer=layer, relative=relative, edge=edge
    )


def save(picture: Image.Image, path: Path) -> None:
    """Raises ImageError where it cannot be written."""
    try:
        picture.save(path)
    except OSError as exc:
        raise ImageError(
            f"{path} cannot be written ({exc.strerror or exc}); name another file with -o"
        ) from exc


def _words(reply: Reply, asked_for: list[str] | None) -> dict[str, tuple[int, ...]]:
    from cmg_gguf.heat.maps import tokens_of
    from cmg_gguf.heat.sheet import naming

    if asked_for:
        return {word: tokens_of(reply, word)[0] for word in asked_for}
    words = naming(reply.words)
    if not words:
        raise ImageError(
            "the answer has no word of three letters that could name something; name one with "
            "--word, or ask for a description"
        )
    return words
