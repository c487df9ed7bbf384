"""`cmg-gguf caption`: every picture of a folder, its caption beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cmg_gguf.cli.asker import note_built_in
from cmg_gguf.cli.evaluate.run_flags import SpreadFlags
from cmg_gguf.cli.exits import load_library, manners
from cmg_gguf.cli.guidance_flags import GuidanceFlags
from cmg_gguf.cli.interrupt import counted
from cmg_gguf.cli.model_flags import ModelFlags
from cmg_gguf.cli.output import write
from cmg_gguf.cli.sampling_flags import DrawFlags
from cmg_gguf.cli.screen import Screen, count
from cmg_gguf.errors import CaptionError

if TYPE_CHECKING:
    from cmg_gguf.captioning import Captioned, Planned
    from cmg_gguf.evaluation.manifest import ModelFiles

EXAMPLES = """\
Examples:

  cmg-gguf caption photos -m llava.gguf --mmproj mmproj.gguf      photos/a.jpg -> photos/a.txt

  cmg-gguf caption photos ...                  the same again goes on where it was stopped

  cmg-gguf caption photos ... -r --dry-run     what would be captioned, in subfolders too

  cmg-gguf caption photos ... --prefix "ohwx," --max-words 30      a trigger word; short captions

  cmg-gguf caption photos ... --existing overwrite -p "Describe the image. Tags: {tags}"

  cmg-gguf caption photos ... --to metadata.jsonl      for load_dataset("imagefolder", ...)

  cmg-gguf caption photos ... --shard 1/2      half of it, for one of two machines
