"""Shared by the tests that run the engine on a real tiny pair and ask the judge.

rig = Rig(tiny)
prompt = tiny.prompt(ONE_IMAGE, 0)
verdict = tiny.verdict(prompt, Guidance())
errors = rig.follow(prompt, Guidance(), verdict)  # (n_steps, 2): original, degraded
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import llama_cpp
import numpy as np
import reference
from llama_cpp import mtmd_cpp as mtmd
from numpy.typing import NDArray
from offload import N_GPU_LAYERS
from reference import F64, Mask, Policy, Reference, Step
from stepped import PairedEngine
from test_reference import picture
from tiny_llava import TinyPair

from cmg_gguf import _core
from cmg_gguf.arrays import IntArray
from cmg_gguf.engine.context import Branch, Branches
from cmg_gguf.engine.prefix_cache import PrefixCache
from cmg_gguf.engine.steps import EAGER, Strategy
from cmg_gguf.guidance import (
    AttentionMass,
    CumulativeMass,
    Guidance,
    LayerRange,
    LayerSet,
    MeanStd,
    TopRatio,
)
from cmg_gguf.llama.context import CACHE_TYPES, ContextOptions, LlamaContext
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.projector import Projector
from cmg_gguf.prompt.segments import ImageSegment, Prompt

F32 = NDArray[np.float32]
Pairing = Literal["pair", "contexts"]
N_STEPS = 8
EXACT = ContextOptions(
    n_ctx=256, n_ubatch=64, n_threads=1, flash_attn=False, type_k="f32", type_v="f32"
)
TOLERANCE = 1e-4
"""Largest logit error with EXACT; the logits have an RMS of about 3."""


PICTURE = 2
PICTURES = (3, 4)
"""Seeds for which no choice hangs by a hair: in every row and layer the last token that is taken is
ahead of the first one left by 0.03 percent and more. A float32 forward is off by 0.001 percent."""
ALL_TOKENS = _core.TokenPolicy(_core.TokenRule.top_ratio, 1.0)


class Tiny:
    """A tiny pair, opened: model, projector, and the judge's reading of the same file.

    prompt: see `_prompt`. verdict: see `judge`, for this pair. Both remember what they gave.
    """

    def __init__(self, pair: TinyPair) -> None:
        self.ref = Reference.load(pair.llm)
        self.model = Model.load(pair.llm, n_gpu_layers=N_GPU_LAYERS)
        self.projector = Projector(pair.mmproj, self.model, use_gpu=False, n_threads=1)
        self.prompt = functools.cache(self._prompt)
        self.verdict = functools.cache(partial(judge, self.ref))

    def _prompt(self, text: str, *image_seeds: int) -> Prompt:
        """An encoded prompt; "<__media__>" in `text` stands for one picture each."""
        text = text.replace("<__media__>", self.projector.marker)
        images = [picture(seed) for seed in image_seeds]
        ids = [str(seed) for seed in image_seeds]
        return self.projector.encode(self.projector.tokenize(text, images, ids=ids))


def prompt_rows(ref: Reference, prompt: Prompt) -> F64:
    """(n_tokens, n_embd): the prompt as the judge takes it."""
    rows = []
    for segment in prompt.segments:
        if isinstance(segment, ImageSegment):
            assert segment.embd is not None
            rows.append(segment.embd.astype(np.float64))
        else:
            rows.append(ref.embed(segment.tokens.tolist()))
    return np.concatenate(rows)


class Verdict(NamedTuple):
    """What guided decoding must give, by the judge.

    `masked`: for each step and each layer of `layers`, the image tokens masked for its row.
    """

    steps: list[Step]
    layers: tuple[int, ...]
    masked: list[list[list[int]]]

    @property
    def tokens(self) -> list[int]:
        return [step.token for step in self.steps]

    @property
    def gaps(self) -> F64:
        """(n_steps,): largest difference between the two branches' logits."""
        return np.array([np.abs(s.original - s.degraded).max() for s in self.steps])


def judge(ref: Reference, prompt: Prompt, guidance: Guidance, n_steps: int = N_STEPS) -> Verdict:
    """The judge's own greedy guided decoding after `prompt`."""
    policy, rows, is_image = judge_policy(guidance), prompt_rows(ref, prompt), prompt.is_image
    in_picture = prompt.in_picture
    steps = reference.guided(ref, rows, is_image, n_steps, policy, in_picture=in_picture)
    last = len(rows) - 1
    rows = np.concatenate([rows, ref.embed([step.token for step in steps[:-1]])])
    generated = np.zeros(n_steps - 1, np.bool_)
    is_image, in_picture = np.append(is_image, generated), np.append(in_picture, generated)
    forward = ref.forward(rows)
    influence = reference.candidate_influence(ref, forward, is_image)
    layers = np.flatnonzero(policy.layers(reference.layer_evidence(forward, influence, last)))
    blocked = reference.blocked_pairs(influence, in_picture, last + 1, policy)[:, :, is_image]
    masked = [
        [np.flatnonzero(blocked[il, last + i]).tolist() for il in layers] for i in range(n_steps)
    ]
    return Verdict(steps, tuple(layers.tolist()), masked)


