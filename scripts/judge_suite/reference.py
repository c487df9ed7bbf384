"""The definition of guidance, run by transformers: whole sequences, no KV cache.

original   nothing is hidden; each masked row's attention over the image tokens is noted
degraded   in the masked layers, each masked row does not see the image tokens that the policy
           picks from what it attended to in the original (mean over heads)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from judge_suite.checkpoint import Floats

_NAME = "cmg_judge"


@dataclass
class _Pass:
    """What attention notes or hides while a forward runs. picked: layer -> row -> columns."""

    layers: tuple[int, ...] = ()
    is_image: NDArray[np.bool_] | None = None
    masked: Sequence[int] = ()
    ratio: float = 1.0
    hide: bool = False
    narrowest: float = np.inf
    picked: dict[int, dict[int, NDArray[np.int64]]] = field(default_factory=dict)


_now = _Pass()


class Judge:
    """transformers' model, its decoder under our attention, its picture embeddings exchangeable.

    seen: (n, n_embd) embeddings that its own image encoder gave last; with deepstack, those of the
    decoder's first layers stand behind them in each row. ours: what it is to use in
    their place; None = its own. narrowest: by how much, as a share of it, the last token chosen was
    ahead of the first that was not, anywhere in the newest `logits`.
    """

    def __init__(self, model: Any, text_model: Any) -> None:
        self.model = model
        self.seen: Floats | None = None
        self.ours: Floats | None = None
        self.narrowest = np.inf
        text_model.config._attn_implementation = _NAME
        for module in text_model.modules():
            if hasattr(module, "config") and hasattr(module, "layer_idx"):
                module.config._attn_implementation = _NAME
        # Llama 4 alone has its last step by itself, and no model within the model.
        self._inner = getattr(model, "model", model)
        owner = model.multi_modal_projector if self._inner is model else model.model
        name = "forward" if self._inner is model else "get_image_features"
        self._encode = getattr(owner, name)
        setattr(owner, name, self._features)

    @property
    def image_token(self) -> int:
        config = self.model.config
        token = getattr(config, "image_token_id", None)
        return int(config.image_token_index if token is None else token)

    def _features(self, *args: Any, **kwargs: Any) -> Any:
        out = self._encode(*args, **kwargs)
        streams = _streams(out)
        self.seen = np.concatenate([_flat(part) for part in streams], 1)
        if self.ours is None:
            return out
        rows = np.split(self.ours, len(streams), axis=1)
        return _exchanged(out, [_as(*pair) for pair in zip(streams, rows, strict=True)])

    def logits(
        self,
        ids: Sequence[int],
        is_image: NDArray[np.bool_],
        inputs: dict[str, Any],
        *,
        first: int,
        layers: tuple[int, ...] = (),
        masked: Sequence[int] = (),
        ratio: float = 1.0,
    ) -> tuple[Floats, Floats | None]:
        """(original, degraded), each (len(ids) - first, n_vocab); degraded is None without layers.

        inputs: the pictures, as the model's forward takes them. masked: rows of the sequence.
        """
        global _now
        forward = self._forward(ids, is_image, inputs)
        _now = _Pass(layers, is_image, masked, ratio)
        original = forward()[first:]
        if not layers:
            return original, None
        _now.hide = True
        degraded = forward()[first:]
        self.narrowest = _now.narrowest
        _now = _Pass()
        return original, degraded

    def _forward(
        self, ids: Sequence[int], is_image: NDArray[np.bool_], inputs: dict[str, Any]
    ) -> Callable[[], Floats]:
        tokens = torch.tensor([list(ids)])
        given = dict(inputs)
        takes = set(inspect.signature(self.model.forward).parameters)
        takes |= set(inspect.signature(self._inner.forward).parameters)
        for name in takes & {"mm_token_type_ids", "token_type_ids"}:
            given[name] = torch.from_numpy(is_image.astype(np.int64))[None]

        @torch.no_grad()
        def run() -> Floats:
            mask = torch.ones_like(tokens)
            out = self.model(input_ids=tokens, attention_mask=mask, use_cache=False, **given)
            logits: Floats = out.logits[0].float().numpy()
            return logits

        return run


def round_gelu_inplace(decoder: Any) -> None:
    """Puts llama.cpp's table (ggml_vec_gelu_f32) for GELU by tanh: F16 in, F16 out."""
    for module in decoder.modules():
        if type(getattr(module, "act_fn", None)).__name__ == "GELUTanh":
            module.act_fn = _TableGELU()


