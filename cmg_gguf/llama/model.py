"""A loaded language model and its vocabulary."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

import cmg_gguf.llama.native  # noqa: F401  (binds _core before anything uses it)
from cmg_gguf import _core
from cmg_gguf.arrays import IntArray
from cmg_gguf.errors import ModelError
from cmg_gguf.llama.about import free_memory
from cmg_gguf.llama.header import read_architecture
from cmg_gguf.llama.layers import Shown, shown_layers
from cmg_gguf.llama.log import captured_errors
from cmg_gguf.llama.owned import Owned, making
from cmg_gguf.llama.placement import Placement
from cmg_gguf.llama.repacking import is_safe
from cmg_gguf.prompt.reasoning import MARKS
from cmg_gguf.prompt.specials import Specials

_load = making(llama_cpp.llama_model_load_from_file, llama_cpp.llama_model_free)


class Model:
    """Weights and vocabulary, shared by any number of contexts. Everything made from a model keeps
    it alive. What is asked of one that is closed raises ModelError."""

    def __init__(
        self,
        handle: Any,
        *,
        path: Path,
        owner: object,
        placement: Placement | None = None,
    ) -> None:
        """Wraps a loaded llama_model, which `owner` frees: an `Owned` is held here alone, anything
        else kept alive. placement: where it lies, if it is known."""
        self.path = path
        self.placement = placement
        self._handle, self._owner = handle, owner
        self._owned = owner if isinstance(owner, Owned) else None
        self._vocab = llama_cpp.llama_model_get_vocab(handle)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.n_layer: int = llama_cpp.llama_model_n_layer(handle)
        self.n_embd: int = llama_cpp.llama_model_n_embd_inp(handle)
        self.n_ctx_train: int = llama_cpp.llama_model_n_ctx_train(handle)
        self.size: int = llama_cpp.llama_model_size(handle)
        self.adds_bos: bool = llama_cpp.llama_vocab_get_add_bos(self._vocab)
        self._adds_eos: bool = llama_cpp.llama_vocab_get_add_eos(self._vocab)
        self.has_recurrent_layers: bool = llama_cpp.llama_model_is_recurrent(
            handle
        ) or llama_cpp.llama_model_is_hybrid(handle)
        self.positions_leap: bool = llama_cpp.llama_model_rope_type(handle) in (
            llama_cpp.LLAMA_ROPE_TYPE_MROPE,
            llama_cpp.LLAMA_ROPE_TYPE_IMROPE,
        )
        self.has_windows: bool = llama_cpp.llama_model_n_swa(handle) > 0
        self._token_bytes = functools.lru_cache(maxsize=65536)(
            functools.partial(_piece, self._vocab)
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        use_mmap: bool = True,
        progress: Callable[[float], None] | None = None,
        **placed: Any,
    ) -> Model:
        """Loads a GGUF language model. progress: called with 0 to 1; what it raises ends loading.
        placed: see `Placement`.

        Raises ModelError for a missing, damaged or swapped file, or one that a device has no room
        for; UnsupportedError for a placement that cannot be.
        """
        path = Path(path)
        if read_architecture(path, "model") in ("clip", "mmproj"):
            raise ModelError(
                f"{path} is an image projector (mmproj), not a language model; are the two files "
                "swapped?"
            )
        placement = Placement(**placed)
        params = llama_cpp.llama_model_default_params()
        kept = placement.fill(params)
        params.use_extra_bufts = is_safe()
        _set_mmap(params, use_mmap)
        report = _core.LoadProgress(progress or (lambda share: None))
        params.progress_callback = ctypes.cast(report.callback, llama_cpp.llama_progress_callback)
        params.progress_callback_user_data = report.user_data
        with captured_errors() as errors:
            made = _load(os.fsencode(path), params)
        del kept
        report.rethrow()
        if not made:
            raise ModelError(f"llama.cpp cannot load model file {path}: {_why(path, errors)}")
        model = cls(made.pointer, path=path, owner=made, placement=placement)
        made.hold(model)
        return model

    @property
    def handle(self) -> Any:
        """llama_model pointer."""
        self._check_open()
        return self._handle

    @property
    def vocab(self) -> Any:
        """llama_vocab pointer."""
        self._check_open()
        return self._vocab

    @property
    def keepalive(self) -> Model | None:
        """What must be kept by what is freed before the weights are.

        None with another owner, which may hold what is made from its model and would never be
        freed.
        """
        return self if self._owned is not None else None

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers that attend, ascending: all, but in a model with recurrent layers, where one token
        is decoded to see. Raises BackendError if that cannot be done."""
        if self.has_recurrent_layers:
            return self._shown.attending
        return tuple(range(self.n_layer))

    @property
    def state_bytes(self) -> int:
        """Memory that the recurrent layers take for one sequence, however long; 0 without such
        layers. Raises as `attention_layers` does."""
        return self._shown.state_bytes if self.has_recurrent_layers else 0

    @functools.cached_property
    def _shown(self) -> Shown:
        return shown_layers(self.handle, self.n_layer)

    def close(self) -> None:
        """Frees the weights. Nothing made from this model may be used afterwards."""
        if self._owned is not None:
            self._owned.close()

    def _check_open(self) -> None:
        if self._owned is not None and not self._owned:
            raise ModelError("this model is closed; open it again")

    def describe(self) -> str:
        """llama.cpp's one-line description, e.g. "llama 7B Q4_K - Medium"."""
        buffer = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    def metadata(self, key: str) -> str | None:
        """A metadata value as text, or None."""
        buffer = ctypes.create_string_buffer(1)
        name = key.encode()
        size = llama_cpp.llama_model_meta_val_str(self.handle, name, buffer, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        llama_cpp.llama_model_meta_val_str(self.handle, name, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    def chat_template(self) -> str | None:
        """The Jinja chat template in the file, or None."""
        template = llama_cpp.llama_model_chat_template(self.handle, None)
        return template.decode("utf-8", "replace") if template else None

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer (end of sequence, of turn, ...)."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def special_text(self, which: str) -> str:
        """Text of the "bos" or "eos" token; "" if the vocabulary has none."""
        token: int = getattr(llama_cpp, f"llama_vocab_{which}")(self.vocab)
        return (
            "" if token < 0 else _piece(self.vocab, token, special=True).decode("utf-8", "replace")
        )

    @functools.cached_property
    def specials(self) -> Specials:
        """The spellings of the vocabulary's control tokens, which no message may write."""
        wanted = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
        texts: dict[str, int] = {}
        for token in range(self.n_vocab):
            attributes = int(llama_cpp.llama_vocab_get_attr(self.vocab, token))
            if attributes & wanted:
                text = llama_cpp.llama_vocab_get_text(self.vocab, token)
                texts[text.decode("utf-8", "replace")] = attributes
        texts.pop("", None)
        return Specials(
            tuple(sorted(texts, key=len, reverse=True)),
            strip_before=_having(texts, llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP),
            strip_behind=_having(texts, llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP),
        )

    def tokenize(self, text: str, *, special: bool = False, add_bos: bool = False) -> IntArray:
        """(n,) int32 tokens of `text`. special: whether "</s>" in it means the special token."""
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        tokens = (llama_cpp.llama_token * room)()
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), tokens, room, add_bos, special)
        return np.array(tokens[: max(n, 0)], dtype=np.int32)

    @property
    def around(self) -> tuple[IntArray, IntArray]:
        """The tokens that the vocabulary puts before and behind a prompt, (0,) or (1,) int32."""
        bos = [llama_cpp.llama_vocab_bos(self.vocab)] * self.adds_bos
        eos = [llama_cpp.llama_vocab_eos(self.vocab)] * self._adds_eos
        return np.array(bos, np.int32), np.array(eos, np.int32)

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of a token, possibly part of a character; b"" for control tokens, but for
        those that mark reasoning."""
        self._check_open()
        return self._marks.get(token) or self._token_bytes(token)

    @functools.cached_property
    def _marks(self) -> dict[int, bytes]:
        """Control tokens that are marks of reasoning, and how they are spelled."""
        found: dict[int, bytes] = {}
        for mark in (*MARKS, *MARKS.values()):
            tokens = self.tokenize(mark, special=True)
            if len(tokens) == 1 and not self._token_bytes(int(tokens[0])):
                found[int(tokens[0])] = mark.encode()
        return found


def _set_mmap(params: Any, use_mmap: bool) -> None:
    if hasattr(params, "use_mmap"):  # llama-cpp-python before 0.3.35
        params.use_mmap = use_mmap
    else:
        params.load_mode = (
            llama_cpp.LLAMA_LOAD_MODE_MMAP if use_mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
        )


def _why(path: Path, errors: Sequence[str]) -> str:
    """Why a file could not be loaded; where there are devices, how much room they have."""
    reason = errors[0] if errors else "no reason given"
    free = free_memory()
    if not free:
        return reason
    return (
        f"{reason}; the file is of {path.stat().st_size / 1e9:.1f} GB, and {free}; if it does not "
        "fit, lower n_gpu_layers"
    )


def _having(texts: Mapping[str, int], attribute: int) -> frozenset[str]:
    return frozenset(text for text, attributes in texts.items() if attributes & attribute)


def _piece(vocab: Any, token: int, *, special: bool = False) -> bytes:
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special)
        if n >= 0:
            return buffer.raw[:n]
        size = -n