def judge_policy(guidance: Guidance) -> Policy:
    """The same settings in the judge's words."""
    return Policy(
        tokens=_token_policy(guidance),
        layers=_layer_policy(guidance),
        scope=guidance.scope,
        refresh=guidance.refresh,
        alpha=guidance.alpha,
        beta=guidance.beta,
    )


def _token_policy(guidance: Guidance) -> Callable[[F64], Mask]:
    tokens = guidance.tokens
    if isinstance(tokens, TopRatio):
        return partial(reference.top_ratio, ratio=tokens.ratio)
    if isinstance(tokens, MeanStd):
        return partial(reference.mean_std, lam=tokens.factor)
    assert isinstance(tokens, CumulativeMass)
    return partial(reference.cumulative_mass, mass=tokens.mass)


def _layer_policy(guidance: Guidance) -> Callable[[reference.LayerEvidence], Mask]:
    layers = guidance.layers
    if isinstance(layers, LayerSet):
        return partial(reference.explicit_layers, layers=layers.layers)
    if isinstance(layers, LayerRange):
        return partial(reference.layer_range, start=layers.start, stop=layers.stop)
    if isinstance(layers, AttentionMass):
        return partial(reference.attention_mass, gamma=layers.share)
    return partial(reference.lowest_cosine, share=cast(Any, layers).share)


class Counted(LlamaContext):
    """A context that counts the rows it decodes, by sequence."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.n_rows: Counter[int] = Counter()

    def decode(self, tokens: IntArray, positions: IntArray, seqs: IntArray, **more: Any) -> None:
        super().decode(tokens, positions, seqs, **more)
        self.n_rows.update(seqs.tolist())

    def decode_image(
        self, image: ImageSegment, position: int, seq: int, plan: _core.Plan | None
    ) -> None:
        super().decode_image(image, position, seq, plan)
        self.n_rows[seq] += image.n_tokens


class Rig:
    """An engine on contexts of its own. n_slots, max_cells: what it may keep of past prompts."""

    def __init__(
        self,
        tiny: Tiny,
        options: ContextOptions = EXACT,
        *,
        pairing: Pairing = "pair",
        seqs: tuple[int, int] = (0, 1),
        n_seq_max: int = 2,
        n_slots: int = 0,
        max_cells: int = 10**6,
        stepping: Strategy = EAGER,
    ) -> None:
        self.tiny = tiny
        n_seq_max = max(n_seq_max, 2 + 2 * n_slots)
        self.selections = _core.Selections(tiny.model.n_layer)
        self.contexts = [
            Counted(tiny.model, tiny.projector, self.selections, options, n_seq_max=n_seq_max)
            for _ in range(1 if pairing == "pair" else 2)
        ]
        branches = Branch(self.contexts[0], seqs[0]), Branch(self.contexts[-1], seqs[1])
        slots = [(2 + 2 * i, 3 + 2 * i) for i in range(n_slots)]
        reuse = PrefixCache(Branches(*branches), slots, max_cells)
        self.engine = PairedEngine(*branches, self.selections, reuse, stepping=stepping)

    def n_decoded(self) -> tuple[int, int]:
        """Rows that each branch has decoded since the last call."""
        branches = self.engine.original, self.engine.degraded
        first, second = (cast(Counted, b.context).n_rows.pop(b.seq, 0) for b in branches)
        return first, second

    def follow(
        self,
        prompt: Prompt,
        guidance: Guidance,
        verdict: Verdict,
        asked: Callable[[int], bool] = lambda step: True,
    ) -> F64:
        """(n_steps, 2): largest logit error of each branch, taught with the judge's tokens.

        Asserts that the engine chose the judge's layers, and for each generated row masks the
        judge's image tokens. asked: at which steps l_d is looked at; elsewhere its error is 0.
        """
        self.engine.prefill(prompt, guidance)
        assert self.engine.layers == verdict.layers
        errors = [self._errors(verdict.steps[0], asked(0))]
        for i, step in enumerate(verdict.steps[1:], 1):
            self.engine.step(verdict.steps[i - 1].token)
            assert [tokens.tolist() for tokens in self.engine.attended] == verdict.masked[i]
            errors.append(self._errors(step, asked(i)))
        return np.array(errors)

    def decode_prompt(
        self, prompt: Prompt, slots: IntArray | None = None, *, read_residual: bool = False
    ) -> int:
        """Decodes the prompt into the original branch alone; the number of its positions.

        slots: (n_tokens,) int32, the slot that keeps each row's influence in every layer; -1: none.
        """
        context, seq = self.engine.original.context, self.engine.original.seq
        table = np.full((prompt.n_tokens, 4), -1, np.int32)
        table[:, 0] = seq
        table[prompt.is_image, 1] = np.arange(prompt.n_image_tokens)
        if slots is not None:
            table[:, 2] = slots
        row = position = 0
        for segment in prompt.segments:
            n, is_image = segment.n_tokens, isinstance(segment, ImageSegment)
            for start in range(0, n, n if is_image else context.n_ubatch):
                stop = n if is_image else min(n, start + context.n_ubatch)
                is_last = row + stop == prompt.n_tokens
                plan = self._watching(table[row + start : row + stop], read_residual and is_last)
                if isinstance(segment, ImageSegment):
                    context.decode_image(segment, position, seq, plan)
                else:
                    context.decode(
                        segment.tokens[start:stop],
                        np.arange(position + start, position + stop, dtype=np.int32),
                        np.full(stop - start, seq, np.int32),
                        outputs=np.arange(row + start, row + stop) == prompt.n_tokens - 1,
                        plan=plan,
                    )
            row, position = row + n, position + segment.n_pos
        return position

    def _watching(self, table: IntArray, read_residual: bool) -> _core.Plan:
        n_layer = self.tiny.model.n_layer
        return _core.Plan(
            table,
            n_layer=n_layer,
            observe_layers=list(range(n_layer)),
            mask_layers=[],
            policy=ALL_TOKENS,
            n_image_tokens=int(table[:, 1].max()) + 1,
            keep_influence=True,
            read_residual=read_residual,
        )

    def _errors(self, step: Step, asked: bool) -> tuple[float, float]:
        original = float(np.abs(self.engine.original_logits - step.original).max())
        if not asked:
            return original, 0.0
        degraded = self.engine.degraded_logits
        assert degraded is not None
        # Computing l_d must leave l_o as it was.
        original = max(original, float(np.abs(self.engine.original_logits - step.original).max()))
        return original, float(np.abs(degraded - step.degraded).max())


def logits(context: LlamaContext, row: int) -> F32:
    """(n_vocab,): a copy of batch row `row`'s logits."""
    pointer = (ctypes.c_float * context.n_vocab).from_address(context.logits_address(row))
    return np.array(pointer, np.float32)


