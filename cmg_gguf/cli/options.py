"""Policies and image lists as a command line writes them. Pure functions, and their inverse.

parse_tokens("top:0.5")        # TopRatio(0.5)
parse_layers("1/3-")           # LayerRange(1/3, 1): a fraction has a point or a slash in it
parse_layers("10-20")          # LayerSet((10, ..., 20)): whole numbers are layers, both ends in
format_layers(LayerRange())    # "1/3-"
parse_gate("disagreement:3")   # Disagreement(3.0)
split_images(["a.png,b.png"])  # ["a.png", "b.png"]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from cmg_gguf.errors import GuidanceError, ImageError, shown
from cmg_gguf.guidance import (
    AttentionMass,
    CumulativeMass,
    Disagreement,
    LayerPolicy,
    LayerRange,
    LayerSet,
    LowestCosine,
    MeanStd,
    TokenPolicy,
    TopRatio,
)

TOKENS_HINT = "top:0.5, std:1 or mass:0.8"
LAYERS_HINT = "10-20, 3,5,7, 1/3-, 0.5-1, all, none, mass:0.5 or cosine:0.5"
GATE_HINT = "none, disagreement or disagreement:3"
MAX_LAYER = 9999
"""Largest layer number that is read: a range is spelled out before the model is known."""

_TOKENS: dict[str, type[TopRatio | MeanStd | CumulativeMass]] = {
    "top": TopRatio,
    "std": MeanStd,
    "mass": CumulativeMass,
}
_LAYERS: dict[str, type[AttentionMass | LowestCosine]] = {
    "mass": AttentionMass,
    "cosine": LowestCosine,
}
_FRACTION = r"(\d+/\d+|\d*\.?\d+)"


def parse_tokens(text: str) -> TokenPolicy:
    """The token policy of "top:0.5", "std:1", "mass:0.8"; a name alone has its own default.

    Raises GuidanceError.
    """
    name, colon, number = text.strip().partition(":")
    if name not in _TOKENS:
        raise GuidanceError(f"{shown(text)} is no choice of image tokens: write {TOKENS_HINT}")
    return _TOKENS[name](_number(number, text)) if colon else _TOKENS[name]()


def format_tokens(policy: TokenPolicy) -> str:
    """What `parse_tokens` reads as `policy`."""
    name = next(name for name, kind in _TOKENS.items() if type(policy) is kind)
    (value,) = astuple(policy)
    return f"{name}:{_decimal(value)}"


def parse_layers(text: str) -> LayerPolicy:
    """The layer policy of a text such as those in `LAYERS_HINT`.

    Whole numbers are layers, counted from 0; a range whose ends have a point or a slash is one of
    fractions of the depth, and may lack an end. Raises GuidanceError.
    """
    text = text.strip()
    name, colon, number = text.partition(":")
    if name in _LAYERS:
        return _LAYERS[name](_number(number, text)) if colon else _LAYERS[name]()
    if text in ("all", "none"):
        return LayerRange(0.0, 1.0) if text == "all" else LayerSet(())
    ends = re.fullmatch(rf"{_FRACTION}?\s*-\s*{_FRACTION}?", text)
    if ends and re.search(r"[./]", text):
        return LayerRange(_fraction(ends[1] or "0"), _fraction(ends[2] or "1"))
    return LayerSet(tuple(il for part in text.split(",") for il in _layers(part.strip(), text)))


def format_layers(policy: LayerPolicy) -> str:
    """What `parse_layers` reads as `policy`."""
    if isinstance(policy, LayerSet):
        return ",".join(_runs(policy.layers)) or "none"
    if isinstance(policy, LayerRange):
        if (policy.start, policy.stop) == (0.0, 1.0):
            return "all"
        stop = "" if policy.stop == 1.0 else _short(policy.stop)
        return f"{_short(policy.start)}-{stop}"
    name = next(name for name, kind in _LAYERS.items() if type(policy) is kind)
    return f"{name}:{_decimal(policy.share)}"


def parse_gate(text: str) -> Disagreement | None:
    """The gate of "none", "disagreement" or "disagreement:3". Raises GuidanceError."""
    name, colon, number = text.strip().partition(":")
    if name == "none" and not colon:
        return None
    if name != "disagreement":
        raise GuidanceError(f"{shown(text)} is no gate: write {GATE_HINT}")
    return Disagreement(_number(number, text)) if colon else Disagreement()


def format_gate(gate: Disagreement | None) -> str:
    """What `parse_gate` reads as `gate`."""
    return "none" if gate is None else f"disagreement:{_decimal(gate.factor)}"


def format_numbers(layers: Sequence[int]) -> str:
    """Layer numbers in few characters: "2-5, 8"; "none" for no layer."""
    return ", ".join(_runs(layers)) or "none"


def split_images(sources: Sequence[str]) -> list[str]:
    """Image sources, each possibly several with commas between, as llama-mtmd-cli takes them.

    A data: URL, and the name of a file that exists, keep their commas.

    Raises ImageError for one that is empty, as that of a shell's variable which is not set.
    """
    images: list[str] = []
    for source in sources:
        whole = source[:5].lower() == "data:" or is_file(source)
        images += [source] if whole else source.split(",")
        if not all(image.strip() for image in images):
            raise ImageError(
                f"{shown(source)} names no image, or an empty one between commas: give a file, or "
                "leave it out to ask without a picture"
            )
    return images


def is_file(name: str) -> bool:
    """Whether there is a regular file of that name."""
    with suppress(OSError, ValueError):  # a name that no file can have
        return Path(name).is_file()
    return False


def _number(number: str, text: str) -> float:
    try:
        return _fraction(number.strip())
    except ValueError as exc:
        raise GuidanceError(f"{shown(text)}: {shown(number)} is no number") from exc


def _fraction(text: str) -> float:
    if "/" not in text:
        return float(text)
    try:
        return float(Fraction(text))
    except ZeroDivisionError as exc:
        raise GuidanceError(f"{text} divides by zero") from exc


def _layers(part: str, text: str) -> range:
    ends = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
    if re.fullmatch(r"\d+\s*-", part):
        raise GuidanceError(
            f"{shown(text)} has no end: write the last layer too (cmg-gguf info shows how many "
            "there are), or a fraction of the depth such as 1/3-"
        )
    if not ends:
        raise GuidanceError(f"{shown(text)} is no choice of layers: write {LAYERS_HINT}")
    first, last = int(ends[1]), int(ends[2] or ends[1])
    if first > last:
        raise GuidanceError(f"{part} runs backwards: write {last}-{first}")
    if last > MAX_LAYER:
        raise GuidanceError(f"layer {last} is out of range: 0 to {MAX_LAYER} can be written")
    return range(first, last + 1)


def _runs(layers: Sequence[int]) -> list[str]:
    runs: list[list[int]] = []
    for il in layers:
        if runs and il == runs[-1][-1] + 1:
            runs[-1].append(il)
        else:
            runs.append([il])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def _decimal(value: float) -> str:
    return f"{Decimal(repr(float(value))).normalize():f}"


def _short(value: float) -> str:
    """An end of a range: always with a point or a slash, and the same float when read back."""
    decimal = f"{Decimal(repr(float(value))):f}"
    fraction = Fraction(value).limit_denominator(100)
    if len(decimal) > 4 and float(fraction) == value:
        return f"{fraction.numerator}/{fraction.denominator}"
    return decimal
