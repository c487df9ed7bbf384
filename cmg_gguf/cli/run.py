"""`cmg-gguf run`: one question, one answer."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmg_gguf.cli.asker import Asker, system_messages, user_message
from cmg_gguf.cli.compare import print_comparison
from cmg_gguf.cli.evidence import print_marked
from cmg_gguf.cli.exits import load_library, manners
from cmg_gguf.cli.guidance_flags import GuidanceFlags
from cmg_gguf.cli.model_flags import ModelFlags
from cmg_gguf.cli.output import AnswerWriter, write_json
from cmg_gguf.cli.question_flags import QuestionFlags, ScreenFlags, asked
from cmg_gguf.cli.report import question_block, reply_block
from cmg_gguf.cli.sampling_flags import SamplingFlags
from cmg_gguf.cli.screen import Screen
from cmg_gguf.guidance import PLAIN, Guidance

if TYPE_CHECKING:
    from cmg_gguf.sampling import Sampling

EXAMPLES = """\
Examples:

  cmg-gguf run -m llava.gguf --mmproj mmproj.gguf --image kitchen.jpg -p "What is on the table?"

  cmg-gguf run -hf owner/repo:Q4_K_M --image kitchen.jpg -p "..."     a model of the hub, by name

  cmg-gguf run ... --compare                   plain and guided answer, differing words marked

  cmg-gguf run ... --alpha 2 --layers 0.5-     stronger, in the upper half of the layers

  cmg-gguf run ... --temp 0.7 --seed 1         drawn instead of greedy, and repeatable

  cmg-gguf run ... --evidence                  the words that the picture supports least, marked

  cmg-gguf run ... --json | jq .cmg.changed    what guidance changed, for programs

  cat question.txt | cmg-gguf run ... -p -     the prompt from standard input
"""


@manners()
def run(
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            rich_help_panel="Question",
            help="The question; - = read it from standard input, as is done without -p if that is "
            "no terminal.",
        ),
    ] = None,
    *,
    question: QuestionFlags,
    guidance: GuidanceFlags,
    sampling: SamplingFlags,
    model: ModelFlags,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            rich_help_panel="Output",
            help="Write the plain answer and the guided one, with the words that differ marked.",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            rich_help_panel="Output",
            help="Write one JSON object: text, tokens, what guidance changed, figures.",
        ),
    ] = False,
    screen: ScreenFlags,
) -> None:
    """Answer one question about images.

    The answer goes to standard output as it is generated; all else goes to standard error.
    """
    load_library()
    model.check()
    settings, limit = guidance.guidance(model.own_settings), question.max_tokens
    _check_compares(settings, compare)
    draw, text = sampling.sampling(), _prompt(prompt, has_stdin=not question.reads_stdin)
    pixels, marks = question.load_images(model.max_pixels), screen.evidence
    screen.check(compares=compare and not as_json, blind=not pixels)
    err = Screen(quiet=screen.quiet, progress=not model.verbose)
    _note_idle(err, sampling.idle(), blind=not pixels and settings.contrasts)
    asker = Asker.open(model, guidance, err, max_tokens=limit, blind=not pixels, evidence=marks)
    messages = [*system_messages(question.system_prompt), user_message(text, pixels)]
    with asker.vlm:
        if compare:
            blocks = _compare(asker, messages, settings, draw, as_json=as_json)
        elif as_json:
            blocks = _silent(asker, messages, settings, draw)
        else:
            blocks = _written(asker, messages, settings, draw, screen)
        if as_json:
            write_json({**question_block(asker.vlm, question.images, text), **blocks})


def _check_compares(guidance: Guidance, compare: bool) -> None:
    if compare and not guidance.contrasts:
        raise typer.BadParameter(
            "there is nothing to compare without guidance", param_hint="'--compare'"
        )


def _note_idle(err: Screen, flags: list[str], *, blind: bool) -> None:
    """Says what is without effect: sampling flags, and guidance where no picture is shown."""
    if flags:
        err.note(f"{', '.join(flags)} without effect: --temp 0 always takes the best token")
    if blind:
        err.note("no --image, so there is nothing to guide by")


def _written(
    asker: Asker,
    messages: list[dict[str, Any]],
    guidance: Guidance,
    sampling: Sampling,
    screen: ScreenFlags,
) -> dict[str, Any]:
    if screen.evidence:  # known only of a whole answer
        reply = asker.ask(messages, guidance, sampling)
        print_marked(reply)
    else:
        with AnswerWriter(show_changes=screen.show_changes).line() as write:
            reply = asker.ask(messages, guidance, sampling, write)
    asker.summarise(reply)
    return {}


def _silent(
    asker: Asker, messages: list[dict[str, Any]], guidance: Guidance, sampling: Sampling
) -> dict[str, Any]:
    reply = asker.ask(messages, guidance, sampling)
    asker.summarise(reply)
    return reply_block(reply, asker.vlm)


def _compare(
    asker: Asker,
    messages: list[dict[str, Any]],
    guidance: Guidance,
    sampling: Sampling,
    *,
    as_json: bool,
) -> dict[str, Any]:
    plain = asker.ask(messages, PLAIN, sampling)
    # The same draws, so that the answers differ in guidance alone.
    guided = asker.ask(messages, guidance, dataclasses.replace(sampling, seed=plain.seed))
    if not as_json:
        print_comparison(plain, guided)
    asker.summarise(plain, label="plain: ")
    asker.summarise(guided, label="guided: ", load=False)
    return {"plain": reply_block(plain, asker.vlm), "guided": reply_block(guided, asker.vlm)}


def _prompt(given: str | None, *, has_stdin: bool) -> str:
    """The prompt, from standard input where that is meant. Raises BadParameter for none.

    has_stdin: whether standard input is there for it.
    """
    if given in (None, "-") and not has_stdin:
        return asked("", "standard input holds the image; write -p TEXT")
    if given is None and sys.stdin.isatty():
        return asked("", "none is given; write -p TEXT")
    if given is None or given == "-":
        return asked(sys.stdin.read().rstrip("\n"), "standard input holds none; write -p TEXT")
    return asked(given)
