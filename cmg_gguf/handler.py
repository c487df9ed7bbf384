"""`CMGChatHandler`: guidance for people who already hold a `llama_cpp.Llama`.

llm = Llama("llava.gguf", chat_handler=CMGChatHandler("mmproj.gguf"), n_ctx=4096)
llm.create_chat_completion(messages)
"""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp

from cmg_gguf.errors import ModelError
from cmg_gguf.guidance import Guidance
from cmg_gguf.opening import Encoder, Pairing
from cmg_gguf.request import check_guidance
from cmg_gguf.sampling import MAX_SEED
from cmg_gguf.vlm import GuidedVLM

_SEEDS = threading.Lock()
"""Held where a `Llama`'s seed is read and moves on: threads may ask at once."""


class CMGChatHandler:
    """A chat handler that answers under guidance with the model its `Llama` has loaded.

    clip_model_path: the image projector, by the name that llama-cpp-python's handlers give it.
    verbose: llama.cpp's log on stderr, as `Llama`'s own argument, which holds where this is None.
    guidance: used for every answer; None = `Guidance()`.
    chat_template, chat_template_kwargs, pairing, prefix_cells, encoder, max_pixels,
    image_min_tokens, image_max_tokens, use_gpu: as in `GuidedVLM.from_llama`. A KV cache of its
    own is made with the first answer, with the context settings of that `Llama`.

    The options of `Llama.create_chat_completion` have their usual meaning; replies carry a `cmg`
    block. Without a seed of its own, an answer is drawn with that of its `Llama` (constructor and
    `set_seed`), and the next one with another that follows from it: what is drawn from `set_seed`
    on is repeatable, as in llama-cpp-python. Raises GuidanceError for guidance that is none, and
    what `GuidedVLM` and `create_chat_completion` raise.
    """

    def __init__(
        self,
        clip_model_path: str | Path,
        verbose: bool | None = None,
        *,
        guidance: Guidance | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        pairing: Pairing = "auto",
        prefix_cells: int | None = None,
        encoder: Encoder = "mended",
        max_pixels: int | None = None,
        image_min_tokens: int | None = None,
        image_max_tokens: int | None = None,
        use_gpu: bool = True,
    ) -> None:
        if guidance is not None:
            check_guidance(guidance)
        self.guidance = guidance
        self._clip_model_path = clip_model_path
        self._verbose = verbose
        self._options: dict[str, Any] = {
            "chat_template": chat_template,
            "chat_template_kwargs": chat_template_kwargs or {},
            "pairing": pairing,
            "prefix_cells": prefix_cells,
            "encoder": encoder,
            "max_pixels": max_pixels,
            "image_min_tokens": image_min_tokens,
            "image_max_tokens": image_max_tokens,
            "use_gpu": use_gpu,
        }
        self._vlms: weakref.WeakKeyDictionary[llama_cpp.Llama, weakref.ref[GuidedVLM]]
        self._vlms = weakref.WeakKeyDictionary()
        self._making = threading.Lock()

    def vlm(self, llama: llama_cpp.Llama) -> GuidedVLM:
        """The guided model on `llama`'s weights, made on first use. It goes with `llama` or with
        this handler, whichever goes first. Raises what `GuidedVLM.from_llama` raises, and
        ModelError once `llama` is closed."""
        with self._making:  # threads may ask at once
            found = self._vlms.get(llama)
            vlm = self._made(llama) if found is None else found()
        if vlm is None:
            raise ModelError("this Llama is closed; make a new one")
        return vlm

    def _made(self, llama: llama_cpp.Llama) -> GuidedVLM:
        kept = _Kept(self)
        llama._stack.callback(kept)
        vlm = kept.vlm = GuidedVLM.from_llama(
            llama, self._clip_model_path, verbose=self._verbose, **self._options
        )
        self._vlms[llama] = weakref.ref(vlm)
        return vlm

    def __call__(self, *, llama: llama_cpp.Llama, messages: Any, **settings: Any) -> Any:
        settings.setdefault("guidance", self.guidance)
        if settings.get("seed") is None:
            settings["seed"] = _next_seed(llama)
        return self.vlm(llama).create_chat_completion(messages, **settings)


class _Kept:
    """What a `Llama` keeps of a guided model on its weights, until a handler is gone.

    Not the handler keeps it: it keeps its `Llama`, which would never go before the handler.
    """

    def __init__(self, handler: CMGChatHandler) -> None:
        self.vlm: GuidedVLM | None = None
        self._handler = weakref.ref(handler, self)

    def __call__(self, handler: object = None) -> None:
        """Called where the `Llama` ends, or the handler is gone."""
        self.vlm = None


def _next_seed(llama: llama_cpp.Llama) -> int | None:
    """The seed of a `Llama`, which moves on to the next; None = it has none, so it is random."""
    with _SEEDS:
        seed = llama._seed
        if seed in (-1, llama_cpp.LLAMA_DEFAULT_SEED):
            return None
        llama.set_seed(random.Random(seed).randint(0, MAX_SEED))
    return int(seed)
