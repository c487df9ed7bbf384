"""A context without a model, and an engine on it: what `PairedEngine` asks for, by the rules.

rig = Rig()
rig.asked(PROMPT, Guidance())  # [("decode", tokens, positions, sequences), ...]
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from stepped import PairedEngine

from cmg_gguf import _core
from cmg_gguf.arrays import IntArray
from cmg_gguf.engine.context import Branch, Context
from cmg_gguf.engine.prefix_cache import PrefixCache
from cmg_gguf.errors import BackendError
from cmg_gguf.prompt.segments import ImageSegment, Prompt, TextSegment

N_LAYER, N_VOCAB = 4, 6
Call = tuple[Any, ...]
Pairing = Literal["pair", "contexts"]


@dataclass
class Fuse:
    """Makes the call that comes after `left` others fail; None = never."""

    left: int | None = None

    def burn(self) -> None:
        if self.left == 0:
            raise BackendError("the fake was told to fail")
        if self.left is not None:
            self.left -= 1


class FakePatch:
    """Counts image tokens as the real patch does."""

    def __init__(self) -> None:
        self.n_image_tokens: dict[int, int] = {}

    def fork_obstacle(self, layer: int, *, shrinks: bool) -> str:
        return "a fake has no graph"

    def copy_image_tokens(self, src: int, dst: int, n_tokens: int) -> None:
        assert n_tokens <= self.n_image_tokens.get(src, 0)
        self.n_image_tokens[dst] = n_tokens

    def truncate_image_tokens(self, seq: int, n_tokens: int) -> None:
        self.n_image_tokens[seq] = min(n_tokens, self.n_image_tokens.get(seq, 0))


class FakeContext:
    """A KV cache by its rules: cells are shared or taken, positions follow one another.

    Logits are those of the last decode only: row r of it has `position + 1000 * seq` throughout.
    """

    def __init__(self, fuse: Fuse, *, n_ctx: int = 100, n_ubatch: int = 8) -> None:
        self.n_ctx, self.n_ubatch = n_ctx, n_ubatch
        self.n_layer, self.n_vocab = N_LAYER, N_VOCAB
        self.attention_layers = tuple(range(N_LAYER))
        self.merges, self.has_state, self.spare_seq = True, False, 99
        self.patch = cast(_core.GraphPatch, FakePatch())
        self.calls: list[Call] = []
        self._fuse = fuse
        self._cells: dict[int, dict[int, set[int]]] = {}
        self._n_cells_ever = 0
        self._logits = np.zeros((n_ubatch, N_VOCAB), np.float32)
        self._outputs = np.zeros(n_ubatch, bool)

    @property
    def n_used(self) -> int:
        """KV cells that hold something."""
        return len({c for seq in self._cells.values() for cells in seq.values() for c in cells})

    def decode(
        self,
        tokens: IntArray,
        positions: IntArray,
        seqs: IntArray,
        *,
        outputs: npt.NDArray[np.bool_],
        plan: _core.Plan | None,
    ) -> None:
        self._log("decode", tokens.tolist(), positions.tolist(), seqs.tolist())
        assert 0 < len(tokens) <= self.n_ubatch
        for seq, position in zip(seqs.tolist(), positions.tolist(), strict=True):
            self._take(seq, position, 1)
        self._outputs[:] = False
        self._outputs[: len(tokens)] = outputs
        self._logits[: len(tokens)] = (positions + 1000 * seqs)[:, np.newaxis]

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
        n = image.n_tokens if n_rows is None else n_rows
        assert n <= self.n_ubatch
        self._log("decode_image", n, position, seq)
        if image.n_pos == image.n_tokens:
            for i in range(first, first + n):
                self._take(seq, position + i, 1)
        else:
            for i in range(image.n_pos) if first == 0 else ():
                self._take(seq, position + i, image.n_tokens if i == 0 else 0)
        counts = cast(FakePatch, self.patch).n_image_tokens
        counts[seq] = counts.get(seq, 0) + n
        self._outputs[:] = False

    def logits_address(self, row: int) -> int:
        assert self._outputs[row], f"row {row} was decoded without logits"
        return int(self._logits[row].ctypes.data)

    def share(self, source: int, target: int, n_pos: int) -> None:
        self._log("share", source, target, n_pos)
        self._cells[target] = {p: c for p, c in self._cells[source].items() if p < n_pos}

    def share_more(self, source: int, target: int, start: int, stop: int) -> None:
        self._log("share_more", source, target, start, stop)
        held = self._cells[source]
        self._cells[target] |= {p: held[p] for p in range(start, stop)}

    def truncate(self, seq: int, n_pos: int) -> None:
        self.calls.append(("truncate", seq, n_pos))
        self._cells[seq] = {p: c for p, c in self._cells.get(seq, {}).items() if p < n_pos}

    def is_whole(self, seq: int) -> bool:
        return 0 in self._cells.get(seq, {})

    def _log(self, *call: Any) -> None:
        self.calls.append(call)
        self._fuse.burn()

    def _take(self, seq: int, position: int, n_cells: int) -> None:
        held = self._cells.setdefault(seq, {})
        assert position == max(held, default=-1) + 1, f"position {position} of sequence {seq}"
        held[position] = set(range(self._n_cells_ever, self._n_cells_ever + n_cells))
        self._n_cells_ever += n_cells
        assert self.n_used <= self.n_ctx, "llama.cpp would have run out of cells"


class Rig:
    """An engine on fake contexts. n_slots, max_cells: what it may keep of past prompts."""

    def __init__(
        self,
        pairing: Pairing = "pair",
        seqs: tuple[int, int] = (0, 1),
        *,
        n_slots: int = 0,
        max_cells: int = 10**6,
        **settings: Any,
    ) -> None:
        self.fuse = Fuse()
        first = FakeContext(self.fuse, **settings)
        second = first if pairing == "pair" else FakeContext(self.fuse, **settings)
        self.contexts = [first, second]
        original, degraded = (
            Branch(cast(Context, c), s) for c, s in zip(self.contexts, seqs, strict=True)
        )
        slots = [(10 + i, 20 + i) for i in range(n_slots)]
        contexts = original.context, degraded.context
        prefixes = PrefixCache(contexts, slots, max_cells)
        self.engine = PairedEngine(original, degraded, prefixes=prefixes)
        self.forget()

    @property
    def calls(self) -> list[Call]:
        first, second = self.contexts
        return first.calls if second is first else first.calls + second.calls

    def forget(self) -> None:
        for context in self.contexts:
            context.calls.clear()

    def asked(self, *arguments: Any) -> list[Call]:
        """What `prefill` asks for, without the truncation before."""
        self.forget()
        self.engine.prefill(*arguments)
        return [call for call in self.calls if call[0] != "truncate"]


def prompt(*parts: int, n_pos: int | None = None) -> Prompt:
    """Text of n tokens for n > 0, an image of -n tokens for n < 0."""
    segments: list[TextSegment | ImageSegment] = []
    token = 0
    for n in parts:
        if n > 0:
            segments.append(TextSegment(np.arange(token, token + n, dtype=np.int32)))
            token += n
        else:
            segments.append(ImageSegment(-n, -n if n_pos is None else n_pos, False, None))
    return Prompt(tuple(segments))


PROMPT = prompt(3, -4, 2)
PROMPTS = [PROMPT, prompt(-4, 1), prompt(1, -4, 11, -3, 9), prompt(20, -2, -2, 1)]


def filled(address: int) -> float:
    """The one value of the row at `address`."""
    row = np.array((ctypes.c_float * N_VOCAB).from_address(address))
    assert (row == row[0]).all()
    return float(row[0])
