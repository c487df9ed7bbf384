"""One decode for the batches of several sessions, and what came of each.

    for group in together(batches):        # those that can share a decode
        came = decoder.decode(group, 0)    # of each: Decoded, or the error that it met

A decode that fails is made again for each of its batches alone, so that an error reaches the one
session that it belongs to.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeAlias

import numpy as np

from cmg_gguf.arrays import FloatArray
from cmg_gguf.engine.batch import Batch, Decoded, ImageBatch
from cmg_gguf.engine.context import Context
from cmg_gguf.engine.merge import Merged, go_together, single_plan
from cmg_gguf.engine.steps import Filling
from cmg_gguf.errors import BackendError, ContextLengthError

Failure: TypeAlias = BackendError | ContextLengthError


def together(batches: Sequence[Batch | ImageBatch]) -> list[list[int]]:
    """Groups of batches, by index, that may share a decode. In order; an image is by itself."""
    groups: list[list[int]] = []
    texts: list[list[Batch]] = []
    for i, batch in enumerate(batches):
        if isinstance(batch, ImageBatch):
            groups.append([i])
            texts.append([])
            continue
        for group, others in zip(groups, texts, strict=True):
            if others and go_together([*others, batch]):
                group.append(i)
                others.append(batch)
                break
        else:
            groups.append([i])
            texts.append([batch])
    return groups


class Decoder:
    """Decodes groups of batches."""

    def __init__(self, filling: Filling) -> None:
        self._filling = filling

    def decode(self, batches: Sequence[Batch | ImageBatch], n_free: int) -> list[Decoded | Failure]:
        """What came of batches that go together. n_free: KV cells that a decode may be filled up
        with."""
        try:
            if len(batches) == 1 and isinstance(image := batches[0], ImageBatch):
                return [_decoded_image(image)]
            return list(self._decoded([b for b in batches if isinstance(b, Batch)], n_free))
        except (BackendError, ContextLengthError) as exc:
            for batch in batches:
                _drop(batch)
            if len(batches) == 1:
                return [exc]
            return [came for batch in batches for came in self.decode([batch], 0)]
        except BaseException:
            for batch in batches:
                _drop(batch)
            raise

    def _decoded(self, batches: Sequence[Batch], n_free: int) -> Sequence[Decoded]:
        context = batches[0].context
        n_padding = 0
        n_rows, n_below = sum(b.n_rows for b in batches), sum(b.n_below for b in batches)
        if n_free > 0 and context.merges:
            n_padding = self._filling.n_padding(n_below, n_rows)
            if n_padding > n_free or n_rows + n_padding > context.n_ubatch:
                n_padding = 0
        merged = Merged(batches, n_padding, context.spare_seq)
        started = time.perf_counter()
        try:
            context.decode(
                merged.tokens,
                merged.positions,
                merged.seqs,
                outputs=merged.outputs,
                plan=merged.plan,
            )
        finally:
            if n_padding:
                context.truncate(context.spare_seq, 0)
        seconds = time.perf_counter() - started
        self._filling.took(merged.n_below, merged.n_rows, seconds)
        told = seconds if len(batches) == 1 else None
        return [
            Decoded(tuple(_logits(context, row) for row in merged.wanted(i)), told)
            for i in range(len(batches))
        ]


def _decoded_image(batch: ImageBatch) -> Decoded:
    started = time.perf_counter()
    seq = batch.branch.seq
    batch.context.decode_image(
        batch.image,
        batch.position,
        seq,
        single_plan(batch.plan, seq),
        first=batch.first,
        n_rows=batch.n_rows,
    )
    return Decoded((), time.perf_counter() - started)


def _drop(batch: Batch | ImageBatch) -> None:
    """Drops what a failed decode may have written. A recurrent state cannot be cut back."""
    if isinstance(batch, ImageBatch):
        return  # its session is of no use without the image's first rows, and ends
    firsts: dict[int, int] = {}
    for seq, position in zip(batch.seqs.tolist(), batch.positions.tolist(), strict=True):
        firsts[seq] = min(position, firsts.get(seq, position))
    for seq, position in firsts.items():
        with suppress(BackendError):
            batch.context.truncate(seq, position)


def _logits(context: Context, row: int) -> FloatArray:
    address = context.logits_address(row)
    view = (ctypes.c_float * context.n_vocab).from_address(address)
    return np.array(view, np.float32)
