"""A llama.cpp context with the graph patch in it."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import llama_cpp
import numpy as np
import numpy.typing as npt

from cmg_gguf import _core
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.errors import BackendError, ContextLengthError, UnsupportedError
from cmg_gguf.llama.about import free_memory
from cmg_gguf.llama.cache_size import too_large
from cmg_gguf.llama.chunks import image_positions
from cmg_gguf.llama.log import captured_errors
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.owned import making
from cmg_gguf.prompt.segments import ImageSegment

CACHE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "bf16": 30,
}

DEFAULT_N_UBATCH = 512

NO_SEQ = -1


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """How a context is made. Names and meanings are llama.cpp's.

    n_ctx: KV cells; 0 = the model's training context. n_ubatch: rows of one decode, at most; None =
    512, or what a picture needs that the model decodes at once, see `Projector.rows_at_once`.
    n_threads: 0 = llama.cpp's own default of 4. flash_attn: None = where the backend has it.
    type_k, type_v: cache types, one of f32 f16 bf16 q8_0 q5_1 q5_0 q4_1 q4_0. base: a
    llama_context_params that everything not named here is taken from (RoPE scaling, ...).
    """

    n_ctx: int = 4096
    n_ubatch: int | None = None
    n_threads: int = 0
    flash_attn: bool | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    offload_kqv: bool = True
    base: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, low, high in (("n_ctx", 0, 2**31 - 1), ("n_ubatch", 8, 65536)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UnsupportedError(f"{name}={value} is out of range: {low} to {high}")
        for name in ("type_k", "type_v"):
            if getattr(self, name) not in CACHE_TYPES:
                raise UnsupportedError(
                    f"{name}={getattr(self, name)!r} is no cache type: "
                    f"one of {', '.join(CACHE_TYPES)}"
                )

    @classmethod
    def from_params(cls, params: Any) -> ContextOptions:
        """The same options as a `llama_context_params` has; an n_ubatch of 512, its default, as
        None. Raises UnsupportedError."""
        names = {number: name for name, number in CACHE_TYPES.items()}
        if params.type_k not in names or params.type_v not in names:
            raise UnsupportedError(
                f"cache types {params.type_k} and {params.type_v} are not both known: "
                f"one of {', '.join(CACHE_TYPES)}"
            )
        return cls(
            n_ctx=params.n_ctx,
            n_ubatch=None if params.n_ubatch == DEFAULT_N_UBATCH else params.n_ubatch,
            n_threads=params.n_threads,
            flash_attn={0: False, 1: True}.get(params.flash_attn_type),
            type_k=names[params.type_k],
            type_v=names[params.type_v],
            offload_kqv=params.offload_kqv,
            base=params,
        )


_init = making(llama_cpp.llama_init_from_model, llama_cpp.llama_free)


class LlamaContext:
    """llama.cpp's context, behind `cmg_gguf.engine.context.Context`."""

    def __init__(
        self,
        model: Model,
        options: ContextOptions,
        *,
        n_seq_max: int,
    ) -> None:
        """n_seq_max: sequences for answers and kept prompts.

        Raises BackendError if llama.cpp refuses the options or has no memory for them.
        """
        self.model = model
        self.n_layer = model.n_layer
        self.attention_layers = model.attention_layers
        self.n_vocab = model.n_vocab
        self.has_state = model.has_recurrent_layers
        # llama.cpp cuts rows with a state into graphs of as many rows of each sequence.
        self.merges = not self.has_state
        self.spare_seq = n_seq_max if self.merges else NO_SEQ
        self.n_seq_max = n_seq_max + self.merges
        threads = options.n_threads or usable_threads()
        self.patch = _core.GraphPatch(model.n_layer, threads)
        self._told_of_host = False
        params = _context_params(options, self.n_seq_max)
        params.cb_eval = ctypes.cast(
            self.patch.callback, llama_cpp.ggml_backend_sched_eval_callback
        )
        params.cb_eval_user_data = self.patch.user_data
        obstacle = too_large(model, params)
        with captured_errors() as errors:
            made = None if obstacle else _init(model.handle, params)
        if not made:
            reason = obstacle or (errors[0] if errors else "no reason given")
            if free := free_memory():
                reason += f"; {free}; if it does not fit, lower n_ctx, n_ubatch or n_gpu_layers"
            raise BackendError(f"llama.cpp cannot make a context with {options}: {reason}")
        made.hold(self, self.patch, model.keepalive)
        self._owned = made
        self.handle = made.pointer
        self.n_ctx: int = llama_cpp.llama_n_ctx(self.handle)
        self.n_ubatch: int = llama_cpp.llama_n_ubatch(self.handle)
        self._memory = llama_cpp.llama_get_memory(self.handle)
        self._batch = _Batch(self.n_ubatch)

    def close(self) -> None:
        """Frees the KV cache and the compute buffers."""
        self._owned.close()

    def decode(
        self,
        tokens: IntArray,
        positions: IntArray,
        seqs: IntArray,
        *,
        outputs: npt.NDArray[np.bool_],
        plan: _core.Plan | None,
    ) -> None:
        """See `Context.decode`. Raises BackendError; ContextLengthError if full."""
        self._check_open()
        self._batch.fill(tokens, positions, seqs, outputs)
        # Of rows behind a picture whose rows share positions, a state's cells warn.
        with self._patched(plan), captured_errors() if self.has_state else nullcontext():
            code = llama_cpp.llama_decode(self.handle, self._batch.struct)
            _check(code, f"{len(tokens)} rows", self.n_ctx)

    def decode_image(
        self,
        image: ImageSegment,
        position: int,
        seq: int,
        plan: _core.Plan | None,
        *,
        first: int = 0,
        n_rows: int | None = None,
    ) -> None:
        """See `Context.decode_image`."""
        self._check_open()
        n = image.n_tokens - first if n_rows is None else n_rows
        if image.embd is None:
            raise BackendError("the image has not been encoded; call Projector.encode first")
        if n > self.n_ubatch or (image.non_causal and n < image.n_tokens):
            raise BackendError(f"{n} of an image's {image.n_tokens} rows, in {self.n_ubatch}")
        rows = image.embd[first : first + n]
        positions = image_positions(image.chunk, position, shared=image.shares_positions)
        self._batch.fill_image(rows, positions[:, first : first + n], seq)
        try:  # an interrupt must not leave the rows to come without their order
            llama_cpp.llama_set_causal_attn(self.handle, not image.non_causal)
            with self._patched(plan), captured_errors():
                code = llama_cpp.llama_decode(self.handle, self._batch.image)
                _check(code, f"{n} rows of an image", self.n_ctx)
        finally:
            llama_cpp.llama_set_causal_attn(self.handle, True)

    def logits_address(self, row: int) -> int:
        """See `Context.logits_address`."""
        self._check_open()
        pointer = llama_cpp.llama_get_logits_ith(self.handle, row)
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        if not address:
            raise BackendError(f"batch row {row} has no logits")
        return address

    def share(self, source: int, target: int, n_pos: int) -> None:
        """See `Context.share`. Metadata only: no KV cell is copied, and a state when it is next
        written. Raises BackendError where the state of `source` stands elsewhere."""
        self._check_open()
        newest = llama_cpp.llama_memory_seq_pos_max(self._memory, source)
        if self.has_state and 0 < n_pos <= newest:
            raise BackendError(f"sequence {source} stands behind {newest}, not at {n_pos}")
        llama_cpp.llama_memory_seq_rm(self._memory, target, -1, -1)
        if n_pos > 0:
            llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, n_pos)

    def share_more(self, source: int, target: int, start: int, stop: int) -> None:
        """See `Context.share_more`. Metadata only."""
        self._check_open()
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, start, stop)

    def set_aside(self, source: int, target: int) -> None:
        """See `Context.set_aside`."""
        self._check_open()
        llama_cpp.llama_memory_seq_rm(self._memory, target, -1, -1)
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, 0)  # rows of no position

    def take_state(self, source: int, target: int, n_pos: int) -> None:
        """See `Context.take_state`."""
        self._check_open()
        newest = llama_cpp.llama_memory_seq_pos_min(self._memory, source)
        # Where positions may leap (M-RoPE), a state may stay behind.
        if newest >= 0 and not self.model.positions_leap:
            shift = n_pos - 1 - newest
            llama_cpp.llama_memory_seq_add(self._memory, source, newest, newest + 1, shift)
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, 0)
        llama_cpp.llama_memory_seq_rm(self._memory, source, -1, -1)

    def truncate(self, seq: int, n_pos: int) -> None:
        """See `Context.truncate`. Nothing is left to drop after `close`."""
        if not self._owned:
            return
        if not llama_cpp.llama_memory_seq_rm(self._memory, seq, n_pos if n_pos else -1, -1):
            raise BackendError(f"sequence {seq} cannot be cut back to {n_pos} positions")

    def is_whole(self, seq: int) -> bool:
        """See `Context.is_whole`."""
        self._check_open()
        first: int = llama_cpp.llama_memory_seq_pos_min(self._memory, seq)
        # A state has but its newest position, and hides what a window let go: see `opening`.
        return first >= 0 if self.has_state else first == 0

    def _check_open(self) -> None:
        if not self._owned:
            raise BackendError("this context is closed; make a new one")

    @contextmanager
    def _patched(self, plan: _core.Plan | None) -> Iterator[None]:
        if plan is None:
            yield
            return
        try:  # from the first to the last: a plan that an interrupt left behind would mask others
            with _patch_errors():
                self.patch.begin(plan)
            yield
            with _patch_errors():
                self.patch.end()
        except BaseException:
            self.patch.abandon()
            raise
        self._tell_of_host()

    def _tell_of_host(self) -> None:
        if (reason := self.patch.host_reason) and not self._told_of_host:
            self._told_of_host = True
            warnings.warn(
                f"{reason}: keys are copied to the host to see what rows attend to, which is slow; "
                "another cache type (type_k) may be computed there",
                stacklevel=2,
            )


