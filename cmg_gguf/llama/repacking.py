"""Whether weights may be repacked for the CPU's matrix units (AMX): here, that can end the process.

llama.cpp repacks quantised weights where CPU and build have AMX. Compilers have dropped the tile
configuration that it loads (ggml-org/llama.cpp issue 20824, pull 26954): the first product of such
weights is then a segmentation fault, in any program. Where there is AMX, a process of its own tries
it once on the built-in model; if it does not survive, weights are loaded as they are, which is
slower and gives the same answers.
"""

from __future__ import annotations

import functools
import logging
import subprocess
import sys

import llama_cpp

from cmg_gguf.llama.about import features
from cmg_gguf.tiny.pair import embedded_pair

REMEDY = (
    'CMAKE_ARGS="-DCMAKE_CXX_FLAGS=-mno-amx-int8" pip install llama-cpp-python=='
    f"{llama_cpp.__version__} --no-binary llama-cpp-python --no-cache-dir --force-reinstall"
)
"""Builds a llama.cpp without AMX, which repacks for the CPU's other units."""

_TRIAL = """
import sys
from llama_cpp import llama_cpp, Llama
params = llama_cpp.llama_model_default_params()
params.use_extra_bufts = True
llama_cpp.llama_model_default_params = lambda: params
Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=False).eval([1] * 8)
"""
_SECONDS = 120
_log = logging.getLogger(__name__)


@functools.cache
def is_safe() -> bool:
    """Whether repacked weights can be used. Takes about a second, once, where there is AMX."""
    if "AMX_INT8 = 1" not in features():
        return True
    model, _ = embedded_pair()
    try:
        trial = subprocess.run(
            [sys.executable, "-c", _TRIAL, str(model)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
        survived = trial.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        survived = False
    if not survived:
        _log.info("weights are not repacked: this llama.cpp's AMX kernels crash; %s", REMEDY)
    return survived
