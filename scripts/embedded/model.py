"""The LLaVA in torch, operation for operation what llama.cpp computes from the exported files.

A CLIP-type ViT (quick-GELU, no class token), a two-layer projector (tanh-GELU), a llama language
model (interleaved RoPE, SwiGLU). Attention is written out: on CPUs torch's fused one is slower
backwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from embedded.data import LABELS
from embedded.sizes import IMAGE, N_PATCHES, PATCH, Size

EPS = 1e-5
ROPE_BASE = 10000.0


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q, k, v: (batch, heads, n, head_dim). mask: added to the scores."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, -1).to(v.dtype), v)


def heads(x: Tensor, n_head: int) -> Tensor:
    """(batch, n, d) -> (batch, heads, n, d / heads)."""
    return x.view(*x.shape[:2], n_head, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """The inverse of `heads`."""
    return x.transpose(1, 2).flatten(2)


class EncoderBlock(nn.Module):
    def __init__(self, d: int, n_head: int, n_ff: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln1, self.ln2 = nn.LayerNorm(d, eps=EPS), nn.LayerNorm(d, eps=EPS)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, n_ff), nn.Linear(n_ff, d)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        q, k, v = (heads(linear(y), self.n_head) for linear in (self.q, self.k, self.v))
        x = x + self.o(merged(attention(q, k, v)))
        y = self.up(self.ln2(x))
        return x + self.down(y * torch.sigmoid(1.702 * y))


class Encoder(nn.Module):
    """Pictures (batch, 112, 112, 3) uint8 -> features (batch, 64, v_embd)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        d = size.v_embd
        self.patch = nn.Linear(3 * PATCH * PATCH, d, bias=False)
        self.position = nn.Parameter(torch.randn(N_PATCHES, d) * 0.02)
        self.pre, self.post = nn.LayerNorm(d, eps=EPS), nn.LayerNorm(d, eps=EPS)
        self.blocks = nn.ModuleList(
            EncoderBlock(d, size.v_head, size.v_ff) for _ in range(size.v_layer)
        )

    def forward(self, pictures: Tensor) -> Tensor:
        n = IMAGE // PATCH
        x = (pictures.float() / 255 - 0.5) / 0.5
        x = x.view(-1, n, PATCH, n, PATCH, 3).permute(0, 1, 3, 5, 2, 4).flatten(3)
        x = self.pre(self.patch(x.flatten(1, 2)) + self.position)
        for block in self.blocks:
            x = block(x)
        return self.post(x)  # type: ignore[no-any-return]


class Heads(nn.Module):
    """What the encoder is pretrained with: class, colour and side of each patch; 0 = nothing."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(size.v_embd, len(w) + 1) for w in LABELS)

    def forward(self, features: Tensor) -> list[Tensor]:
        return [linear(features) for linear in self.linears]


class Projector(nn.Module):
    """Features -> image tokens (batch, 64, n_embd)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.first = nn.Linear(size.v_embd, size.n_hidden)
        self.second = nn.Linear(size.n_hidden, size.n_embd)

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.gelu(self.first(features), approximate="tanh")
        return self.second(hidden)  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.weight


class Block(nn.Module):
    def __init__(self, d: int, n_head: int, n_ff: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = RMSNorm(d), RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(d, n_ff, bias=False), nn.Linear(d, n_ff, bias=False)
        self.down = nn.Linear(n_ff, d, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        y = self.norm1(x)
        v = heads(self.v(y), self.n_head)
        q, k = (rotated(heads(w(y), self.n_head), turns).to(v.dtype) for w in (self.q, self.k))
        x = x + self.o(merged(attention(q, k, v, mask)))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))  # type: ignore[no-any-return]


def rotated(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on neighbouring pairs (llama's own order). x: (batch, heads, n, head_dim)."""
    cos, sin = turns
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class LanguageModel(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        d = size.n_embd
        self.embed = nn.Embedding(size.vocab, d)
        nn.init.normal_(self.embed.weight, std=0.05)
        self.blocks = nn.ModuleList(Block(d, size.n_head, size.n_ff) for _ in range(size.n_layer))
        self.norm = RMSNorm(d)
        self.out = nn.Linear(d, size.vocab, bias=False)
        half = d // size.n_head // 2
        rates = ROPE_BASE ** (-torch.arange(half).float() / half)
        self.register_buffer("rates", rates, persistent=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """x: (batch, n, n_embd). positions: (batch, n). mask: (batch, 1, n, n), added."""
        angles = positions[..., None].float() * self.rates
        turns = torch.cos(angles)[:, None], torch.sin(angles)[:, None]
        for block in self.blocks:
            x = block(x, turns, mask)
        return self.norm(x)  # type: ignore[no-any-return]


class Llava(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.encoder = Encoder(size)
        self.projector = Projector(size)
        self.lm = LanguageModel(size)
