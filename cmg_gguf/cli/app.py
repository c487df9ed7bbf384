"""The command `cmg-gguf` and its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from cmg_gguf import __version__
from cmg_gguf.cli import caption, chat, demo, doctor, heatmap, info, run, serve
from cmg_gguf.cli.bundle import bundled
from cmg_gguf.cli.evaluate import app as evaluate

NAME = "cmg-gguf"
EXAMPLES = """\
Examples:

  cmg-gguf demo                                what guidance does, on a model that is built in

  cmg-gguf run -m llava.gguf --mmproj mmproj.gguf --image kitchen.jpg -p "Is there a fork?"

  cmg-gguf run --help                          each command explains its flags
"""

app = typer.Typer(
    name=NAME,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback(epilog=EXAMPLES)
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Ask GGUF vision-language models about images, with Cross-Modal Guidance.

    Guidance steers the answer away from what the model would say without looking.
    """


app.command(epilog=demo.EXAMPLES)(demo.demo)
app.command(epilog=run.EXAMPLES)(bundled(run.run))
app.command(epilog=chat.EXAMPLES)(bundled(chat.chat))
app.command(epilog=heatmap.EXAMPLES)(bundled(heatmap.heatmap))
app.command(epilog=caption.EXAMPLES)(bundled(caption.caption))
app.command(epilog=serve.EXAMPLES)(bundled(serve.serve))
app.command(epilog=info.EXAMPLES)(bundled(info.info))
app.command(epilog=doctor.EXAMPLES)(bundled(doctor.doctor))
app.add_typer(evaluate)
