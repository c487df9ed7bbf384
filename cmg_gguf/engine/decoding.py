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
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from cmg_gguf.arrays import FloatArray
from cmg_gguf.engine.batch import Batch, Decoded, ImageBatch
from cmg_gguf.engine.context import Branch, Context
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


@dataclass
class Counts:
    """What has been decoded. n_batches: one for each session in each decode. n_rows: those that
    fill small decodes up aside. n_degraded_rows: of these, the degraded branches'."""

    n_decodes: int = 0
    n_batches: int = 0
    n_rows: int = 0
    n_degraded_rows: int = 0


class Decoder:
    """Decodes groups of batches. degraded: the branches whose rows count as that."""

    def __init__(self, filling: Filling, degraded: Sequence[Branch] = ()) -> None:
        self.counts = Counts()
        self._filling = filling
        self._degraded = frozenset((id(branch.context), branch.seq) for branch in degraded)

    def decode(self, batches: Sequence[Batch | ImageBatch], n_free: int) -> list[Decoded | Failure]:
        """What came of batches that go together. n_free: KV cells that a decode may be filled up
        with."""
        try:
            if len(batches) == 1 and isinstance(image := batches[0], ImageBatch):
                came = [_decoded_image(image)]
            else:
                texts = [b for b in batches if isinstance(b, Batch)]
                came = list(self._decoded(texts, n_free))
            self._count(batches)
            return [*came]
        except (BackendError, ContextLengthError) as exc:
            for batch in batches:
                _drop(batch)
            if len(batches) == 1:
                return [exc]
            return [one for batch in batches for one in self.decode([batch], 0)]
        except BaseException:
            for batch in batches:
                _drop(batch)
            raise

    def _count(self, batches: Sequence[Batch | ImageBatch]) -> None:
        counts = self.counts
        counts.n_decodes += 1
        counts.n_batches += len(batches)
        for batch in batches:
            if isinstance(batch, ImageBatch):
                seqs = [batch.branch.seq] * batch.n_rows
            else:
                seqs = batch.seqs.tolist()
            context = id(batch.context)
            counts.n_rows += len(seqs)
            counts.n_degraded_rows += sum((context, seq) in self._degraded for seq in seqs)

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
