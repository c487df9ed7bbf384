"""Flags of each benchmark: where its files are, and how its answers are read.

Each group makes its task by `task()`, which raises EvaluationError, and BadParameter where a flag
is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import typer

from cmg_gguf.cli.question_flags import asked

if TYPE_CHECKING:
    from cmg_gguf.evaluation.answers import YesNoRule
    from cmg_gguf.evaluation.task import Task

Rule = Literal["pope", "strict", "mme", "dash-b", "named"]
_RULES = (
    "How yes and no are read from an answer: pope = no where the first sentence says no or not, "
    "else yes; strict = a bare yes or no; mme = by the first four letters; dash-b = yes where it "
    "has yes in it, else no for no; named = the one of the two words that is in it."
)

_flag = partial(typer.Option, rich_help_panel="Benchmark")

Images = Annotated[
    Path | None, _flag("--images", metavar="FOLDER", help="Folder that the images are in.")
]


class TaskFlags(Protocol):
    """A group of flags that makes a task."""

    def task(self) -> Task: ...


@dataclass(frozen=True, kw_only=True)
class PopeFlags:
    """POPE: is there such an object in the image? And RePOPE, and other files in its format.

    Question files and images are those of RUCAIBox/POPE or YanNeu/RePOPE, and COCO val2014.
    """

    questions: Annotated[
        list[Path] | None,
        _flag(
            "--questions",
            metavar="FILE",
            help="A question file, one JSON object a line: question_id, image, text, label, and "
            "maybe category. Repeat it for several: random, popular, adversarial.",
        ),
    ] = None
    images: Images = None
    rule: Annotated[Rule, _flag("--rule", help=_RULES)] = "pope"
    suffix: Annotated[str, _flag("--suffix", metavar="TEXT", help="Put behind every question.")] = (
        ""
    )

    def task(self) -> Task:
        from cmg_gguf.evaluation.tasks.pope import Pope

        questions = _several(self.questions, "'--questions'", "a POPE question file")
        images = _given(self.images, "'--images'", "the folder of the images")
        return Pope(questions, images, rule=_rule(self.rule), suffix=self.suffix)


@dataclass(frozen=True, kw_only=True)
class ChairFlags:
    """CHAIR: how many of the objects that a caption names are not in the image? On COCO."""

    instances: Annotated[
        Path | None,
        _flag(
            "--instances",
            metavar="FILE",
            help="COCO's instance annotations: instances_val2014.json.",
        ),
    ] = None
    images: Images = None
    captions: Annotated[
        Path | None,
        _flag(
            "--captions",
            metavar="FILE",
            help="COCO's captions: captions_val2014.json. Without them, true mentions of "
            "unannotated objects count as hallucinated.",
        ),
    ] = None
    draw: Annotated[
        int | None,
        _flag("--draw", min=1, metavar="N", help="N images drawn at random instead of all."),
    ] = None
    draw_seed: Annotated[
        int, _flag("--draw-seed", min=0, metavar="N", help="Seed of that drawing.")
    ] = 0
    prompt: Annotated[
        str | None,
        _flag("--prompt", "-p", metavar="TEXT", help="What is asked about each image."),
    ] = None
    predict: Annotated[
        int, _flag("--predict", "-n", min=1, metavar="N", help="Most tokens of a caption.")
    ] = 512

    def task(self) -> Task:
        from cmg_gguf.evaluation.tasks.chair import PROMPT, Chair

        return Chair(
            _given(self.instances, "'--instances'", "COCO's instance annotations"),
            _given(self.images, "'--images'", "the folder of the images"),
            captions=self.captions,
            n=self.draw,
            seed=self.draw_seed,
            prompt=PROMPT if self.prompt is None else asked(self.prompt),
            max_tokens=self.predict,
        )


@dataclass(frozen=True, kw_only=True)
class MmeFlags:
    """MME: two yes/no questions about each image, in fourteen subtasks."""

    root: Annotated[
        Path | None,
        _flag("--root", metavar="FOLDER", help="MME's folder, with a folder for each subtask."),
    ] = None
    subtask: Annotated[
        list[str] | None,
        _flag(
            "--subtask",
            metavar="NAME",
            help="A subtask, such as existence. Repeat it for several. Default: all there are.",
        ),
    ] = None
    rule: Annotated[Rule, _flag("--rule", help=_RULES)] = "mme"

    def task(self) -> Task:
        from cmg_gguf.evaluation.tasks.mme import Mme

        root = _given(self.root, "'--root'", "MME's folder")
        return Mme(root, subtasks=self.subtask or None, rule=_rule(self.rule))


@dataclass(frozen=True, kw_only=True)
class AmberFlags:
    """AMBER: descriptions and yes/no questions, one score of both."""

    data: Annotated[
        Path | None,
        _flag(
            "--data",
            metavar="FOLDER",
            help="Folder with annotations.json, relation.json, safe_words.txt and the queries.",
        ),
    ] = None
    images: Images = None
    queries: Annotated[
        list[Path] | None,
        _flag(
            "--queries",
            metavar="FILE",
            help="A query file. Repeat it for several. Default: all that are in the data folder.",
        ),
    ] = None
    rule: Annotated[Rule, _flag("--rule", help=_RULES)] = "strict"
    suffix: Annotated[
        str, _flag("--suffix", metavar="TEXT", help="Put behind every yes/no question.")
    ] = " Please answer yes or no."
    predict: Annotated[
        int, _flag("--predict", "-n", min=1, metavar="N", help="Most tokens of a description.")
    ] = 512

    def task(self) -> Task:
        from cmg_gguf.evaluation.tasks.amber import Amber

        return Amber(
            _given(self.data, "'--data'", "AMBER's data folder"),
            _given(self.images, "'--images'", "the folder of the images"),
            queries=self.queries or None,
            rule=_rule(self.rule),
            suffix=self.suffix,
            max_tokens=self.predict,
        )


@dataclass(frozen=True, kw_only=True)
class HallusionFlags:
    """HallusionBench: yes/no questions in groups, some of them about no image."""

    questions: Annotated[
        Path | None, _flag("--questions", metavar="FILE", help="HallusionBench.json.")
    ] = None
    images: Images = None
    rule: Annotated[Rule, _flag("--rule", help=_RULES)] = "named"
    suffix: Annotated[str, _flag("--suffix", metavar="TEXT", help="Put behind every question.")] = (
        " Please answer yes or no."
    )

    def task(self) -> Task:
        from cmg_gguf.evaluation.tasks.hallusion import Hallusion

        questions = _given(self.questions, "'--questions'", "HallusionBench.json")
        images = _given(self.images, "'--images'", "the folder that holds hallusion_bench")
        return Hallusion(questions, images, rule=_rule(self.rule), suffix=self.suffix)


@dataclass(frozen=True, kw_only=True)
class DashBFlags:
    """DASH-B: can such an object be seen? Of images that were found to make models say yes."""

    root: Annotated[
        Path | None,
        _flag(
            "--root",
            metavar="FOLDER",
            help="Folder that DASH-B's neg and pos are in, a folder for each object in them; its "
            "lists, dash_benchmark_neg.json and _pos.json, are followed where they are there.",
        ),
    ] = None
    rule: Annotated[Rule, _flag("--rule", help=_RULES)] = "dash-b"

    def task(self) -> Task:
        from cmg_gguf.evaluation.tasks.dash_b import DashB

        root = _given(self.root, "'--root'", "the folder that neg and pos are in")
        return DashB(root, rule=_rule(self.rule))


@dataclass(frozen=True, kw_only=True)
class FolderFlags:
    """One prompt on every image of a folder: no ground truth, so only what changes is counted."""

    images: Images = None
    prompt: Annotated[
        str, _flag("--prompt", "-p", metavar="TEXT", help="What is asked about each image.")
    ] = "Describe this image in detail."
    predict: Annotated[
        int, _flag("--predict", "-n", min=1, metavar="N", help="Most tokens of an answer.")
    ] = 256

    def task(self) -> Task:
        from cmg_gguf.evaluation.tasks.folder import FolderPrompt

        images = _given(self.images, "'--images'", "the folder of the images")
        return FolderPrompt(images, asked(self.prompt), max_tokens=self.predict)


@dataclass(frozen=True, kw_only=True)
class ScenesFlags:
    """Drawn scenes with exact ground truth: nothing to download, and as many as are wanted."""

    ask: Annotated[
        Literal["pope", "captions", "colours"],
        _flag(
            "--ask",
            help="pope = is there such a thing, captions = describe the picture, colours = what "
            "colour is it.",
        ),
    ] = "pope"
    pictures: Annotated[
        int, _flag("--pictures", min=1, metavar="N", help="How many pictures are drawn.")
    ] = 100
    split: Annotated[
        Literal["train", "tune", "test"] | None,
        _flag(
            "--split",
            show_default="test; of eval tune: tune",
            help="Which pictures: tune = for choosing settings, test = for figures.",
        ),
    ] = None
    kind: Annotated[
        Literal["typical", "counter", "both"],
        _flag(
            "--kind",
            help="typical = things come with what they usually come with, counter = independent "
            "of each other, so that expectation misleads, both = as many of each.",
        ),
    ] = "typical"
    rule: Annotated[Rule | None, _flag("--rule", show_default="pope", help=_RULES)] = None
    style: Annotated[
        Literal["brief", "plain", "detailed"] | None,
        _flag("--style", show_default="plain", help="Of the captions asked for."),
    ] = None

    def task(self, default: Literal["tune", "test"] = "test") -> Task:
        """default: the split, where none is given."""
        from cmg_gguf.evaluation.tasks.scenes import SceneCaptions, SceneColours, ScenePope

        split = self.split or default
        for flag, given, ask in (("rule", self.rule, "pope"), ("style", self.style, "captions")):
            if given is not None and self.ask != ask:
                raise typer.BadParameter(
                    f"it has no effect on {self.ask}; leave it out, or --ask {ask}",
                    param_hint=f"'--{flag}'",
                )
        if self.ask == "captions":
            style = self.style or "plain"
            return SceneCaptions(split, self.kind, self.pictures, style=style)
        if self.ask == "colours":
            return SceneColours(split, self.kind, self.pictures)
        return ScenePope(split, self.kind, self.pictures, rule=_rule(self.rule or "pope"))


TASKS: dict[str, type[TaskFlags]] = {
    "pope": PopeFlags,
    "chair": ChairFlags,
    "mme": MmeFlags,
    "amber": AmberFlags,
    "hallusion": HallusionFlags,
    "dash-b": DashBFlags,
    "folder": FolderFlags,
    "scenes": ScenesFlags,
}
"""Every benchmark by the name of its command."""


def _rule(name: Rule) -> YesNoRule:
    from cmg_gguf.evaluation.answers import RULES

    return RULES[name]


def _given(path: Path | None, flag: str, what: str) -> Path:
    if path is None:
        raise typer.BadParameter(f"none is given; name {what}", param_hint=flag)
    return path


def _several(paths: Sequence[Path] | None, flag: str, what: str) -> tuple[Path, ...]:
    if not paths:
        raise typer.BadParameter(f"none is given; name {what}", param_hint=flag)
    return tuple(paths)
