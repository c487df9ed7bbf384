"""An answer read once more, blind: l_d of each token where no text row sees an image token.

    take(l_d)      # (n_vocab,) float32, of each token of the answer in turn
    yield from replay(branches, prompt, first, tokens, take)

It is the degraded branch of the strongest guidance there is: every image token, every layer that
attends, scope "text"; whatever guidance the answer itself was made under, so that what comes of it
means the same for every answer. Nothing need be observed for it, and no row waits for another: the
whole answer is decoded in a few batches, in the degraded branch's sequence, which nobody needs any
more. In a hybrid the layers that do not attend still carry what they have read of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cmg_gguf import _core
from cmg_gguf.arrays import FloatArray
from cmg_gguf.engine.batch import Batch, Decodes
from cmg_gguf.engine.context import Branches
from cmg_gguf.engine.rows import PromptRows, masked_rows
from cmg_gguf.errors import BackendError, PromptError, UnsupportedError
from cmg_gguf.guidance import BLIND
from cmg_gguf.prompt.segments import ImageSegment, Prompt, TextSegment

LOGITS_BYTES = 64 * 2**20
"""Of the logits of one batch, at most."""


def first_blind(prompt: Prompt, branches: Branches) -> int:
    """The first row of a prompt that a replay decodes itself: where branches share the rows before
    it, the first masked one. A state that has read on cannot go back there.

    Raises PromptError without a picture, UnsupportedError where nothing can be hidden.
    """
    if prompt.n_image_tokens == 0:
        raise PromptError(
            "evidence=True asks what a picture tells, and the request has none: add one, or leave "
            "evidence out"
        )
    context = branches.original.context
    if not context.attention_layers:
        raise UnsupportedError(
            "no layer of this model attends, so no picture can be hidden from it; leave evidence "
            "out"
        )
    shares = branches.paired and not context.has_state
    return int(masked_rows(prompt, BLIND.scope).argmax()) if shares else 0


def replay(
    branches: Branches,
    prompt: Prompt,
    first: int,
    tokens: Sequence[int],
    take: Callable[[FloatArray], None],
) -> Decodes:
    """Decodes the prompt's rows from `first` on and the answer's but the last, blind, in the
    degraded branch; calls take(l_d) for each token. The rows before `first` are there, its
    pictures from there on are encoded. Can be begun again where it failed."""
    context, seq = branches.degraded.context, branches.degraded.seq
    rows = PromptRows(
        _with_answer(prompt, tokens[:-1]),
        BLIND,
        context.n_layer,
        guided=True,
        attending=context.attention_layers,
    )
    context.truncate(seq, rows.position(first))
    if first > 0 and not context.is_whole(seq):
        raise BackendError("llama.cpp gave cells of the image away while it was still needed")
    context.patch.truncate_image_tokens(seq, int(rows.is_image[:first].sum()))
    assert rows.layers is not None
    selections = _core.Selections(context.n_layer)
    selections.resize(1)
    everything = np.arange(rows.n_image_tokens, dtype=np.int32)
    for il in rows.layers:
        selections.set_tokens(0, il, everything)
    plan = rows.degraded_plan(selections, _core.Residuals(), rows.layers, first)
    most = max(1, LOGITS_BYTES // (4 * context.n_vocab))
    for part, batch in rows.batches(branches.degraded, first, plan, most_text=most):
        if isinstance(batch, Batch):
            outputs = np.arange(part.start, part.stop) >= prompt.n_tokens - 1
            batch = replace(batch, outputs=outputs)
        for l_d in (yield batch).logits:
            take(l_d)


def _with_answer(prompt: Prompt, tokens: Sequence[int]) -> Prompt:
    """The prompt, and behind it what was answered."""
    *before, last = prompt.segments
    assert not isinstance(last, ImageSegment)
    said = np.concatenate([last.tokens, np.asarray(tokens, np.int32)])
    return replace(prompt, segments=(*before, TextSegment(said, last.inside_picture)))
