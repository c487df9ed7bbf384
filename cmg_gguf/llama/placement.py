"""On which devices a model lies."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import llama_cpp

from cmg_gguf.errors import UnsupportedError
from cmg_gguf.llama.about import Device, device_handle, devices

SplitMode = Literal["layer", "row", "none"]
SPLIT_MODES: dict[SplitMode, int] = {
    "none": llama_cpp.LLAMA_SPLIT_MODE_NONE,
    "layer": llama_cpp.LLAMA_SPLIT_MODE_LAYER,
    "row": llama_cpp.LLAMA_SPLIT_MODE_ROW,
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """On which devices a model lies. Names and meanings are llama.cpp's.

    n_gpu_layers: layers on devices, the last ones of the model; -1 = all, 0 = none. devices: names
    of devices, as `cmg-gguf info` lists them; None = all GPUs, () = none. split_mode: "layer" =
    each device has some of the layers, with their KV cells; "row" = rows of each product lie on
    several, where the backend can; "none" = all on one, the main_gpu-th of them, counted from 0.
    tensor_split: how much each device takes, of any sum; None = by its free memory. Raises
    UnsupportedError for what cannot be on this machine, or would be ignored. Of a number of layers
    that finds no device `fill` warns alone, for one command line is used on many machines.
    """

    n_gpu_layers: int = -1
    devices: Sequence[str] | None = None
    split_mode: SplitMode = "layer"
    tensor_split: Sequence[float] | None = None
    main_gpu: int = 0

    def __post_init__(self) -> None:
        if self.split_mode not in SPLIT_MODES:
            raise UnsupportedError(
                f"split_mode={self.split_mode!r} is unknown: one of {', '.join(SPLIT_MODES)}"
            )
        if self.n_gpu_layers < -1:
            raise UnsupportedError(
                f"n_gpu_layers={self.n_gpu_layers} is out of range: -1 (all) and up"
            )
        found = self.used()
        used = [device.name for device in found]
        if self.split_mode == "row":
            self._check_rows(found)
        self._check_split(used)
        if self.main_gpu != 0 and self.split_mode != "none":
            raise UnsupportedError(
                f"main_gpu={self.main_gpu} is read with split_mode='none' alone; "
                "to leave devices out, name the others in devices"
            )
        if self.main_gpu != 0 and not 0 <= self.main_gpu < len(used):
            raise UnsupportedError(
                f"main_gpu={self.main_gpu} is out of range: {_counted(used)}, counted from 0"
            )

    @property
    def on_device(self) -> bool:
        """Whether any layer may lie on a device: where there is one."""
        return self.n_gpu_layers != 0 and (self.devices is None or len(self.devices) > 0)

    def used(self) -> list[Device]:
        """The devices that layers may lie on, in order. Raises UnsupportedError for a name that is
        none's."""
        found = {device.name: device for device in devices()}
        if self.devices is None:
            every = list(found.values())
            gpus = [device for device in every if device.kind == "gpu"]
            return gpus or [device for device in every if device.kind == "igpu"]
        usable = [name for name, device in found.items() if device.kind != "cpu"]
        for name in self.devices:
            if name not in usable:
                raise UnsupportedError(
                    f"there is no device {name!r} to put layers on: {_counted(usable)}"
                )
        return [found[name] for name in self.devices]

    def fill(self, params: Any) -> tuple[Any, ...]:
        """Writes it into a llama_model_params; what must live until the model is loaded. Warns of
        layers that find no device."""
        if self.n_gpu_layers > 0 and not self.used():
            why = _counted([]) if self.devices is None else "devices names none"
            warnings.warn(
                f"n_gpu_layers={self.n_gpu_layers} puts no layer on a device: {why}", stacklevel=2
            )
        params.n_gpu_layers = self.n_gpu_layers
        params.split_mode = SPLIT_MODES[self.split_mode]
        params.main_gpu = self.main_gpu
        kept: list[Any] = []
        if self.devices is not None:
            handles = [device_handle(name) for name in self.devices]
            kept.append((ctypes.c_void_p * (len(handles) + 1))(*handles, None))
            params.devices = ctypes.cast(kept[-1], ctypes.c_void_p)
        if self.tensor_split is not None:
            kept.append((ctypes.c_float * llama_cpp.llama_max_devices())(*self.tensor_split))
            params.tensor_split = kept[-1]
        return tuple(kept)

    def fill_encoder(self, params: Any) -> None:
        """Writes the image encoder's device into an mtmd_context_params: that of the first layer on
        one, or as mtmd chooses. Raises UnsupportedError where this mtmd cannot be told."""
        chosen = self.devices is not None or self.main_gpu != 0
        used = self.used() if chosen else []
        if not used:
            return
        if not hasattr(params, "device"):
            raise UnsupportedError(
                f"devices={self.devices}, main_gpu={self.main_gpu}: the image encoder's device can "
                "be chosen since llama-cpp-python 0.3.36; update it, or leave both out"
            )
        params.device = device_handle(used[self.main_gpu].name)

    def _check_rows(self, found: Sequence[Device]) -> None:
        if not found or not self.on_device:
            raise UnsupportedError(
                f"split_mode='row' with n_gpu_layers={self.n_gpu_layers} has no device to cut "
                f"products for: {_counted([device.name for device in found])}; use 'layer'"
            )
        if whole := [device.name for device in found if not device.splits_rows]:
            raise UnsupportedError(
                f"split_mode='row': the backend of {', '.join(whole)} cannot cut products by rows; "
                "use 'layer'"
            )

    def _check_split(self, used: Sequence[str]) -> None:
        split = self.tensor_split
        if split is None:
            return
        if self.split_mode == "none":
            raise UnsupportedError(
                f"tensor_split={tuple(split)} is of no use with split_mode='none'; leave one out"
            )
        if len(split) != len(used):
            raise UnsupportedError(
                f"tensor_split={tuple(split)} has {len(split)} shares: {_counted(used)}; give one "
                "for each"
            )
        if min(split) < 0 or not math.isfinite(sum(split)) or sum(split) == 0:
            raise UnsupportedError(
                f"tensor_split={tuple(split)}: shares are 0 and up, and not all 0"
            )


def _counted(names: Sequence[str]) -> str:
    if not names:
        return "there are 0 of them (this llama-cpp-python is built for the CPU, or finds no GPU)"
    return f"there are {len(names)} of them, {', '.join(names)}"
