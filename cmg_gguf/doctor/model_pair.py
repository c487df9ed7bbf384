"""What a model pair is, and whether guidance reaches what it should in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmg_gguf.arrays import FloatArray
from cmg_gguf.doctor.branches import both
from cmg_gguf.doctor.finding import Finding, Status, looked
from cmg_gguf.engine.fork import obstacles
from cmg_gguf.guidance import Guidance, LayerSet, TopRatio
from cmg_gguf.llama.header import projector_facts
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.resolution import LARGE, SMALL
from cmg_gguf.opening import DEFAULT_TEMPLATE
from cmg_gguf.prompt.segments import Prompt
from cmg_gguf.reply import MENDS
from cmg_gguf.tiny.scenes import draw, make_scene
from cmg_gguf.vlm import GuidedVLM

QUESTION = "Describe the image."
N_ANSWER = 256
"""Tokens of an answer for which there should be room behind a picture."""
ALONE = Guidance(beta=0.0, tokens=TopRatio(1.0), scope="decode", refresh="prompt")
"""All image tokens hidden from the prompt's last row."""


def look(model: Path, mmproj: Path, **settings: Any) -> Iterator[Finding]:
    """Findings of a pair as `GuidedVLM` opens it with these settings.

    Raises ModelError, ProjectorError, BackendError, UnsupportedError, PromptError (template).
    """
    with GuidedVLM(model, mmproj, **settings) as vlm:
        yield _model(vlm.model)
        yield _projector(vlm)
        yield _layers(vlm)
        templates = looked("chat template", lambda: _template(vlm, settings))
        yield from templates
        if any(finding.status == "failed" for finding in templates):
            return  # nothing can be asked
        checks: Mapping[str, Callable[[], Iterator[Finding]]] = {
            "image encoder": lambda: _encoder(vlm, settings),
            "image tokens": lambda: _room(vlm),
            "guidance": lambda: _reach(vlm),
            "forks": lambda: _forks(vlm),
        }
        for name, check in checks.items():
            yield from looked(name, check)


def _model(model: Model) -> Finding:
    told = f"{model.path}: {model.describe()}, {model.size / 2**20:,.0f} MiB"
    return Finding("model", "ok", f"{told}, trained with {model.n_ctx_train} tokens of context")


def _layers(vlm: GuidedVLM) -> Finding:
    n_layer, attending = vlm.model.n_layer, vlm.model.attention_layers
    if len(attending) == n_layer:
        return Finding("layers", "ok", f"all {n_layer} attend")
    told = f"{len(attending)} of {n_layer} attend: {_listed(attending)}"
    return Finding("layers", "ok" if attending else "failed", told, "" if attending else _UNGUIDED)


_UNGUIDED = "no image token can be masked: ask this model without guidance (--alpha 0)"


def _projector(vlm: GuidedVLM) -> Finding:
    kind = projector_facts(vlm.projector.path).kind or "of unknown kind"
    told = f"{vlm.projector.path}: {kind}, its width is the model's, {vlm.model.n_embd}"
    return Finding("image projector", "ok", told)


def _template(vlm: GuidedVLM, settings: Mapping[str, Any]) -> Iterator[Finding]:
    """Tried on a question with a picture; then what is given to it."""
    vlm.tokenize(QUESTION, [_picture()])
    chosen, own = settings.get("chat_template"), vlm.model.chat_template()
    if chosen is not None:
        yield Finding("chat template", "ok", "the given one takes a picture and a question")
    elif own:
        yield Finding("chat template", "ok", "the model's own takes a picture and a question")
    else:
        yield Finding(
            "chat template",
            "warning",
            f"the model file has none, so {DEFAULT_TEMPLATE} is used, which is LLaVA 1.5's",
            f"if that is right, say so with --chat-template {DEFAULT_TEMPLATE}; else name the "
            "right one, or give its Jinja text",
        )
    variables = settings.get("chat_template_kwargs") or {}
    if unread := [name for name in variables if not vlm.template.reads(name)]:
        yield Finding(
            "chat template",
            "warning",
            f"it does not read {', '.join(unread)}, so that changes nothing",
            "leave it out; how this model is told so is in its own documentation",
        )


