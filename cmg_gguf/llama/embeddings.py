"""Encoded images, kept for when their KV cells are gone but the picture is asked about again."""

from __future__ import annotations

from collections.abc import Hashable

from cmg_gguf.arrays import FloatArray


class Embeddings:
    """Rows of encoded images by key, at most `max_bytes` of them, the latest used."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._rows: dict[Hashable, FloatArray] = {}  # oldest first
        self.n_found = self.n_missed = 0
        """How often `get` found an image, and how often not."""

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is kept."""
        return self._n_bytes

    def get(self, key: Hashable) -> FloatArray | None:
        """(n_tokens, n_embd) float32, not to be written to; None if it is not kept."""
        if key not in self._rows:
            self.n_missed += 1
            return None
        self.n_found += 1
        self._rows[key] = rows = self._rows.pop(key)
        return rows

    def put(self, key: Hashable, rows: FloatArray) -> None:
        """Keeps the rows of an image, unless its key is None or they are too many."""
        if key is None or rows.nbytes > self._max_bytes:
            return
        self._take(key)
        while self._n_bytes + rows.nbytes > self._max_bytes:
            self._take(next(iter(self._rows)))
        rows.flags.writeable = False
        self._rows[key] = rows
        self._n_bytes += rows.nbytes

    def clear(self) -> None:
        """Keeps nothing any more."""
        self._rows.clear()
        self._n_bytes = 0

    def _take(self, key: Hashable) -> None:
        if key in self._rows:
            self._n_bytes -= self._rows.pop(key).nbytes
