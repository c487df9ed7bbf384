"""What is right: a float64 NumPy forward of a GGUF language model, and guided decoding on it.

Written from the formulas, with nothing from the package it judges, and slow on purpose: no KV
cache, no batches; every step computes the whole sequence again. For tests on tiny models.

    ref = Reference.load("llm.gguf")
    rows = np.concatenate([ref.embed([1, 300]), image_embeddings, ref.embed([301, 302])])
    is_image = np.array([False] * 2 + [True] * len(image_embeddings) + [False] * 2)
    steps = guided(ref, rows, is_image, 8, Policy(tokens=partial(top_ratio, ratio=0.5)))

Names of sizes: L layers, T rows (tokens), H heads, D head size, E n_embd, V n_vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

CONVOLUTION = "in_proj", "conv", "out_proj"
F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Hyper:
    """What the file says about the model's shape.

    `windows` (L,): positions that a layer sees, own included; 0 for all. `rope_bases` (L,).
    `attending` (L,): whether a layer attends; else it has a short convolution.
    `n_sharing`: the last layers, which read K and V of the two layers below them.
    """

    arch: str
    n_head: int
    n_head_kv: int
    head_dim: int
    norm_eps: float
    windows: tuple[int, ...]
    rope_bases: tuple[float, ...]
    attending: tuple[bool, ...]
    n_sharing: int = 0


@dataclass(frozen=True)
class Forward:
    """What one forward over T rows gives.

    `logits` (T, V). `attention` (L, T, T): query by key, the mean over heads, rows sum to 1.
    `hidden` (L + 1, T, E): the residual stream before layer 0 and after each layer.
    """

    logits: F64
    attention: F64
    hidden: F64


@dataclass(frozen=True)
class Reference:
    """A "llama", "gemma3", "gemma4" or "lfm2" language model in float64.

    Attributes:
        weights: the file's tensors by name, float64, matrices as (n_out, n_in).
    """

    hyper: Hyper
    weights: dict[str, F64]

    @classmethod
    def load(cls, path: Path | str) -> Reference:
        """The model in a GGUF file; quantised tensors are taken at their dequantised value.

        Raises ValueError if the architecture, or something the file asks for, is not known here.
        """
        reader = gguf.GGUFReader(path)
        tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        weights = {name: np.asarray(data, np.float64) for name, data in tensors.items()}
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return cls(_hyper(fields, weights), weights)

    def embed(self, tokens: Sequence[int]) -> F64:
        """(T, E) rows for token ids. "gemma3" scales them by sqrt(E), but not image embeddings."""
        rows = self.weights["token_embd.weight"][np.asarray(tokens, np.int64)]
        return rows * np.sqrt(rows.shape[1]) if self.hyper.arch.startswith("gemma") else rows

    def visible(self, n_rows: int) -> Mask:
        """(L, T, T) bool: does this query (axis 1) attend to this key in this layer?"""
        distance = np.arange(n_rows)[:, None] - np.arange(n_rows)[None, :]
        windows = [window or n_rows for window in self.hyper.windows]
        seen = np.stack([(distance >= 0) & (distance < window) for window in windows])
        return np.asarray(seen & np.array(self.hyper.attending)[:, None, None])

    def forward(self, x: F64, blocked: Mask | None = None, pictures: Mask | None = None) -> Forward:
        """One forward over x (T, E) at positions 0..T-1, causal and windowed.

        `blocked` (L, T, T) bool: more pairs of query and key that get -inf before the softmax.
        `pictures` (T,) bool: rows that no convolution of a row behind their picture looks at.
        Raises ValueError if a row has nothing left to attend to.
        """
        seen = self.visible(len(x)) & (True if blocked is None else ~blocked)
        if not seen[list(self.hyper.attending)].any(axis=2).all():
            raise ValueError("a row has all of its keys blocked")
        hidden, attention = [np.asarray(x, np.float64)], []
        for il in range(len(self.hyper.windows)):
            rows, weights = self._layer(il, hidden, seen[il], pictures)
            hidden.append(rows)
            attention.append(weights)
        return Forward(self._logits(hidden[-1]), np.stack(attention), np.stack(hidden))

    def _logits(self, x: F64) -> F64:
        w = self.weights.get("output.weight", self.weights["token_embd.weight"])
        name = "token_embd_norm" if self.hyper.arch == "lfm2" else "output_norm"
        return np.asarray(self._norm(x, name) @ w.T)

    def _layer(
        self, il: int, hidden: list[F64], seen: Mask, pictures: Mask | None
    ) -> tuple[F64, F64]:
        """The residual stream after layer `il`, (T, E), and its attention, (T, T)."""
        gemma = self.hyper.arch.startswith("gemma")
        x, source = hidden[-1], self._source(il)
        normed = self._norm(x, f"blk.{il}.attn_norm")
        if self.hyper.attending[il]:
            read = self._norm(hidden[source], f"blk.{source}.attn_norm")
            update, attention = self._attend(il, normed, read, seen)
        else:
            update, attention = self._convolve(il, normed, seen, pictures)
        x = x + (self._norm(update, f"blk.{il}.post_attention_norm") if gemma else update)
        update = self._feed_forward(il, self._norm(x, f"blk.{il}.ffn_norm"))
        x = x + (self._norm(update, f"blk.{il}.post_ffw_norm") if gemma else update)
        return x, attention

    def _source(self, il: int) -> int:
        """The layer whose K and V layer `il` reads: its own or, of two, the one windowed alike."""
        windows, first = self.hyper.windows, len(self.hyper.windows) - self.hyper.n_sharing
        return il if il < first else first - 2 if windows[il] else first - 1

    def _attend(self, il: int, x: F64, read: F64, seen: Mask) -> tuple[F64, F64]:
        hyper, w, source = self.hyper, self.weights, self._source(il)
        q = self._heads(x @ w[f"blk.{il}.attn_q.weight"].T, hyper.n_head)
        k = self._heads(read @ w[f"blk.{source}.attn_k.weight"].T, hyper.n_head_kv)
        v = self._heads(read @ w[f"blk.{source}.attn_v.weight"].T, hyper.n_head_kv)
        if hyper.arch != "llama":
            q, k = (
                self._norm(q, f"blk.{il}.attn_q_norm"),
                self._norm(k, f"blk.{source}.attn_k_norm"),
            )
        scale = 1.0 if hyper.arch == "gemma4" else hyper.head_dim**-0.5
        if hyper.arch == "gemma4":
            v = v / np.sqrt(np.mean(v * v, axis=-1, keepdims=True) + hyper.norm_eps)
        rotate = partial(rope, base=hyper.rope_bases[il], interleaved=hyper.arch == "llama")
        share = hyper.n_head // hyper.n_head_kv  # query heads h*share.. read key head h
        k, v = np.repeat(rotate(k), share, axis=0), np.repeat(v, share, axis=0)
        scores = rotate(q) @ k.transpose(0, 2, 1) * scale
        weights = softmax(np.where(seen, scores, -np.inf))
        mixed = (weights @ v).transpose(1, 0, 2).reshape(len(x), -1)
        return mixed @ w[f"blk.{il}.attn_output.weight"].T, weights.mean(axis=0)

    def _convolve(self, il: int, x: F64, seen: Mask, pictures: Mask | None) -> tuple[F64, F64]:
        """A gated convolution over the newest rows, and attention to none."""
        w = {name: self.weights[f"blk.{il}.shortconv.{name}.weight"] for name in CONVOLUTION}
        before, behind, values = np.split(x @ w["in_proj"].T, 3, axis=1)
        n = w["conv"].shape[1]
        padded = np.concatenate([np.zeros((n - 1, x.shape[1])), before * values])
        newest = _newest(np.zeros(len(x), np.bool_) if pictures is None else pictures, n)
        mixed = (padded[newest + n - 1] * w["conv"].T).sum(axis=1)
        return np.asarray((behind * mixed) @ w["out_proj"].T), np.zeros(seen.shape)

    def _heads(self, x: F64, n: int) -> F64:
        """(T, n * D) as (n, T, D)."""
        return np.swapaxes(x.reshape(len(x), n, self.hyper.head_dim), 0, 1)

    def _feed_forward(self, il: int, x: F64) -> F64:
        gate = x @ self.weights[f"blk.{il}.ffn_gate.weight"].T
        up = x @ self.weights[f"blk.{il}.ffn_up.weight"].T
        active = gelu(gate) if self.hyper.arch.startswith("gemma") else silu(gate)
        return np.asarray((active * up) @ self.weights[f"blk.{il}.ffn_down.weight"].T)

    def _norm(self, x: F64, name: str) -> F64:
        """RMSNorm over the last axis."""
        rms = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.hyper.norm_eps)
        return np.asarray(x / rms * self.weights[f"{name}.weight"])


def softmax(x: F64) -> F64:
    """The softmax over the last axis; -inf gives exactly 0."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def rope(x: F64, *, base: float, interleaved: bool) -> F64:
    """x (..., T, D) with row t rotated by t * base^(-2i/D) in the plane of its i-th pair.

    The pairs are (2i, 2i+1) if interleaved, else (i, i + D/2).
    """
    n_rows, n_dims = x.shape[-2:]
    half, last = n_dims // 2, -1 if interleaved else -2
    angle = np.outer(np.arange(n_rows), base ** (-np.arange(half) / half))
    pairs = x.reshape(*x.shape[:-1], *((half, 2) if interleaved else (2, half)))
    turned = (np.take(pairs, 0, last) + 1j * np.take(pairs, 1, last)) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], axis=last).reshape(x.shape)


