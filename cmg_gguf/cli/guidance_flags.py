"""Flags of Cross-Modal Guidance. Their defaults are those of `Guidance`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import typer

from cmg_gguf.cli.options import format_layers, format_tokens, parse_layers, parse_tokens
from cmg_gguf.errors import GuidanceError
from cmg_gguf.guidance import MAX_ALPHA, Guidance, LayerRange, Refresh, Scope

PLAIN = Guidance(alpha=0.0, beta=0.0)

_DEFAULT = Guidance()
_flag = partial(typer.Option, rich_help_panel="Guidance")


def _valid(parse: Callable[[str], object]) -> Callable[[str], str]:
    def check(text: str) -> str:
        try:
            parse(text)
        except GuidanceError as exc:
            raise typer.BadParameter(str(exc)) from exc
        return text

    return check


Layers = Annotated[
    str,
    _flag(
        "--layers",
        metavar="LAYERS",
        callback=_valid(parse_layers),
        help="Layers that are masked: by number from 0 (10-20 or 3,5,7), by depth (1/3- or 0.5-1), "
        "all, none, those that hold a share of the attention on the image (mass:0.5), or a share "
        "of the layers, those that turn the hidden state most (cosine:0.5).",
    ),
]
LAYERS = format_layers(LayerRange())


@dataclass(frozen=True, kw_only=True)
class GuidanceFlags:
    """How strong guidance is, and what it masks."""

    alpha: Annotated[
        float,
        _flag(
            "--alpha",
            min=0.0,
            max=MAX_ALPHA,
            metavar="X",
            help="Strength: how far tokens are pushed away from what the model would say with the "
            "image masked; 0 = not at all.",
        ),
    ] = _DEFAULT.alpha
    beta: Annotated[
        float,
        _flag(
            "--beta",
            min=0.0,
            max=1.0,
            metavar="X",
            help="Plausibility cut: tokens below this share of the likeliest token's probability "
            "are out; 0 = none, 1 = all but the likeliest.",
        ),
    ] = _DEFAULT.beta
    tokens: Annotated[
        str,
        _flag(
            "--tokens",
            metavar="TOKENS",
            callback=_valid(parse_tokens),
            help="Image tokens that are masked in each layer: a share of them, the most attended "
            "(top:0.5), those so many standard deviations above the mean (std:1), or the fewest "
            "that hold a share of the attention (mass:0.8).",
        ),
    ] = format_tokens(_DEFAULT.tokens)
    layers: Layers = LAYERS
    scope: Annotated[
        Scope,
        _flag(
            "--scope",
            help="Rows that are masked: decode = the answer and the prompt's last, text = all text "
            "behind the first image, all = image rows too.",
        ),
    ] = _DEFAULT.scope
    refresh: Annotated[
        Refresh,
        _flag(
            "--refresh",
            help="When image tokens are chosen: step = anew for each row, prompt = once, by the "
            "prompt's last row.",
        ),
    ] = _DEFAULT.refresh
    no_guidance: Annotated[
        bool, _flag("--no-guidance", help="Plain decoding: alpha 0 and beta 0.")
    ] = False

    def guidance(self) -> Guidance:
        """The same as a value. Raises BadParameter where two flags contradict each other."""
        if self.no_guidance:
            if (self.alpha, self.beta) != (_DEFAULT.alpha, _DEFAULT.beta):
                raise typer.BadParameter(
                    "it stands for --alpha 0 --beta 0; leave those two out",
                    param_hint="'--no-guidance'",
                )
            return PLAIN
        return Guidance(
            alpha=self.alpha,
            beta=self.beta,
            tokens=parse_tokens(self.tokens),
            layers=parse_layers(self.layers),
            scope=self.scope,
            refresh=self.refresh,
        )
