"""llama.cpp without the patch: what plain decoding gives."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp as mtmd
from support import EXACT, F32, Tiny

from cmg_gguf.llama.context import CACHE_TYPES, ContextOptions
from cmg_gguf.prompt.segments import ImageSegment, Prompt


class Unhooked:
    """A llama.cpp context without a callback, driven through llama_cpp alone."""

    def __init__(self, tiny: Tiny, options: ContextOptions = EXACT, *, n_seq_max: int = 2) -> None:
        self._tiny = tiny
        self._n_ubatch = options.n_ubatch
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = options.n_ctx, n_seq_max
        params.n_batch = params.n_ubatch = options.n_ubatch
        params.n_threads = params.n_threads_batch = options.n_threads
        params.kv_unified = params.swa_full = True
        params.flash_attn_type = 1 if options.flash_attn else 0
        params.type_k, params.type_v = CACHE_TYPES[options.type_k], CACHE_TYPES[options.type_v]
        self.handle = llama_cpp.llama_init_from_model(tiny.model.handle, params)
        assert self.handle

    def close(self) -> None:
        llama_cpp.llama_free(self.handle)

    def prefill(self, prompt: Prompt, seq: int = 0) -> F32:
        """(n_vocab,) logits of the last row; one batch a segment, the last row's output alone."""
        n_past = 0
        for segment in prompt.segments:
            if isinstance(segment, ImageSegment):
                self._decode_image(segment, n_past, seq)
            else:
                n = segment.n_tokens
                outputs = [False] * n
                outputs[-1] = n_past + n == prompt.n_tokens
                self.decode(segment.tokens.tolist(), range(n_past, n_past + n), [seq] * n, outputs)
            n_past += segment.n_pos
        return self.logits(prompt.segments[-1].n_tokens - 1)

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        seqs: Sequence[int],
        outputs: Sequence[bool],
    ) -> None:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, row in enumerate(zip(tokens, positions, seqs, outputs, strict=True)):
            batch.token[i], batch.pos[i], batch.seq_id[i][0], batch.logits[i] = row
            batch.n_seq_id[i] = 1
        status = llama_cpp.llama_decode(self.handle, batch)
        llama_cpp.llama_batch_free(batch)
        assert status == 0

    def share(self, source: int, target: int) -> None:
        memory = llama_cpp.llama_get_memory(self.handle)
        llama_cpp.llama_memory_seq_cp(memory, source, target, -1, -1)

    def logits(self, row: int) -> F32:
        pointer = llama_cpp.llama_get_logits_ith(self.handle, row)
        return np.array(np.ctypeslib.as_array(pointer, (self._tiny.model.n_vocab,)))

    def _decode_image(self, image: ImageSegment, n_past: int, seq: int) -> None:
        assert image.embd is not None
        observer: tuple[Any, ...] = ()
        if hasattr(mtmd, "mtmd_helper_post_decode_callback"):  # not in the oldest versions
            observer = (mtmd.mtmd_helper_post_decode_callback(), ctypes.c_void_p(0))
        status = mtmd.mtmd_helper_decode_image_chunk(
            self._tiny.projector.handle,
            self.handle,
            image.chunk.handle,
            image.embd.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            n_past,
            seq,
            self._n_ubatch,
            ctypes.byref(llama_cpp.llama_pos()),
            *observer,
        )
        assert status == 0
