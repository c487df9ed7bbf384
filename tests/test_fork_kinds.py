"""Forks in graphs that are not LLaVA's: sections of positions, experts, images in several layers.

What both branches' logits must be is what they are where nothing is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from prompts import ONE_IMAGE, PICTURES, TWO_IMAGES
from reference import F64
from support import APART, EXACT, TOLERANCE, Lanes, Rig, Tiny
from tiny_llava import TinyConfig

from cmg_gguf.engine.batch import Batch, Decodes, ImageBatch
from cmg_gguf.engine.engine import Engine
from cmg_gguf.engine.fork import survey
from cmg_gguf.engine.rows import masked_rows
from cmg_gguf.engine.steps import AUTO, EAGER, Strategy
from cmg_gguf.guidance import Guidance, LayerSet, Scope, TopRatio
from cmg_gguf.llama.context import ContextOptions
from cmg_gguf.prompt.segments import Prompt

N_STEPS = 7
FORK = Strategy(fork=True)
BOTH = Strategy(waiting="always", fork=True)
ROOMY = ContextOptions(
    n_ctx=1024, n_ubatch=128, n_threads=1, flash_attn=False, type_k="f32", type_v="f32"
)
KINDS = {
    "sections": TinyConfig(arch="qwen2vl"),
    "interleaved sections": TinyConfig(arch="qwen3vl"),
    "experts": TinyConfig(n_expert=4),
    "image in several layers": TinyConfig(arch="qwen3vl", n_deepstack=2),
    "image in several layers, experts": TinyConfig(arch="qwen3vlmoe", n_deepstack=2, n_expert=4),
}

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def tiny(kind: str, open_tiny: Callable[[TinyConfig], Tiny]) -> Tiny:
    return open_tiny(KINDS[kind])


def answered(rig: Rig, prompt: Prompt, guidance: Guidance, tokens: list[int]) -> F64:
    """(1 + n_tokens, 2, n_vocab): both branches' logits behind the prompt and each token."""
    engine, found = rig.engine, []
    engine.prefill(prompt, guidance)
    for token in [*tokens, None]:
        found.append((engine.original_logits, engine.degraded_logits))
        if token is not None:
            engine.step(token)
    return np.array(found, np.float64)


def first_entered(kind: str) -> int:
    """The first layer above all that read the image's embeddings."""
    return KINDS[kind].n_deepstack + 1


def drawn_layers(random: np.random.Generator, first: int, n_layer: int) -> LayerSet:
    """Some layers from `first` on."""
    n, layers = int(random.integers(1, n_layer - first + 1)), np.arange(first, n_layer)
    return LayerSet(tuple(sorted(random.choice(layers, n, replace=False).tolist())))


def n_text_rows(prompt: Prompt, scope: Scope) -> int:
    """Rows of the prompt that the degraded branch enters a fork with."""
    own = prompt.is_image[int(masked_rows(prompt, scope).argmax()) :]
    return 0 if own.any() else len(own)


@every_kind
@pytest.mark.parametrize("shrinks", [False, True])
def test_rows_enter_at_every_layer_that_reads_only_the_stream(
    tiny: Tiny, kind: str, shrinks: bool
) -> None:
    context = Rig(tiny).contexts[0]
    survey(context)
    for layer in range(1, tiny.model.n_layer):
        told = "" if layer >= first_entered(kind) else "it reads embd from below"
        assert context.patch.fork_obstacle(layer, shrinks=shrinks) == told, layer


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("way", [FORK, BOTH, AUTO], ids=["fork", "lazy", "auto"])
@pytest.mark.parametrize("seed", range(4))
@every_kind
def test_both_branches_are_what_they_are_without_forks(
    tiny: Tiny, kind: str, seed: int, way: Strategy, flash: bool
) -> None:
    random = np.random.default_rng(seed)
    scope: Scope = ("decode", "question", "text")[seed % 3]
    text, pictures = ((ONE_IMAGE, (seed,)), (TWO_IMAGES, PICTURES))[seed % 2]
    layers = drawn_layers(random, first_entered(kind), tiny.model.n_layer)
    guidance = Guidance(layers=layers, scope=scope, tokens=TopRatio(1.0))
    prompt = tiny.prompt(text, *pictures)
    tokens = random.integers(300, 500, N_STEPS).tolist()
    options = ContextOptions(**{**EXACT.__dict__, "flash_attn": flash})
    eager, forked = Rig(tiny, options), Rig(tiny, options, stepping=way)
    expected = answered(eager, prompt, guidance, tokens)
    found = answered(forked, prompt, guidance, tokens)
    assert np.abs(found - expected).max() <= (0.05 if flash else TOLERANCE)
    assert np.abs(expected[:, 0] - expected[:, 1]).max(axis=1).min() > APART / 10
    assert eager.contexts[0].patch.n_left_out == 0
    left_out = forked.contexts[0].patch.n_left_out
    assert left_out == N_STEPS + n_text_rows(prompt, scope)


