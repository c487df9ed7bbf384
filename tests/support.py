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
from collections.abc import Callable
from typing import Any, Literal, cast

import numpy as np
from judge import Verdict, judge
from numpy.typing import NDArray
from offload import APART as APART
from offload import FINE as FINE
from offload import N_GPU_LAYERS
from offload import TOLERANCE as TOLERANCE
from prompts import picture
from reference import F64, Reference, Step
from stepped import PairedEngine
from tiny_llava import TinyPair

from cmg_gguf import _core
from cmg_gguf.arrays import IntArray
from cmg_gguf.engine.context import Branch, Branches
from cmg_gguf.engine.engine import Engine
from cmg_gguf.engine.prefix_cache import PrefixCache
from cmg_gguf.engine.steps import EAGER, Filling, Pace, Strategy
from cmg_gguf.guidance import Guidance
from cmg_gguf.llama.context import ContextOptions, LlamaContext
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.projector import Projector
from cmg_gguf.prompt.segments import ImageSegment, Prompt

F32 = NDArray[np.float32]
Pairing = Literal["pair", "contexts"]
EXACT = ContextOptions(
    n_ctx=256, n_ubatch=64, n_threads=1, flash_attn=False, type_k="f32", type_v="f32"
)
ALL_TOKENS = _core.TokenPolicy(_core.TokenRule.top_ratio, 1.0)


class Tiny:
    """A tiny pair, opened: model, projector, and the judge's reading of the same file, if it can.

    prompt: see `_prompt`. verdict: see `judge`, for this pair. Both remember what they gave.
    """

    def __init__(self, pair: TinyPair, n_gpu_layers: int = N_GPU_LAYERS) -> None:
        self._path = pair.llm
        self.model = Model.load(pair.llm, n_gpu_layers=n_gpu_layers)
        self.projector = Projector(pair.mmproj, self.model, use_gpu=False, n_threads=1)
        self.prompt = functools.cache(self._prompt)
        self.verdict = functools.cache(self._verdict)

    @functools.cached_property
    def ref(self) -> Reference:
        return Reference.load(self._path)

    def _verdict(self, *asked: Any, **settings: Any) -> Verdict:
        return judge(self.ref, *asked, **settings)

    def _prompt(self, text: str, *image_seeds: int) -> Prompt:
        """An encoded prompt; "<__media__>" in `text` stands for one picture each."""
        text = text.replace("<__media__>", self.projector.marker)
        images = [picture(seed) for seed in image_seeds]
        ids = [str(seed) for seed in image_seeds]
        return self.projector.encode(self.projector.tokenize(text, images, ids=ids))


class Counted(LlamaContext):
    """A context that counts the rows it decodes, by sequence."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.n_rows: Counter[int] = Counter()

    def decode(self, tokens: IntArray, positions: IntArray, seqs: IntArray, **more: Any) -> None:
        super().decode(tokens, positions, seqs, **more)
        self.n_rows.update(seqs.tolist())

    def decode_image(
        self,
        image: ImageSegment,
        position: int,
        seq: int,
        plan: _core.Plan | None,
        *,
        first: int = 0,
        n_rows: int | None = None,
    ) -> None:
        super().decode_image(image, position, seq, plan, first=first, n_rows=n_rows)
        self.n_rows[seq] += image.n_tokens - first if n_rows is None else n_rows


class Celled(Counted):
    """A context that knows the cells of its sequences, by llama.cpp's rules."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._cells: dict[int, dict[int, int]] = {}
        self._n_ever = 0

    @property
    def n_used(self) -> int:
        """KV cells that hold something."""
        return len({cell for cells in self._cells.values() for cell in cells.values()})

    def held(self) -> dict[int, int]:
        """How many cells each sequence holds that holds any."""
        return {seq: len(cells) for seq, cells in self._cells.items() if cells}

    def decode(self, tokens: IntArray, positions: IntArray, seqs: IntArray, **more: Any) -> None:
        super().decode(tokens, positions, seqs, **more)
        for seq, position in zip(seqs.tolist(), positions.tolist(), strict=True):
            self._take(seq, position)

    def decode_image(
        self,
        image: ImageSegment,
        position: int,
        seq: int,
        plan: _core.Plan | None,
        *,
        first: int = 0,
        n_rows: int | None = None,
    ) -> None:
        super().decode_image(image, position, seq, plan, first=first, n_rows=n_rows)
        stop = image.n_tokens if n_rows is None else first + n_rows
        for i in range(first, stop):
            self._take(seq, position + i)

    def share(self, source: int, target: int, n_pos: int) -> None:
        super().share(source, target, n_pos)
        self._cells[target] = {p: c for p, c in self._cells.get(source, {}).items() if p < n_pos}

    def share_more(self, source: int, target: int, start: int, stop: int) -> None:
        super().share_more(source, target, start, stop)
        held = self._cells[source]
        self._cells.setdefault(target, {}).update((p, held[p]) for p in range(start, stop))

    def truncate(self, seq: int, n_pos: int) -> None:
        super().truncate(seq, n_pos)
        self._cells[seq] = {p: c for p, c in self._cells.get(seq, {}).items() if p < n_pos}

    def _take(self, seq: int, position: int) -> None:
        self._cells.setdefault(seq, {})[position] = self._n_ever
        self._n_ever += 1


