"""The judge of image encoders: CLIP as LLaVA uses it, InternVL's and CogVLM's, in float64.

embeddings(TinyEncoder(), pixels)   # (n_image_tokens, width)

Written from the papers and from what transformers runs (CogVLM's: from the code that comes with the
model), not from llama.cpp: the class token stands before the patches, has place 0, and is dropped
at the end.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from tiny_encoder import EPS, TinyEncoder, weights_of

F64 = NDArray[np.float64]
_erf = np.vectorize(math.erf, otypes=[np.float64])


def embeddings(encoder: TinyEncoder, pixels: NDArray[np.uint8]) -> F64:
    """(n_image_tokens, width) of a picture (image_size, image_size, 3)."""
    reader = _Encoder(encoder)
    if encoder.kind == "cogvlm":
        return reader.project_gated(reader.post_normed_layers(reader.rows(pixels))[1:])
    rows = reader.layers(reader.rows(pixels))[1:]
    return reader.project_shuffled(rows) if encoder.kind == "internvl" else reader.project(rows)


class _Encoder:
    def __init__(self, encoder: TinyEncoder) -> None:
        self.shape = encoder
        self.tensors = {name: t.astype(np.float64) for name, t in weights_of(encoder).items()}

    def rows(self, pixels: NDArray[np.uint8]) -> F64:
        """(1 + n_patches, n_embd): the class token, then the patches row by row, with places."""
        n, patch = self.shape.n_side, self.shape.patch_size
        x = (pixels.astype(np.float64) / 255 - 0.5) / 0.5
        patches = x.reshape(n, patch, n, patch, 3).transpose(0, 2, 4, 1, 3).reshape(n * n, -1)
        kernel = self.tensors["v.patch_embd.weight"].reshape(self.shape.n_embd, -1)
        embedded = patches @ kernel.T + self.tensors.get("v.patch_embd.bias", 0.0)
        rows = np.concatenate([self.tensors["v.class_embd"][None], embedded])
        rows = rows + self.tensors["v.position_embd.weight"]
        return self._norm("v.pre_ln", rows) if self.shape.kind == "clip" else rows

    def layers(self, rows: F64) -> F64:
        is_clip = self.shape.kind == "clip"
        up, down = ("ffn_down", "ffn_up") if is_clip else ("ffn_up", "ffn_down")
        activation = _quick_gelu if is_clip else _gelu
        for il in range(self.shape.n_layer):
            name = f"v.blk.{il}"
            attended = self._attention(name, self._norm(f"{name}.ln1", rows))
            rows = rows + attended * self._layer_scale(f"{name}.ls1")
            inner = activation(self._linear(f"{name}.{up}", self._norm(f"{name}.ln2", rows)))
            rows = rows + self._linear(f"{name}.{down}", inner) * self._layer_scale(f"{name}.ls2")
        return rows

    def post_normed_layers(self, rows: F64) -> F64:
        for il in range(self.shape.n_layer):
            name = f"v.blk.{il}"
            rows = rows + self._norm(f"{name}.ln1", self._attention(name, rows))
            inner = _gelu(self._linear(f"{name}.ffn_up", rows))
            rows = rows + self._norm(f"{name}.ln2", self._linear(f"{name}.ffn_down", inner))
        return rows

    def project(self, rows: F64) -> F64:
        return self._linear("mm.2", _gelu(self._linear("mm.0", rows)))

    def project_shuffled(self, rows: F64) -> F64:
        """Four patches of a square make one token: InternVL's pixel shuffle, version 2."""
        n, c = self.shape.n_side, self.shape.n_embd
        # x[w, h, c]: transformers calls the first dimension the width.
        x = rows.reshape(n, n // 2, 2 * c).transpose(1, 0, 2)
        x = x.reshape(n // 2, n // 2, 4 * c).transpose(1, 0, 2).reshape(-1, 4 * c)
        normed = self._norm("mm.model.mlp.0", x, eps=1e-5)
        return self._linear("mm.model.mlp.3", _gelu(self._linear("mm.model.mlp.1", normed)))

    def project_gated(self, rows: F64) -> F64:
        normed = self._norm("mm.post_fc_norm", self._linear("mm.model.fc", rows), eps=1e-5)
        x = _gelu(normed)
        inner = _silu(self._linear("mm.gate", x)) * self._linear("mm.up", x)
        first, last = self.tensors["v.boi"], self.tensors["v.eoi"]
        return np.concatenate([first[None], self._linear("mm.down", inner), last[None]])

    def _attention(self, name: str, rows: F64) -> F64:
        n_head = self.shape.n_head
        q, k, v = (part.reshape(len(rows), n_head, -1) for part in self._qkv(name, rows))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(len(rows), -1)
        return self._linear(f"{name}.attn_out", mixed)

    def _qkv(self, name: str, rows: F64) -> list[F64]:
        if f"{name}.attn_qkv.weight" in self.tensors:
            return np.split(self._linear(f"{name}.attn_qkv", rows), 3, axis=-1)
        return [self._linear(f"{name}.attn_{part}", rows) for part in "qkv"]

    def _layer_scale(self, name: str) -> F64 | float:
        return self.tensors.get(f"{name}.weight", 1.0)

    def _norm(self, name: str, rows: F64, eps: float | None = None) -> F64:
        eps = EPS[self.shape.kind] if eps is None else eps
        centred = rows - rows.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return np.asarray(unit * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"])

    def _linear(self, name: str, rows: F64) -> F64:
        bias = self.tensors.get(f"{name}.bias", 0.0)
        return np.asarray(rows @ self.tensors[f"{name}.weight"].T + bias)


def _gelu(x: F64) -> F64:
    return np.asarray(0.5 * x * (1 + _erf(x / math.sqrt(2))))


def _quick_gelu(x: F64) -> F64:
    return np.asarray(x / (1 + np.exp(-1.702 * x)))


def _silu(x: F64) -> F64:
    return np.asarray(x / (1 + np.exp(-x)))
