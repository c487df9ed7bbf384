"""`cmg-gguf demo`: the built-in model describes a drawn scene, plain and guided."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cmg_gguf.cli.compare import mark
from cmg_gguf.cli.exits import load_library, manners
from cmg_gguf.cli.output import write_rendered
from cmg_gguf.cli.screen import Screen, count
from cmg_gguf.guidance import Guidance
from cmg_gguf.tiny.scenes import Scene, draw, make_scene
from cmg_gguf.tiny.scenes.catalogue import OBJECTS, article
from cmg_gguf.tiny.scenes.texts import CAPTION_PROMPTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cmg_gguf.reply import Reply
    from cmg_gguf.vlm import GuidedVLM

Kind = Literal["typical", "counter"]

PROMPT = CAPTION_PROMPTS["plain"]
FOLDER = Path("cmg-gguf-demo")
MAX_TOKENS = 192
TRIED = 50
"""Scenes that are looked through, at most, for one in which guidance changes the answer."""

EXAMPLES = """\
Examples:

  cmg-gguf demo                      the first test scene in which guidance changes what is named

  cmg-gguf demo --scene 7            a scene of your choice, whatever comes of it

  cmg-gguf demo --kind typical       a scene as in training: expectation is a good guide there

  cmg-gguf run --image cmg-gguf-demo/scene.png -p "Is there a fork in the image?"
"""


@manners()
def demo(
    *,
    scene: Annotated[
        int | None,
        typer.Option(
            "--scene",
            min=0,
            max=999_999,
            metavar="N",
            help="Number of the test scene. Default: the first, from 0 on, in which guidance "
            "changes which objects are named.",
        ),
    ] = None,
    kind: Annotated[
        Kind,
        typer.Option(
            "--kind",
            help="counter = objects independent of the place and of each other, so that habit "
            "misleads; typical = as in training.",
        ),
    ] = "counter",
    save: Annotated[
        Path,
        typer.Option(
            "--save",
            metavar="DIR",
            file_okay=False,
            help="Where the scene and a sheet of heat maps, where the model looked, are written.",
        ),
    ] = FOLDER,
) -> None:
    """Describe a drawn test scene with the model that comes with the package, plain and guided.

    Offline, in seconds. Words that only one answer has are in [[brackets]]; an object that is not
    in the picture is followed by (not there).
    """
    load_library()
    from cmg_gguf.tiny.pair import embedded_guidance, embedded_pair
    from cmg_gguf.vlm import GuidedVLM

    err, guidance = Screen(), embedded_guidance()
    with err.waiting("load"), GuidedVLM(*embedded_pair(), n_ctx=1024) as vlm:
        number, drawn, answers = _answered(vlm, guidance, kind, scene)
        pixels = draw(drawn)
    write_rendered(_shown(number, kind, drawn, answers, first=scene is None))
    files = _write_pictures(save, pixels, answers[1])
    err.aside(
        f"written: {files[0]}, and {files[1]}: where the model looked for each word of the guided "
        "answer"
    )


def _answered(
    vlm: GuidedVLM, guidance: Guidance, kind: Kind, chosen: int | None
) -> tuple[int, Scene, tuple[Reply, Reply]]:
    """The scene's number, the scene, and the plain and guided answers."""
    for number in range(TRIED) if chosen is None else (chosen,):
        scene = make_scene("test", number, kind)
        images = [draw(scene)]
        plain, guided = (
            vlm.generate(PROMPT, images, guidance=g, max_tokens=MAX_TOKENS, heat=True)
            for g in (Guidance(alpha=0, beta=0), guidance)
        )
        if set(_named(plain.text)) != set(_named(guided.text)):
            break
    return number, scene, (plain, guided)


def _shown(
    number: int, kind: Kind, scene: Scene, answers: tuple[Reply, Reply], *, first: bool
) -> RenderableType:
    plain, guided = answers
    changed = set(_named(plain.text)) != set(_named(guided.text))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    why = f", the first of {count(number + 1, 'scene')} in which guidance changes what is named"
    head = f"{kind} test scene {number}{why if first and changed else ''}"
    table.add_row("scene", head)
    table.add_row("truth", _truth(scene))
    for name, parts in zip(("plain", "guided"), mark(plain.text, guided.text), strict=True):
        table.add_row(name, _marked("".join(f"[[{t}]]" if d else t for t, d in parts), scene))
    return Group(table, Text(), Text(_told(scene, plain, guided)))


def _truth(scene: Scene) -> str:
    things = [
        f"{article(thing.colour)} {thing.name} {thing.side}"
        + ("" if thing.sight == "clear" else f" ({thing.sight})")
        for thing in scene.things
    ]
    return f"{article(scene.place)} with {', '.join(things)}"


_NAMED = re.compile(rf"\b({'|'.join(sorted(OBJECTS, key=len, reverse=True))})\b(\]\])?")


def _marked(answer: str, scene: Scene) -> Text:
    """The answer; changed words stand out, and what is not in the picture is said to be so."""
    text = Text()
    at = 0
    for found in _NAMED.finditer(answer):
        text.append(answer[at : found.end()])
        if found[1] not in scene.names:
            text.append(" (not there)", style="bold red")
        at = found.end()
    text.append(answer[at:])
    text.highlight_regex(r"\[\[.*?\]\]", "underline")
    return text


def _named(answer: str) -> list[str]:
    return [found[1] for found in _NAMED.finditer(answer)]


def _told(scene: Scene, plain: Reply, guided: Reply) -> str:
    tallies = []
    for reply in (plain, guided):
        named = _named(reply.text)
        wrong = [name for name in named if name not in scene.names]
        right = len(scene.names & set(named))
        tallies.append(
            f"names {right} of the {len(scene.names)} objects and "
            f"{count(len(wrong), 'object')} that {'is' if len(wrong) == 1 else 'are'} not there"
        )
    why = "it moved away from what the model says when its view of the image is masked"
    changed = f"{count(guided.n_changed, 'token')}: {why}" if guided.n_changed else "nothing here"
    return (
        f"Plain decoding {tallies[0]}; guided, the model {tallies[1]}.\nGuidance changed {changed}."
    )


def _write_pictures(folder: Path, pixels: NDArray[np.uint8], reply: Reply) -> tuple[Path, Path]:
    from PIL import Image

    from cmg_gguf.cli.heatmap import drawn
    from cmg_gguf.errors import ImageError
    from cmg_gguf.heat.sheet import naming

    files = folder / "scene.png", folder / "looked.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(files[0])
        drawn([pixels], reply, naming(reply.words)).save(files[1])
    except OSError as exc:
        raise ImageError(
            f"the pictures cannot be written to {folder} ({exc.strerror}); name another folder "
            "with --save"
        ) from exc
    return files