def silu(x: F64) -> F64:
    """x * sigmoid(x)."""
    return np.asarray(x / (1.0 + np.exp(-x)))


def gelu(x: F64) -> F64:
    """GELU in its tanh form. ggml's CPU rounds it to float16 where |x| < 10, which is not done."""
    inner = np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)
    return np.asarray(0.5 * x * (1.0 + np.tanh(inner)))


def _hyper(fields: dict[str, Any], weights: dict[str, F64]) -> Hyper:
    arch = str(fields["general.architecture"])
    if arch not in ("llama", "gemma3", "gemma4", "lfm2"):
        raise ValueError(f"architecture {arch!r} is not known here: llama, gemma3, gemma4, lfm2")
    own = {k.removeprefix(f"{arch}."): v for k, v in fields.items() if k.startswith(f"{arch}.")}
    strange = [k for k in own if "scaling" in k or ("softcapping" in k and own[k]) or "expert" in k]
    strange += [
        k
        for k in weights
        if (k.startswith("rope_") and np.any(weights[k] != 1)) or k.endswith(".bias")
    ]
    n_head = int(own["attention.head_count"])
    head_dim = int(own.get("attention.key_length", own["embedding_length"] // n_head))
    if own.get("rope.dimension_count", head_dim) != head_dim:
        strange.append("RoPE on a part of the head")
    if strange:
        raise ValueError(f"not computed here: {', '.join(strange)}")
    windows = _windows(own)
    counts = np.broadcast_to(own.get("attention.head_count_kv", n_head), len(windows))
    base = float(own.get("rope.freq_base", 10000.0))
    window_base = float(own.get("rope.freq_base_swa", 10000.0))
    return Hyper(
        arch=arch,
        n_head=n_head,
        n_head_kv=int(counts.max()),
        head_dim=head_dim,
        norm_eps=float(own["attention.layer_norm_rms_epsilon"]),
        windows=windows,
        rope_bases=tuple(window_base if window else base for window in windows),
        attending=tuple(bool(n) for n in counts),
        n_sharing=int(own.get("attention.shared_kv_layers", 0)),
    )


def _windows(own: dict[str, Any]) -> tuple[int, ...]:
    """Of every `pattern` layers the last is global; or a flag for each says which are windowed."""
    window, n_layer = int(own.get("attention.sliding_window", 0)), int(own["block_count"])
    pattern = own.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, int):
        pattern = [il % pattern < pattern - 1 for il in range(n_layer)]
    return tuple(window if windowed else 0 for windowed in pattern)


def top_ratio(f: F64, *, ratio: float) -> Mask:
    """(n,) bool: the k = floor(ratio * n + 0.5) largest of f, but 1 if ratio > 0.

    Ties go to the lower index.
    """
    k = int(np.floor(ratio * len(f) + 0.5))
    return _largest(f, max(k, 1) if ratio > 0 else k)


def mean_std(f: F64, *, lam: float) -> Mask:
    """(n,) bool: f > mean + lam * std, strictly, with the population's standard deviation."""
    if len(f) == 0:
        return np.zeros(0, np.bool_)
    return np.asarray(f > f.mean() + lam * f.std())


def cumulative_mass(f: F64, *, mass: float) -> Mask:
    """(n,) bool: the smallest k for which the k largest of f sum to at least mass * sum(f).

    Ties go to the lower index. f is not negative; mass is in [0, 1], and 0 takes nothing.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.sort(f)[::-1])])
    return _largest(f, int(np.argmax(sums >= mass * sums[-1])))


def _largest(f: F64, k: int) -> Mask:
    return np.isin(np.arange(len(f)), np.argsort(-f, kind="stable")[:k])


class LayerEvidence(NamedTuple):
    """What a layer policy sees of the original branch at the last prompt row.

    `mass` (L,): the influence of all image tokens together.
    `cosine` (L,): cosine similarity of the residual stream before and after the layer; inf where
    the layer does not attend, and nothing can be masked.
    """

    mass: F64
    cosine: F64


def explicit_layers(evidence: LayerEvidence, *, layers: Sequence[int]) -> Mask:
    """(L,) bool: the layers named."""
    return np.isin(np.arange(len(evidence.mass)), layers)


def layer_range(evidence: LayerEvidence, *, start: float = 0.0, stop: float = 1.0) -> Mask:
    """(L,) bool: of layers floor(start * L + 0.5) up to but without floor(stop * L + 0.5) those
    that attend."""
    n_layer = len(evidence.mass)
    first, last = np.floor(np.array([start, stop]) * n_layer + 0.5)
    layers = explicit_layers(evidence, layers=range(int(first), int(last)))
    return np.asarray(layers & np.isfinite(evidence.cosine))


def attention_mass(evidence: LayerEvidence, *, gamma: float) -> Mask:
    """(L,) bool: layers by falling mass until they hold the share gamma; ties to the lower."""
    return cumulative_mass(evidence.mass, mass=gamma)


def lowest_cosine(evidence: LayerEvidence, *, share: float) -> Mask:
    """(L,) bool: of L layers that attend the max(1, floor(share * L + 0.5)) that turn the stream
    most."""
    n_layer = int(np.isfinite(evidence.cosine).sum())
    return _largest(-evidence.cosine, max(1, int(np.floor(share * n_layer + 0.5))))


def combine(original: F64, degraded: F64, *, alpha: float, beta: float) -> F64:
    """(V,) original + alpha * (original - degraded), with -inf below max(original) + log(beta).

    beta = 0 cuts nothing.
    """
    score = original + alpha * (original - degraded)
    return np.where(original < original.max() + np.log(beta), -np.inf, score) if beta else score


def _newest(pictures: Mask, n: int) -> NDArray[np.int64]:
    """(T, n): the n newest rows that each row looks at, its own the last; below 0 = none. Rows of
    another picture are passed over."""
    found = []
    for t in range(len(pictures)):
        behind = np.flatnonzero(~pictures[: t + 1])
        start = behind[-1] + 1 if len(behind) else 0  # of the picture that t is in, if it is in one
        looked_at = [*behind, *range(start, t + 1)] if pictures[t] else behind.tolist()
        found.append([*range(1 - n, 0), *looked_at][-n:])
    return np.array(found)


@dataclass(frozen=True)
class Policy:
    """What is degraded, and how the two branches are put together.

    Attributes:
        tokens: which of a row's candidates are masked, from their influence (n,).
        layers: which layers are masked.
        scope: which query rows of the degraded branch are masked.
        refresh: are tokens chosen once from the prompt's last row, or anew for every row?
        alpha: the weight of the difference; 0 for the original branch alone.
        beta: the plausibility cut in [0, 1]; 0 for none.
        states: do convolutions of the degraded branch look at pictures from behind them?
    """

    tokens: Callable[[F64], Mask]
    layers: Callable[[LayerEvidence], Mask] = layer_range
    scope: Literal["decode", "question", "text", "all"] = "text"
    refresh: Literal["prompt", "step"] = "step"
    alpha: float = 1.0
    beta: float = 0.1
    states: Literal["read", "unread"] = "read"


class Step(NamedTuple):
    """Both branches' logits (V,) for the next token, and the token chosen."""

    original: F64
    degraded: F64
    token: int


def guided(
    ref: Reference,
    rows: F64,
    is_image: Mask,
    n_steps: int,
    policy: Policy,
    *,
    in_picture: Mask | None = None,
) -> list[Step]:
    """`n_steps` greedy steps of guided decoding after a prompt of rows (T, E), is_image (T,).

    in_picture (T,): image tokens and the text between the tiles of one picture; None = the former.

    Conventions:
    - Original branch: a plain causal forward over the prompt and the tokens generated so far.
      Degraded branch: the same forward over the same rows, with some pairs blocked.
    - Candidates of row t in layer l: the image tokens that t may attend to in that layer
      (causal, window), other than t itself. Influence: the attention weight from t to them in
      the ORIGINAL branch, averaged over heads.
    - Layers are chosen once, from the last prompt row. An image token's own weight on itself is
      no influence and does not count in a layer's mass.
    - Scope, the rows masked: "decode": the last prompt row and every generated row; "question":
      every row after the last row in a picture; "text": every row after the first image token
      that is not in a picture; "all": those too.
    - Refresh "prompt": tokens are chosen once in each layer, from the last prompt row, and the
      same are blocked for every masked row, but never a row's own key. Refresh "step": chosen
      for every masked row from that row's own influence.
    - The argmax of `combine(...)` is the next token of both branches. Nothing stops early.
    """
    n_prompt = len(rows)
    in_picture = is_image if in_picture is None else in_picture
    steps: list[Step] = []
    layers: Mask | None = None
    for _ in range(n_steps):
        plain = ref.forward(rows)
        influence = candidate_influence(ref, plain, is_image)
        if layers is None:
            layers = policy.layers(layer_evidence(plain, influence, n_prompt - 1))
        blocked = blocked_pairs(influence, in_picture, n_prompt, policy) & layers[:, None, None]
        passed = in_picture if policy.states == "unread" else None
        original, degraded = plain.logits[-1], ref.forward(rows, blocked, passed).logits[-1]
        score = combine(original, degraded, alpha=policy.alpha, beta=policy.beta)
        steps.append(Step(original, degraded, int(np.argmax(score))))
        rows = np.concatenate([rows, ref.embed([steps[-1].token])])
        is_image, in_picture = np.append(is_image, False), np.append(in_picture, False)
    return steps


def candidate_influence(ref: Reference, plain: Forward, is_image: Mask) -> F64:
    """(L, T, T) influence of each key on each query, NaN where the key is no candidate."""
    n_rows = len(is_image)
    candidates = ref.visible(n_rows) & is_image & ~np.eye(n_rows, dtype=np.bool_)
    return np.where(candidates, plain.attention, np.nan)


def layer_evidence(plain: Forward, influence: F64, row: int) -> LayerEvidence:
    """What the layer policies see at `row`."""
    before, after = plain.hidden[:-1, row], plain.hidden[1:, row]
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosine = (before * after).sum(axis=1) / lengths
    attends = plain.attention[:, row].any(axis=1)
    return LayerEvidence(np.nansum(influence[:, row], axis=1), np.where(attends, cosine, np.inf))


def masked_rows(in_picture: Mask, n_prompt: int, scope: str) -> Mask:
    """(T,) bool: the query rows that the scope masks."""
    after_image = np.cumsum(in_picture) > 0
    if scope == "all":
        return after_image
    if scope == "text":
        return np.asarray(after_image & ~in_picture)
    if scope == "question":
        return np.asarray(np.cumsum(in_picture[::-1])[::-1] == 0)
    if scope == "decode":
        return np.arange(len(in_picture)) >= n_prompt - 1
    raise ValueError(f"scope {scope!r} is none of decode, question, text, all")


def blocked_pairs(influence: F64, in_picture: Mask, n_prompt: int, policy: Policy) -> Mask:
    """(L, T, T) bool: what is blocked if every layer is masked."""
    blocked = np.zeros(influence.shape, np.bool_)
    for row in np.flatnonzero(masked_rows(in_picture, n_prompt, policy.scope)):
        source = n_prompt - 1 if policy.refresh == "prompt" else row
        for il in range(len(blocked)):
            blocked[il, row] = _choose(influence[il, source], policy.tokens)
        blocked[:, row, row] = False
    return blocked


def _choose(influence: F64, tokens: Callable[[F64], Mask]) -> Mask:
    """(T,) bool: the token policy applied to the candidates of one row."""
    candidates = np.flatnonzero(~np.isnan(influence))
    chosen = candidates[tokens(influence[candidates])]
    return np.isin(np.arange(len(influence)), chosen)