class Rig:
    """An engine on contexts of its own. n_slots, max_cells: what it may keep of past prompts.

    selections: of rows that are decoded by hand; each answer of the engine has its own.
    """

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
        pace: Pace | None = None,
        filling: Filling | None = None,
    ) -> None:
        self.tiny = tiny
        n_seq_max = max(n_seq_max, 2 + 2 * n_slots)
        self.selections = _core.Selections(tiny.model.n_layer)
        self.contexts = [
            Counted(tiny.model, options, n_seq_max=n_seq_max + 1)
            for _ in range(1 if pairing == "pair" else 2)
        ]
        branches = Branch(self.contexts[0], seqs[0]), Branch(self.contexts[-1], seqs[1])
        slots = [(2 + 2 * i, 3 + 2 * i) for i in range(n_slots)]
        reuse = PrefixCache((self.contexts[0], self.contexts[-1]), slots, max_cells)
        self.engine = PairedEngine(
            *branches, reuse, stepping=stepping, pace=pace, filling=filling, aside=n_seq_max
        )

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
        table = np.full((prompt.n_tokens, 6), -1, np.int32)
        table[:, 0], table[:, 1] = seq, 0
        table[prompt.is_image, 2] = np.arange(prompt.n_image_tokens)
        if slots is not None:
            table[:, 3] = slots
        row = position = 0
        for segment in prompt.segments:
            n = segment.n_tokens
            for start in range(0, n, context.n_ubatch):
                stop = min(n, start + context.n_ubatch)
                is_last = row + stop == prompt.n_tokens
                plan = self._watching(table[row + start : row + stop], read_residual and is_last)
                if isinstance(segment, ImageSegment):
                    n_rows = stop - start
                    context.decode_image(segment, position, seq, plan, first=start, n_rows=n_rows)
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
        part = _core.Part(
            selections=self.selections,
            policy=ALL_TOKENS,
            n_image_tokens=int(table[:, 2].max()) + 1,
            observe_layers=list(range(self.tiny.model.n_layer)),
            keep_influence=True,
            read_residual=read_residual,
        )
        return _core.Plan(table, [part])

    def _errors(self, step: Step, asked: bool) -> tuple[float, float]:
        original = float(np.abs(self.engine.original_logits - step.original).max())
        if not asked:
            return original, 0.0
        degraded = self.engine.degraded_logits
        assert degraded is not None
        # Computing l_d must leave l_o as it was.
        original = max(original, float(np.abs(self.engine.original_logits - step.original).max()))
        return original, float(np.abs(degraded - step.degraded).max())


class Lanes:
    """An engine with several lanes on one context, nothing of it decoded yet.

    n_slots, max_cells: what it may keep of past prompts.
    """

    def __init__(
        self,
        tiny: Tiny,
        n_lanes: int,
        options: ContextOptions = EXACT,
        *,
        n_slots: int = 0,
        max_cells: int = 10**6,
        strategy: Strategy = EAGER,
        pace: Pace | None = None,
    ) -> None:
        n_pairs = n_lanes + n_slots
        self.tiny = tiny
        self.context = Celled(tiny.model, options, n_seq_max=2 * n_pairs)
        pairs = [(2 * i, 2 * i + 1) for i in range(n_pairs)]
        contexts = self.context, self.context
        self.engine = Engine(
            [
                Branches(Branch(self.context, first), Branch(self.context, second))
                for first, second in pairs[:n_lanes]
            ],
            PrefixCache(contexts, pairs[n_lanes:], max_cells),
            strategy=strategy,
            pace=pace,
        )


def logits(context: LlamaContext, row: int) -> F32:
    """(n_vocab,): a copy of batch row `row`'s logits."""
    pointer = (ctypes.c_float * context.n_vocab).from_address(context.logits_address(row))
    return np.array(pointer, np.float32)


def agree(rig: Rig, prompt: Prompt, guidance: Guidance) -> tuple[int, int]:
    """Asserts that both branches are the judge's; the prompt's rows that each of them decoded."""
    verdict = rig.tiny.verdict(prompt, guidance)
    rig.n_decoded()
    errors = rig.follow(prompt, guidance, verdict)
    assert errors.max() <= TOLERANCE, errors.max(axis=0)
    original, degraded = rig.n_decoded()
    n_steps = len(verdict.steps) - 1
    return original - n_steps, degraded - n_steps
