"""The random benchmark model in every quantisation, K-quants by llama.cpp's own quantiser."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Literal

import llama_cpp
from benchmark_model import Pair, Quant, benchmark_pair
from rich.console import Console

from cmg_gguf.llama.log import captured_errors

BenchQuant = Literal["q4_0", "q8_0", "q4_k_m"]

_WRITTEN: dict[BenchQuant, Quant] = {"q4_0": "q4_0", "q8_0": "q8_0"}


def quantized_pair(folder: Path, quant: BenchQuant) -> Pair:
    """Paths of the pair in `folder`; what is not there yet is made, with progress on stderr."""
    if written := _WRITTEN.get(quant):
        return benchmark_pair(folder, written)
    pair = benchmark_pair(folder, "q8_0")
    target = pair.llm.with_name(pair.llm.name.replace("q8_0", quant))
    if not target.exists():
        with Console(stderr=True).status(f"quantising {target.name}, about a minute"):
            _quantize(pair.llm, target)
    return Pair(target, pair.mmproj)


def _quantize(source: Path, target: Path) -> None:
    """Writes `source` as Q4_K_M. Raises RuntimeError where llama.cpp cannot."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.allow_requantize = True
    params.nthread = os.cpu_count() or 1
    part = target.with_suffix(".part")
    with captured_errors() as errors:
        code = llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(part), ctypes.byref(params)
        )
    if code != 0:
        part.unlink(missing_ok=True)
        reason = errors[0] if errors else f"code {code}"
        raise RuntimeError(f"llama.cpp could not quantise {source}: {reason}")
    part.replace(target)