@dataclass(eq=False)
class Taught:
    """An answer that says given tokens; seen: both branches' logits so far."""

    engine: Engine
    prompt: Prompt
    guidance: Guidance
    tokens: list[int]

    def run(self, seen: list[tuple[F64, F64]]) -> Decodes:
        session = self.engine.open(self.prompt, self.guidance)
        yield from self.engine.prefilling(session, self.prompt)
        for token in [*self.tokens, None]:
            yield from session.catch_up()
            assert session.l_d is not None
            seen.append((np.array(session.l_o, np.float64), np.array(session.l_d, np.float64)))
            if token is not None:
                yield from session.step(token)
        self.engine.end(session)


def answered_together(lanes: Lanes, answers: list[Taught]) -> list[list[tuple[F64, F64]]]:
    """Logits of answers whose batches go together where they can."""
    engine, seen = lanes.engine, [list[tuple[F64, F64]]() for _ in answers]
    running = [answer.run(found) for answer, found in zip(answers, seen, strict=True)]
    wanting: list[tuple[Decodes, Batch | ImageBatch]] = [
        (decodes, next(decodes)) for decodes in running
    ]
    while wanting:
        left = []
        for group in engine.together([batch for _, batch in wanting]):
            came = engine.decode([wanting[i][1] for i in group])
            for i, one in zip(group, came, strict=True):
                assert not isinstance(one, BaseException), one
                try:
                    left.append((wanting[i][0], wanting[i][0].send(one)))
                except StopIteration:
                    continue
        wanting = left
    return seen


@pytest.mark.parametrize("above", [0, 2, -1])
@pytest.mark.parametrize("way", [FORK, BOTH], ids=["fork", "lazy"])
@every_kind
def test_answers_at_different_positions_fork_in_one_decode(
    tiny: Tiny, kind: str, above: int, way: Strategy
) -> None:
    """Rows below a fork lie anywhere, and the images before them take fewer positions than rows."""
    layer = range(first_entered(kind), tiny.model.n_layer)[above]
    random = np.random.default_rng(layer)
    asked = [(ONE_IMAGE, (1,)), (TWO_IMAGES, PICTURES), ("<__media__> No?", (0,))]
    guidance = Guidance(layers=[layer], scope="decode", tokens=TopRatio(1.0))
    prompts = [tiny.prompt(text, *seeds) for text, seeds in asked]
    tokens = [random.integers(300, 500, N_STEPS).tolist() for _ in asked]
    lanes = Lanes(tiny, 3, ROOMY, strategy=way)
    found = answered_together(
        lanes, [Taught(lanes.engine, p, guidance, t) for p, t in zip(prompts, tokens, strict=True)]
    )
    assert lanes.context.patch.n_left_out == 3 * (N_STEPS + 1)
    for prompt, said, seen in zip(prompts, tokens, found, strict=True):
        expected = answered(Rig(tiny, stepping=EAGER), prompt, guidance, said)
        assert np.abs(np.array(seen) - expected).max() <= TOLERANCE
