"""`cmg-gguf info`: what a model pair is, what guidance would mask in it, what runs it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from cmg_gguf.cli.exits import load_library, manners
from cmg_gguf.cli.guidance_flags import LAYERS, Layers
from cmg_gguf.cli.model_flags import ModelFile, ModelFlags, ProjectorFile
from cmg_gguf.cli.options import format_numbers, parse_layers
from cmg_gguf.cli.output import write_json, write_rendered
from cmg_gguf.guidance import LayerRange, LayerSet, static_layers

if TYPE_CHECKING:
    from cmg_gguf.llama.model import Model

EXAMPLES = """\
Examples:

  cmg-gguf info                                versions, devices, the built-in model

  cmg-gguf info -m llava.gguf --mmproj mmproj.gguf

  cmg-gguf info -m llava.gguf --layers 10-20   which layers that means
"""
SIZE_IF_UNKNOWN = 336
"""Pixels a side of the image whose tokens are counted, where the projector names no size."""


@manners()
def info(
    *,
    model: ModelFile = None,
    mmproj: ProjectorFile = None,
    layers: Layers = LAYERS,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object instead of the table.")
    ] = False,
) -> None:
    """Show what a model pair is, which layers guidance would mask, and what runs it."""
    load_library()
    if model is None:
        model, mmproj = ModelFlags(mmproj=mmproj).pair()
    facts = {**system_facts(), **pair_facts(model, mmproj, layers)}
    if as_json:
        write_json(facts)
    else:
        write_rendered(table(facts))


def system_facts() -> dict[str, Any]:
    """Versions and devices, JSON-ready."""
    import llama_cpp

    from cmg_gguf import __version__
    from cmg_gguf.llama.about import devices, features

    return {
        "cmg_gguf": __version__,
        "llama_cpp_python": llama_cpp.__version__,
        "python": platform.python_version(),
        "devices": [vars(device) for device in devices()],
        "features": features(),
    }


def pair_facts(path: Path, mmproj: Path | None, layers: str) -> dict[str, Any]:
    """What the files hold, JSON-ready. Raises ModelError, ProjectorError, GuidanceError."""
    from cmg_gguf.llama.log import set_verbose
    from cmg_gguf.llama.model import Model
    from cmg_gguf.opening import DEFAULT_TEMPLATE

    set_verbose(False)
    model = Model.load(path, n_gpu_layers=0)
    policy = parse_layers(layers)
    masked: tuple[int, ...] | None = None  # the others depend on what a prompt looks at
    if isinstance(policy, LayerSet | LayerRange):
        masked = static_layers(policy, model.n_layer)
    return {
        "model": {
            "path": str(path),
            "description": model.describe(),
            "bytes": model.size,
            "layers": model.n_layer,
            "vocabulary": model.n_vocab,
            "context": model.n_ctx_train,
            "chat_template": "own" if model.chat_template() else DEFAULT_TEMPLATE,
        },
        "mmproj": projector_block(mmproj, model) if mmproj else None,
        "guidance": {
            "layers": layers,
            "masked": masked,
        },
    }


def projector_block(path: Path, model: Model) -> dict[str, Any]:
    """What an mmproj file holds, and the tokens it makes of a square image."""
    from cmg_gguf.llama.header import projector_facts
    from cmg_gguf.llama.projector import Projector

    projector = Projector(path, model, use_gpu=False)
    facts = projector_facts(path)
    size = facts.image_size or SIZE_IF_UNKNOWN
    square = np.zeros((size, size, 3), np.uint8)
    return {
        "path": str(path),
        "projector": facts.kind,
        "image_size": size,
        "image_tokens": projector.tokenize(projector.marker, [square]).n_image_tokens,
    }


def table(facts: dict[str, Any]) -> Table:
    """The facts for people."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows(facts):
        grid.add_row(name, value)
    return grid


def rows(facts: dict[str, Any]) -> list[tuple[str, str | Text]]:
    """Names and values, in the order in which they are read."""
    lines: list[tuple[str, str | Text]] = []
    if model := facts.get("model"):
        lines += [
            ("model", model["path"]),
            ("", f"{model['description']}, {_size(model['bytes'])}"),
            ("layers", str(model["layers"])),
            ("vocabulary", f"{model['vocabulary']} tokens"),
            ("context", f"{model['context']} tokens in training"),
            ("chat template", _template(model["chat_template"])),
        ]
    if mmproj := facts.get("mmproj"):
        side = mmproj["image_size"]
        lines += [
            ("mmproj", mmproj["path"]),
            ("", f"projector {mmproj['projector'] or 'of unknown kind'}"),
            ("image tokens", f"{mmproj['image_tokens']} for {side} x {side} pixels"),
        ]
    if model:
        lines.append(("masked layers", _masked(facts["guidance"], model["layers"])))
    lines += [
        ("cmg-gguf", facts["cmg_gguf"]),
        ("llama-cpp-python", f"{facts['llama_cpp_python']}, Python {facts['python']}"),
    ]
    lines += [("device", _device(device)) for device in facts["devices"]]
    return [*lines, ("compiled with", facts["features"])]


def layer_bar(masked: list[int], n_layer: int) -> Text:
    """One character a layer, the masked ones full."""
    full = set(masked)
    return Text("".join("█" if il in full else "░" for il in range(n_layer)), style="yellow")


def _masked(guidance: dict[str, Any], n_layer: int) -> Text:
    masked, wanted = guidance["masked"], guidance["layers"]
    if masked is None:
        return Text(f"chosen by each prompt ({wanted})")
    words = f" {format_numbers(masked)} of 0-{n_layer - 1} ({wanted})"
    return layer_bar(masked, n_layer).append(words, style="default")


def _template(name: str) -> str:
    return "the model's own" if name == "own" else f"{name} (the model has none)"


def _device(device: dict[str, Any]) -> str:
    memory = f", {_size(device['memory'])}" if device["memory"] else ""
    backend = "" if device["backend"] == device["name"] else f" ({device['backend']})"
    return f"{device['name']}{backend}: {device['description']}{memory}"


def _size(n: int) -> str:
    value = float(n)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