"""

_flag = partial(typer.Option, rich_help_panel="Captions")


@dataclass(frozen=True, kw_only=True)
class CaptionFlags:
    """Which pictures, what is asked about them, and what is written."""

    prompt: Annotated[
        str,
        _flag(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="What is asked about each picture. {name} stands for its file name without "
            "suffix, {directory} for the name of its folder, {tags} for what its .txt file holds "
            "already.",
        ),
    ] = "Describe the image."
    to: Annotated[
        Literal["txt", "jsonl", "kohya-json", "metadata.jsonl"],
        _flag(
            "--to",
            help="Where captions go. txt: photo.jpg -> photo.txt beside it, the caption alone; "
            "where several pictures are called photo, photo.jpg -> photo.jpg.txt and photo.png -> "
            "photo.png.txt, so that none has another's. jsonl: FOLDER/captions.jsonl, image and "
            "caption a line. kohya-json: FOLDER/meta_cap.json, for kohya's trainers (in_json). "
            "metadata.jsonl: FOLDER/metadata.jsonl, for Hugging Face's imagefolder.",
        ),
    ] = "txt"
    existing: Annotated[
        Literal["skip", "overwrite", "append"],
        _flag(
            "--existing",
            help="A picture that has a caption there: skip = leave it, overwrite = make a new one, "
            "append = add a new one behind it.",
        ),
    ] = "skip"
    recursive: Annotated[
        bool,
        _flag("--recursive", "-r", help="Pictures in subfolders too; hidden ones never."),
    ] = False
    prefix: Annotated[
        str,
        _flag(
            "--prefix",
            metavar="TEXT",
            help="Put ahead of each caption, with a space between: a trigger word.",
        ),
    ] = ""
    suffix: Annotated[str, _flag("--suffix", metavar="TEXT", help="Put behind each caption.")] = ""
    max_words: Annotated[
        int | None,
        _flag(
            "--max-words",
            min=1,
            metavar="N",
            help="Asks for at most N words, and cuts a longer caption at the end of a sentence.",
        ),
    ] = None
    predict: Annotated[
        int,
        _flag(
            "--predict",
            "-n",
            min=1,
            metavar="N",
            help="Most tokens of an answer; what that cuts off ends at its last whole sentence.",
        ),
    ] = 256
    evidence: Annotated[
        bool,
        _flag(
            "--evidence",
            help="Write FOLDER/review.jsonl and review.html: the captions made now, the one with "
            "the least supported word first, doubtful words marked. By the weights of --settings.",
        ),
    ] = False
    limit: Annotated[
        int | None,
        _flag("--limit", min=1, metavar="N", help="The first N pictures alone, by name."),
    ] = None
    shard: Annotated[
        str,
        _flag(
            "--shard",
            metavar="I/N",
            help="Part I of N of the pictures, for one machine of several that share the folder.",
        ),
    ] = "1/1"
    dry_run: Annotated[
        bool,
        _flag(
            "--dry-run",
            help="Write to standard output which pictures would be captioned, and into which file; "
            "no model is loaded or downloaded, and no file changed.",
        ),
    ] = False


@manners()
def caption(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of pictures.")],
    *,
    captions: CaptionFlags,
    guidance: GuidanceFlags,
    sampling: DrawFlags,
    spread: SpreadFlags,
    model: ModelFlags,
) -> None:
    """Caption every picture of a folder: photo.jpg gets photo.txt.

    A picture that has its caption is left alone, so the same command again goes on where it was
    stopped, and captions what is new. A picture that cannot be read stops nothing: it is listed
    in FOLDER/caption-problems.jsonl, and the exit code is 1.
    """
    load_library()
    from cmg_gguf.captioning import planned

    err = Screen(quiet=spread.quiet, progress=not model.verbose)
    settings = _settings(captions, guidance, sampling, model)
    if captions.dry_run:
        here = spread.files_here(model)
        if here is None:
            err.note(
                f"{model.hf_repo} is not here yet and not downloaded for this, so what an "
                "unfinished run has captioned already is listed too"
            )
        _show(err, planned(folder, here, **settings), folder)
        return
    files = spread.files(model, err)
    if idle := sampling.idle():
        err.note(f"{', '.join(idle)} without effect: --temp 0 always takes the best token")
    note_built_in(err, model, guidance.told(model.own_settings))
    _tell(err, _captioned(err, folder, files, spread, settings))


def _settings(
    flags: CaptionFlags, guidance: GuidanceFlags, sampling: DrawFlags, model: ModelFlags
) -> dict[str, Any]:
    """The flags as keyword arguments of `cmg_gguf.caption`."""
    from cmg_gguf.evaluation.items import Shard

    same = ["prompt", "to", "existing", "recursive", "prefix", "suffix", "max_words", "limit"]
    return {
        **{name: getattr(flags, name) for name in same},
        "max_tokens": flags.predict,
        "shard": Shard.parse(flags.shard),
        "guidance": guidance.guidance(model.own_settings),
        "sampling": sampling.sampling(),
        "evidence": guidance.weights(model.own_settings) if flags.evidence else None,
    }


def _captioned(
    err: Screen, folder: Path, files: ModelFiles, spread: SpreadFlags, settings: dict[str, Any]
) -> Captioned:
    """Does the work, with progress; Ctrl-C ends it between two pictures."""
    from cmg_gguf.captioning import caption

    executor, started = spread.executor(), time.perf_counter()
    with counted(err, "pictures") as progress:
        made = caption(folder, files, executor=executor, progress=progress, **settings)
    seconds = time.perf_counter() - started
    before = f", {made.n_resumed} made before" if made.n_resumed else ""
    left = f", {made.n_skipped} left alone that had one" if made.n_skipped else ""
    speed = f" ({made.n_written / seconds:.2f} pictures/s)" if made.n_written else ""
    if made.review is not None:
        err.aside(f"{made.review[1]} shows the captions, the least supported word first")
    err.aside(f"{count(made.n_written, 'caption')} in {seconds:.1f} s{speed}{before}{left}")
    return made


def _tell(err: Screen, made: Captioned) -> None:
    """Raises CaptionError where pictures have no caption."""
    if not made.problems:
        return
    first = made.problems[0]
    raise CaptionError(
        f"{count(len(made.problems), 'picture')} could not be captioned, all others were; "
        f"{made.problem_file} says why. The first: {first.image}: {first.problem}"
    )


def _show(err: Screen, todo: tuple[Planned, ...], folder: Path) -> None:
    for one in todo:
        write(f"{one.picture.path} -> {one.file}\n")
    err.aside(f"{count(len(todo), 'picture')} of {folder} would be captioned; nothing was done")
