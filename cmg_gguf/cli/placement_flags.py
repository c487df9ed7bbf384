"""Flags that say on which devices a model lies. Names are llama.cpp's."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import typer

SplitMode = Literal["layer", "row", "none"]

_flag = partial(typer.Option, rich_help_panel="Model")

GpuLayers = Annotated[
    int,
    _flag(
        "--n-gpu-layers",
        "-ngl",
        min=-1,
        metavar="N",
        help="Layers on the accelerator, if there is one; -1 = all, 0 = none.",
    ),
]
DeviceNames = Annotated[
    str | None,
    _flag(
        "--device",
        "-dev",
        metavar="NAME,...",
        help="Which accelerators, as info names them; none = none. Default: all GPUs.",
    ),
]
SplitModeName = Annotated[
    SplitMode,
    _flag(
        "--split-mode",
        "-sm",
        help="Over several: layer = each has some of the layers and their KV cells, row = products "
        "are cut by rows where the backend can, none = all on the one of -mg.",
    ),
]
TensorSplit = Annotated[
    str | None,
    _flag(
        "--tensor-split",
        "-ts",
        metavar="N,...",
        help="Share of each accelerator, as 3,1. Default: by their free memory.",
    ),
]
MainGpu = Annotated[
    int,
    _flag(
        "--main-gpu",
        "-mg",
        min=0,
        metavar="N",
        help="Which accelerator has it all with -sm none, counted from 0.",
    ),
]
NoKvOffload = Annotated[
    bool, _flag("--no-kv-offload", "-nkvo", help="Keep the KV cache on the host.")
]
NoMmprojOffload = Annotated[
    bool, _flag("--no-mmproj-offload", help="Keep the image encoder on the CPU.")
]


def placement(
    n_gpu_layers: int, device: str | None, split_mode: SplitMode, shares: str | None, main_gpu: int
) -> dict[str, Any]:
    """The flags as keyword arguments of `Placement`. Raises BadParameter for shares that are no
    numbers."""
    return {
        "n_gpu_layers": n_gpu_layers,
        "devices": None if device is None else _names(device),
        "split_mode": split_mode,
        "tensor_split": None if shares is None else _numbers(shares),
        "main_gpu": main_gpu,
    }


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    return () if names == ("none",) else names


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} are no shares; write 3,1", param_hint="'--tensor-split' / '-ts'"
        ) from None