def _encoder(vlm: GuidedVLM, settings: Mapping[str, Any]) -> Iterator[Finding]:
    _encoded(vlm)
    if settings.get("encoder") == "stock":
        yield Finding("image encoder", "ok", "left as llama.cpp has it, as asked for")
        return
    mended = sorted(vlm.projector.mended)
    told = "; ".join(f"{name}: {MENDS[name]}" for name in mended)
    yield Finding("image encoder", "ok", f"mended: {told}" if mended else "nothing to mend")


def _room(vlm: GuidedVLM) -> Iterator[Finding]:
    """Whether the largest picture and an answer fit into the context."""
    fewest, most = _n_tokens(vlm, *SMALL), max(_n_tokens(vlm, *shape) for shape in LARGE)
    drawn = vlm.tokenize(QUESTION, [_picture()])
    needed = vlm.engine.cells(drawn, Guidance(), N_ANSWER)
    needed += most - _n_tokens(vlm, *_picture().shape[1::-1])
    told = f"a picture takes {most}" if most == fewest else f"a large picture takes up to {most}"
    told += f"; with an answer of {N_ANSWER} tokens that is {needed} of {vlm.n_ctx} KV cells"
    if needed <= vlm.n_ctx:
        yield Finding("image tokens", "ok", told)
        return
    status: Status = "failed" if needed - 2 * N_ANSWER >= vlm.n_ctx else "warning"
    remedy = f"-c {-(-needed // 256) * 256}, or a smaller --image-max-tokens where that is heeded"
    yield Finding("image tokens", status, told, remedy)


def _n_tokens(vlm: GuidedVLM, width: int, height: int) -> int:
    """Of a picture of this size, with what its model writes between its tiles."""
    pixels: NDArray[np.uint8] = np.broadcast_to(np.uint8(0), (height, width, 3))
    return vlm.projector.tokenize(vlm.projector.marker, [pixels], add_bos=False).n_tokens


def _reach(vlm: GuidedVLM) -> Iterator[Finding]:
    """Masks each layer alone. Beside it the same decodes with nothing hidden, so that whatever
    differs is the mask's doing."""
    attending = vlm.model.attention_layers
    if not attending:
        return
    prompt = _encoded(vlm)
    idle = []
    for il in attending:
        masked, unmasked = (_behind(vlm, prompt, il, share) for share in (1.0, 0.0))
        if np.array_equal(masked, unmasked):
            idle.append(il)
    if not idle:
        told = f"each of the {len(attending)} layers that attend, masked alone, changes the logits"
        yield Finding("guidance", "ok", told)
        return
    told = f"masked alone, these of {len(attending)} layers change nothing: {_listed(idle)}"
    remedy = "guide by others (--layers); where the self-test is right, report it"
    status: Status = "failed" if len(idle) == len(attending) else "warning"
    yield Finding("guidance", status, told, remedy)


def _forks(vlm: GuidedVLM) -> Iterator[Finding]:
    """Where degraded rows are not computed below the first masked layer. That they are costs time
    and changes nothing."""
    vlm.forget()  # the survey wants cells
    lane = vlm.engine.lanes[0]
    found = obstacles(lane.original.context, paired=lane.paired)
    refused: dict[str, list[int]] = {}
    for layer, why in found.items():
        if why:
            refused.setdefault(why, []).append(layer)
    told = "degraded rows are not computed below the first masked layer"
    if refused and all(found.values()):
        told = f"degraded rows are computed in all layers: {'; '.join(refused)}"
    elif refused:
        but = "; ".join(f"where that is {_listed(at)}: {why}" for why, at in refused.items())
        told = f"{told}, but {but}"
    yield Finding("forks", "ok", told)


def _behind(vlm: GuidedVLM, prompt: Prompt, il: int, share: float) -> FloatArray:
    """(1, n_vocab) float32: l_d behind the prompt, of which one layer alone hides this share."""
    guidance = replace(ALONE, layers=LayerSet((il,)), tokens=TopRatio(share))
    return both(vlm, prompt, guidance).l_d


def _encoded(vlm: GuidedVLM) -> Prompt:
    return vlm.projector.encode(vlm.tokenize(QUESTION, [_picture()]))


def _picture() -> NDArray[np.uint8]:
    """(112, 112, 3) uint8 RGB."""
    return draw(make_scene("test", 0, "counter"))


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
