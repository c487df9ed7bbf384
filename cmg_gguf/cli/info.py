"""`cmg-gguf info`: what a model pair is, what guidance would mask in it, what runs it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cmg_gguf import __version__
from cmg_gguf.cli.asker import fetched
from cmg_gguf.cli.exits import load_library, manners
from cmg_gguf.cli.guidance_flags import LAYERS, Layers
from cmg_gguf.cli.model_flags import ModelFile, ModelFlags, ProjectorFile, RepositoryName
from cmg_gguf.cli.options import format_numbers, parse_layers
from cmg_gguf.cli.output import write_json, write_rendered
from cmg_gguf.cli.placement_flags import (
    DeviceNames,
    GpuLayers,
    MainGpu,
    NoKvOffload,
    SplitModeName,
    TensorSplit,
    placement,
)
from cmg_gguf.cli.screen import Screen, size
from cmg_gguf.guidance import LayerRange, LayerSet, static_layers
from cmg_gguf.reply import MENDS

EXAMPLES = """\
Examples:

  cmg-gguf info                                versions, devices, the built-in model

  cmg-gguf info -m llava.gguf --mmproj mmproj.gguf

  cmg-gguf info -hf owner/repo                 download it, without asking it anything

  cmg-gguf info -m llava.gguf --layers 10-20   which layers that means
"""


@manners()
def info(
    *,
    model: ModelFile = None,
    mmproj: ProjectorFile = None,
    hf_repo: RepositoryName = None,
    n_gpu_layers: GpuLayers = -1,
    device: DeviceNames = None,
    split_mode: SplitModeName = "layer",
    tensor_split: TensorSplit = None,
    main_gpu: MainGpu = 0,
    no_kv_offload: NoKvOffload = False,
    layers: Layers = LAYERS,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object instead of the table.")
    ] = False,
) -> None:
    """Show what a model pair is, which layers guidance would mask, what runs it and where."""
    load_library()
    if model is None or hf_repo is not None:
        flags = ModelFlags(model=model, mmproj=mmproj, hf_repo=hf_repo)
        model, mmproj = fetched(Screen(), flags)
    from cmg_gguf.facts import pair_facts, system_facts

    placed = placement(n_gpu_layers, device, split_mode, tensor_split, main_gpu)
    pair = pair_facts(model, mmproj, offload_kqv=not no_kv_offload, **placed)
    facts = {"cmg_gguf": __version__, **system_facts(), **pair}
    facts["guidance"] = _guidance_facts(layers, facts["model"])
    if as_json:
        write_json(facts)
    else:
        write_rendered(table(facts))


def _guidance_facts(layers: str, model: dict[str, Any]) -> dict[str, Any]:
    """Which layers a flag means, JSON-ready. Raises GuidanceError."""
    policy = parse_layers(layers)
    masked: tuple[int, ...] | None = None  # the others depend on what a prompt looks at
    if isinstance(policy, LayerSet | LayerRange):
        masked = static_layers(policy, model["layers"], model["attention_layers"])
    return {"layers": layers, "masked": masked}


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
            ("", f"{model['description']}, {size(model['bytes'])}"),
            ("layers", _layers(model)),
            *_places(model, facts["devices"]),
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
            *_by_size(mmproj["image_tokens_by_size"]),
            ("prompt tokens", _step(mmproj["n_ubatch"])),
        ]
        lines += [("mended", MENDS[name]) for name in mmproj["mended"]]
    if model:
        lines.append(("masked layers", _masked(facts["guidance"], model["layers"])))
    lines += [
        ("cmg-gguf", facts["cmg_gguf"]),
        ("llama-cpp-python", facts["llama_cpp_python"]),
        ("Python", f"{facts['python']}, NumPy {facts['numpy']}, Pillow {facts['pillow']}"),
    ]
    lines += [("device", _device(device)) for device in facts["devices"]]
    if remedy := facts["repacking_remedy"]:
        lines += [
            ("weights", "not repacked: this build's AMX kernels crash. To be faster:"),
            ("", remedy),
        ]
    return [*lines, ("threads wait", facts["waiting"]), ("compiled with", facts["features"])]


def _by_size(tokens: list[int] | None) -> list[tuple[str, str]]:
    if tokens is None:
        return []
    fewest, most = tokens
    words = f"{fewest} to {most} by an image's size, no more than half of -c (--image-max-tokens)"
    return [("", words)]


def _places(model: dict[str, Any], devices: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Which layers and KV cells lie where, if there is a choice."""
    if all(device["kind"] == "cpu" for device in devices):
        return []
    lines = [("layers lie on", _by_place(model["layer_devices"]))]
    if model["cache_devices"] != model["layer_devices"]:
        lines.append(("KV cells lie on", _by_place(model["cache_devices"])))
    return lines


def _by_place(places: list[str]) -> str:
    lying = {name: [il for il, place in enumerate(places) if place == name] for name in places}
    return ", ".join(f"{name or 'nowhere'} {format_numbers(on)}" for name, on in lying.items())


def layer_bar(masked: list[int], n_layer: int) -> Text:
    """One character a layer, the masked ones full."""
    full = set(masked)
    return Text("".join("█" if il in full else "░" for il in range(n_layer)), style="yellow")


def _layers(model: dict[str, Any]) -> str:
    n_layer, attending = model["layers"], model["attention_layers"]
    if len(attending) == n_layer:
        return str(n_layer)
    return f"{n_layer}, of which {len(attending)} attend: {format_numbers(attending)}"


def _step(n_ubatch: int) -> str:
    why = ", for a picture is decoded at once: more memory" if n_ubatch > 512 else ""
    return f"{n_ubatch} in one step (-ub){why}"


def _masked(guidance: dict[str, Any], n_layer: int) -> Text:
    masked, wanted = guidance["masked"], guidance["layers"]
    if masked is None:
        return Text(f"chosen by each prompt ({wanted})")
    words = f" {format_numbers(masked)} of 0-{n_layer - 1} ({wanted})"
    return layer_bar(masked, n_layer).append(words, style="default")


def _template(name: str) -> str:
    return "the model's own" if name == "own" else f"{name} (the model has none)"


def _device(device: dict[str, Any]) -> str:
    free = f", {size(device['free'])} free" if device["kind"] != "cpu" else ""
    memory = f", {size(device['memory'])}{free}" if device["memory"] else ""
    backend = "" if device["backend"] == device["name"] else f" ({device['backend']})"
    return f"{device['name']}{backend}: {device['description']}{memory}"