class Unhooked:
    """A llama.cpp context without a callback, driven through llama_cpp alone."""

    def __init__(self, tiny: Tiny, options: ContextOptions = EXACT, *, n_seq_max: int = 2) -> None:
        self._tiny = tiny
        self._n_ubatch = options.n_ubatch
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = options.n_ctx, n_seq_max
        params.n_batch = params.n_ubatch = options.n_ubatch
        params.n_threads = params.n_threads_batch = options.n_threads
        params.kv_unified = params.swa_full = True
        params.flash_attn_type = 1 if options.flash_attn else 0
        params.type_k, params.type_v = CACHE_TYPES[options.type_k], CACHE_TYPES[options.type_v]
        self.handle = llama_cpp.llama_init_from_model(tiny.model.handle, params)
        assert self.handle

    def close(self) -> None:
        llama_cpp.llama_free(self.handle)

    def prefill(self, prompt: Prompt, seq: int = 0) -> F32:
        """(n_vocab,) logits of the last row; one batch a segment, the last row's output alone."""
        n_past = 0
        for segment in prompt.segments:
            if isinstance(segment, ImageSegment):
                self._decode_image(segment, n_past, seq)
            else:
                n = segment.n_tokens
                outputs = [False] * n
                outputs[-1] = n_past + n == prompt.n_tokens
                self.decode(segment.tokens.tolist(), range(n_past, n_past + n), [seq] * n, outputs)
            n_past += segment.n_pos
        return self.logits(prompt.segments[-1].n_tokens - 1)

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        seqs: Sequence[int],
        outputs: Sequence[bool],
    ) -> None:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, row in enumerate(zip(tokens, positions, seqs, outputs, strict=True)):
            batch.token[i], batch.pos[i], batch.seq_id[i][0], batch.logits[i] = row
            batch.n_seq_id[i] = 1
        status = llama_cpp.llama_decode(self.handle, batch)
        llama_cpp.llama_batch_free(batch)
        assert status == 0

    def share(self, source: int, target: int) -> None:
        memory = llama_cpp.llama_get_memory(self.handle)
        llama_cpp.llama_memory_seq_cp(memory, source, target, -1, -1)

    def logits(self, row: int) -> F32:
        pointer = llama_cpp.llama_get_logits_ith(self.handle, row)
        return np.array(np.ctypeslib.as_array(pointer, (self._tiny.model.n_vocab,)))

    def _decode_image(self, image: ImageSegment, n_past: int, seq: int) -> None:
        assert image.embd is not None
        status = mtmd.mtmd_helper_decode_image_chunk(
            self._tiny.projector.handle,
            self.handle,
            image.chunk.handle,
            image.embd.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            n_past,
            seq,
            self._n_ubatch,
            ctypes.byref(llama_cpp.llama_pos()),
            mtmd.mtmd_helper_post_decode_callback(),
            ctypes.c_void_p(0),
        )
        assert status == 0
