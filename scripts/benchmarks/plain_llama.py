"""`llama_cpp.Llama` as it is, but for weights whose repacking would end the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp

from cmg_gguf.llama.repacking import is_safe


def open_llama(path: str | Path, **settings: Any) -> llama_cpp.Llama:
    """A `Llama` of these settings. Its weights are not repacked where that crashes: see
    `cmg_gguf.llama.repacking`."""
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = is_safe()
    library = "llama_cpp.llama_cpp.llama_model_default_params"
    with mock.patch(library, return_value=params):
        return llama_cpp.Llama(str(path), **settings)