class _TableGELU(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        rounded = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x >= 10, x, torch.where(x <= -10, 0.0, rounded))


def _streams(out: Any) -> list[Any]:
    """What an encoder gives: the embeddings, and with deepstack what further layers of the decoder
    read, in their order."""
    deep = _deepstack(out)
    if _names_layers(deep):
        return [part for _, part in sorted(deep, key=lambda pair: int(pair[0]))]
    return [out.pooler_output if hasattr(out, "pooler_output") else out, *deep]


def _exchanged(out: Any, streams: list[Any]) -> Any:
    """`out` with others of them."""
    if not hasattr(out, "pooler_output"):
        return streams[0]
    deep = _deepstack(out)
    if _names_layers(deep):
        layers = sorted(layer for layer, _ in deep)
        out.deepstack_features = list(zip(layers, streams, strict=True))
        return out
    out.pooler_output = streams[0]
    if deep:
        out.deepstack_features = streams[1:]
    return out


def _deepstack(out: Any) -> list[Any]:
    return list(getattr(out, "deepstack_features", None) or [])


def _names_layers(deep: list[Any]) -> bool:
    """Granite alone says which layer reads what, of the first one too."""
    return bool(deep) and isinstance(deep[0][0], int)


def _flat(part: Any) -> Floats:
    """(n, n_embd): the rows of one tensor, or of one for each picture."""
    pieces = part if isinstance(part, (tuple, list)) else [part]
    return np.concatenate([p.reshape(-1, p.shape[-1]).float().numpy() for p in pieces])


def _as(part: Any, rows: Floats) -> Any:
    """`rows` in the shapes of `part`."""
    pieces = part if isinstance(part, (tuple, list)) else [part]
    ends = np.cumsum([piece.numel() // piece.shape[-1] for piece in pieces])[:-1]
    new = tuple(
        torch.from_numpy(np.ascontiguousarray(cut)).reshape(piece.shape).to(piece.dtype)
        for cut, piece in zip(np.split(rows, ends), pieces, strict=True)
    )
    return new if isinstance(part, (tuple, list)) else new[0]


def _attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any
) -> tuple[Any, Any]:
    il = module.layer_idx
    n_rep = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(n_rep, 1), value.repeat_interleave(n_rep, 1)
    scores = (query.double() @ key.double().transpose(2, 3)) * scaling
    if mask is None:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()[None, None]
    else:
        visible = mask if mask.dtype == torch.bool else mask > -1e30
    scores = scores.masked_fill(~visible, -torch.inf)
    if _now.hide and il in _now.layers:
        for row, columns in _now.picked[il].items():
            scores[:, :, row, torch.from_numpy(columns)] = -torch.inf
    weights = torch.softmax(scores, -1)
    if not _now.hide and il in _now.layers:
        mean = weights[0].mean(0).numpy()
        seen = visible[0, 0].numpy()
        _now.picked[il] = {row: _pick(mean[row], seen[row], row) for row in _now.masked}
    out = (weights @ value.double()).to(query.dtype)
    return out.transpose(1, 2).contiguous(), weights


def _pick(weights: NDArray[np.float64], visible: NDArray[np.bool_], row: int) -> NDArray[np.int64]:
    """Columns of the image tokens, other than itself, that the row attends to most."""
    if _now.is_image is None:
        raise ValueError("a pass that masks rows must know which tokens are image tokens")
    columns = np.flatnonzero(_now.is_image & visible)
    columns = columns[columns != row]
    order = columns[np.argsort(-weights[columns], kind="stable")]
    n = min(len(order), max(1, int(np.floor(_now.ratio * len(order) + 0.5))))
    if n < len(order):
        ahead = 1 - weights[order[n]] / weights[order[n - 1]]
        _now.narrowest = min(_now.narrowest, float(ahead))
    return np.sort(order[:n])


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, eager_mask)
