"""What runs here: versions, the libllama that is loaded, devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmg_gguf import __version__
from cmg_gguf.doctor.finding import Finding
from cmg_gguf.facts import system_facts
from cmg_gguf.llama.versions import REMEDY, untested

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
CUDA_REMEDY = (
    "the accelerator computes with a llama-cpp-python that was built for it: CMAKE_ARGS=-DGGML_CUDA"
    f"=on {REMEDY} --no-cache-dir"
)


def look() -> Iterator[Finding]:
    """Findings of this installation, without computing anything."""
    facts = system_facts()
    yield Finding(
        "versions",
        "ok",
        f"cmg-gguf {__version__}, llama-cpp-python {facts['llama_cpp_python']}, "
        f"NumPy {facts['numpy']}, Pillow {facts['pillow']}, Python {facts['python']}",
    )
    if told := untested(facts["llama_cpp_python"]):
        yield Finding("llama-cpp-python", "warning", told)
    yield Finding("llama.cpp", "ok", facts["library"])
    yield Finding("threads wait", "ok", facts["waiting"])
    yield _devices(facts["devices"])
    if remedy := facts["repacking_remedy"]:
        yield Finding(
            "weights",
            "ok",
            "not repacked, for the AMX kernels of this llama.cpp crash; one without them is "
            f"faster: {remedy}",
        )


def _devices(devices: list[Mapping[str, Any]]) -> Finding:
    told = "; ".join(_device(device) for device in devices)
    idle = NVIDIA_DRIVER.exists() and all(device["backend"] == "CPU" for device in devices)
    if idle:
        return Finding("devices", "warning", f"{told}; an NVIDIA card is not used", CUDA_REMEDY)
    return Finding("devices", "ok", told)


def _device(device: Mapping[str, Any]) -> str:
    name = device["name"]
    backend = "" if device["backend"] == name else f" ({device['backend']})"
    memory = f", {device['memory'] / 2**30:.1f} GiB" if device["memory"] else ""
    return f"{name}{backend}: {device['description']}{memory}"