def usable_threads() -> int:
    """How many threads to compute with: all CPUs we may use up to 4, else half of them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable if usable is not None and usable <= 4 else (usable or 2) // 2


@contextmanager
def _patch_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, IndexError) as exc:
        raise BackendError(f"the graph cannot be patched: {exc}") from exc


class _Batch:
    """llama_batches of one sequence a row, over arrays that are allocated once. struct: of tokens.
    image: of embeddings."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._token, self._pos, self._seq = np.zeros((3, capacity), np.int32)
        self._n_seq = np.ones(capacity, np.int32)
        self._logits = np.zeros(capacity, np.int8)
        addresses = self._seq.ctypes.data + self._seq.itemsize * np.arange(capacity, dtype=np.int64)
        self._seq_of_row = addresses.astype(np.uintp)
        self.struct = llama_cpp.llama_batch(
            token=_pointer(self._token, llama_cpp.llama_token),
            pos=_pointer(self._pos, llama_cpp.llama_pos),
            n_seq_id=_pointer(self._n_seq, ctypes.c_int32),
            seq_id=_pointer(self._seq_of_row, ctypes.POINTER(llama_cpp.llama_seq_id)),
            logits=_pointer(self._logits, ctypes.c_int8),
        )
        self.image = llama_cpp.llama_batch.from_buffer_copy(self.struct)
        self.image.token = None

    def fill(
        self,
        tokens: IntArray,
        positions: IntArray,
        seqs: IntArray,
        outputs: npt.NDArray[np.bool_],
    ) -> None:
        n = len(tokens)
        if not 0 < n <= self._capacity:
            raise BackendError(
                f"a batch of {n} rows: 1 to {self._capacity} (n_ubatch) are possible"
            )
        self.struct.n_tokens = n
        self._token[:n] = tokens
        self._pos[:n] = positions
        self._logits[:n] = outputs
        self._seq[:n] = seqs

    def fill_image(self, rows: FloatArray, positions: IntArray, seq: int) -> None:
        """rows: (n, n_embd) of an image. positions: (1 or 4, n), as RoPE takes them."""
        self._rows = np.ascontiguousarray(rows, np.float32)
        self._positions = np.ascontiguousarray(positions, np.int32)
        self.image.n_tokens = n = len(rows)
        self.image.embd = _pointer(self._rows, ctypes.c_float)
        self.image.pos = _pointer(self._positions, llama_cpp.llama_pos)
        self._logits[:n] = False
        self._seq[:n] = seq


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _context_params(options: ContextOptions, n_seq_max: int) -> Any:
    params = llama_cpp.llama_context_default_params()
    if options.base is not None:
        params = llama_cpp.llama_context_params.from_buffer_copy(options.base)
        params.embeddings = False
        params.n_samplers, params.samplers = 0, None
    params.n_ctx = options.n_ctx
    # Every decode is one micro-batch, so a row of the batch is a row of the graph.
    params.n_batch = params.n_ubatch = options.n_ubatch or DEFAULT_N_UBATCH
    params.n_seq_max = n_seq_max
    # llama.cpp reserves an output for each sequence, and aborts where a batch holds fewer rows.
    params.n_outputs_max = max(params.n_batch, n_seq_max)
    params.kv_unified = True
    # Without the full cache, a windowed layer has cells for about the window and a micro-batch: an
    # image that both branches share fills it, and a kept prompt that is longer is lost.
    params.swa_full = True
    if options.n_threads > 0:
        params.n_threads = params.n_threads_batch = options.n_threads
    flash: dict[bool | None, Literal[-1, 0, 1]] = {None: -1, False: 0, True: 1}
    params.flash_attn_type = flash[options.flash_attn]
    params.type_k = CACHE_TYPES[options.type_k]
    params.type_v = CACHE_TYPES[options.type_v]
    params.offload_kqv = options.offload_kqv
    params.no_perf = True
    return params


def _check(code: int, what: str, n_ctx: int) -> None:
    if code == 1:
        raise ContextLengthError(f"no room for {what}: all {n_ctx} KV cells are taken; raise n_ctx")
    if code != 0:
        raise BackendError(f"llama.cpp could not decode {what}: code {code}")
