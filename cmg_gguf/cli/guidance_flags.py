"""Flags of Cross-Modal Guidance. What is not given is what a settings file says, or a default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cmg_gguf.cli.options import (
    format_layers,
    format_tokens,
    parse_gate,
    parse_layers,
    parse_tokens,
)
from cmg_gguf.errors import GuidanceError
from cmg_gguf.evidence import EvidenceModel
from cmg_gguf.guidance import MAX_ALPHA, PLAIN, Guidance, LayerRange, Refresh, Scope, States
from cmg_gguf.settings import Settings, load_settings

_DEFAULT = Guidance()
_AS_GIVEN = "alpha", "beta", "scope", "refresh", "states"
_flag = partial(typer.Option, rich_help_panel="Guidance")


def _valid(parse: Callable[[str], object]) -> Callable[[str | None], str | None]:
    def check(text: str | None) -> str | None:
        try:
            if text is not None:
                parse(text)
        except GuidanceError as exc:
            raise typer.BadParameter(str(exc)) from exc
        return text

    return check


LAYERS = format_layers(LayerRange())
_layers_flag = partial(
    _flag,
    "--layers",
    metavar="LAYERS",
    callback=_valid(parse_layers),
    help="Layers that are masked: by number from 0 (10-20 or 3,5,7), by depth (1/3- or 0.5-1), "
    "all, none, those that hold a share of the attention on the image (mass:0.5), or a share "
    "of the layers, those that turn the hidden state most (cosine:0.5).",
)
Layers = Annotated[str, _layers_flag()]


@dataclass(frozen=True, kw_only=True)
class GuidanceFlags:
    """How strong guidance is, and what it masks."""

    settings: Annotated[
        Path | None,
        _flag(
            "--settings",
            metavar="FILE",
            help="A file of guidance settings, as cmg-gguf eval tune writes it; the flags below "
            "win over it. The built-in model comes with its own.",
        ),
    ] = None
    alpha: Annotated[
        float | None,
        _flag(
            "--alpha",
            min=0.0,
            max=MAX_ALPHA,
            metavar="X",
            show_default=str(_DEFAULT.alpha),
            help="Strength: how far tokens are pushed away from what the model would say with the "
            "image masked; 0 = not at all.",
        ),
    ] = None
    beta: Annotated[
        float | None,
        _flag(
            "--beta",
            min=0.0,
            max=1.0,
            metavar="X",
            show_default=str(_DEFAULT.beta),
            help="Plausibility cut: tokens below this share of the likeliest token's probability "
            "are out; 0 = none, 1 = all but the likeliest.",
        ),
    ] = None
    tokens: Annotated[
        str | None,
        _flag(
            "--tokens",
            metavar="TOKENS",
            callback=_valid(parse_tokens),
            show_default=format_tokens(_DEFAULT.tokens),
            help="Image tokens that are masked in each layer: a share of them, the most attended "
            "(top:0.5), those so many standard deviations above the mean (std:1), or the fewest "
            "that hold a share of the attention (mass:0.8).",
        ),
    ] = None
    layers: Annotated[str | None, _layers_flag(show_default=LAYERS)] = None
    scope: Annotated[
        Scope | None,
        _flag(
            "--scope",
            show_default=_DEFAULT.scope,
            help="Rows that are masked: decode = the answer and the prompt's last, question = all "
            "behind the last image, text = all text behind the first, all = image rows too.",
        ),
    ] = None
    refresh: Annotated[
        Refresh | None,
        _flag(
            "--refresh",
            show_default=_DEFAULT.refresh,
            help="When image tokens are chosen: step = anew for each row, prompt = once, by the "
            "prompt's last row.",
        ),
    ] = None
    states: Annotated[
        States | None,
        _flag(
            "--states",
            show_default=_DEFAULT.states,
            help="Of a model with recurrent layers, what these hold behind a picture in the "
            "degraded branch: read = what they read of it, unread = what they held before it.",
        ),
    ] = None
    gate: Annotated[
        str | None,
        _flag(
            "--gate",
            metavar="GATE",
            callback=_valid(parse_gate),
            show_default="none",
            help="Holds guidance back where the image hardly matters: disagreement[:K] scales "
            "alpha by min(1, K JSD / ln 2), JSD being the divergence of what the model says with "
            "and without the masked image tokens (K: 3); none = constant.",
        ),
    ] = None
    no_guidance: Annotated[
        bool, _flag("--no-guidance", help="Plain decoding: alpha 0 and beta 0.")
    ] = False

    def guidance(self, own: Path | None = None) -> Guidance:
        """The same as a value: flags over the file over defaults.

        own: file of the model's own settings, in place of the defaults. Raises BadParameter where
        two flags contradict each other; GuidanceError for a wrong file.
        """
        if self.no_guidance:
            if (self.alpha, self.beta) != (None, None):
                raise typer.BadParameter(
                    "it stands for --alpha 0 --beta 0; leave those two out",
                    param_hint="'--no-guidance'",
                )
            if self.settings is not None:
                raise typer.BadParameter(
                    "no settings count under --no-guidance; leave one of the two out",
                    param_hint="'--settings'",
                )
            return PLAIN
        return replace(self.file(own).guidance, **self._given())

    def weights(self, own: Path | None = None) -> EvidenceModel:
        """Weights of evidence: what the settings file says, or the model's own. Raises
        GuidanceError."""
        return self.file(own).evidence

    def file(self, own: Path | None = None) -> Settings:
        """What the settings file says, or `own`; the defaults without any. Raises GuidanceError."""
        file = self.settings or own
        return Settings(_DEFAULT) if file is None else load_settings(file)

    def told(self, own: Path | None = None, *, blind: bool = False) -> str:
        """What `guidance` gives, in words for a model that comes with settings of its own.

        blind: there is no image to guide by; "" then. Raises what `guidance` raises.
        """
        if not self.guidance(own).contrasts:
            return "without guidance"
        if blind:
            return ""
        base = "chosen for it" if self.settings is None else f"of {self.settings}"
        flags = ", ".join(f"--{name}" for name in self._given())
        return f"with the guidance {base}{f', but for {flags}' if flags else ''}"

    def _given(self) -> dict[str, Any]:
        """Settings that a flag is given for, by name."""
        as_text = {"tokens": parse_tokens, "layers": parse_layers, "gate": parse_gate}
        plain = {name: getattr(self, name) for name in _AS_GIVEN}
        given = {name: value for name, value in plain.items() if value is not None}
        for name, parse in as_text.items():
            if (text := getattr(self, name)) is not None:
                given[name] = parse(text)
        return given
