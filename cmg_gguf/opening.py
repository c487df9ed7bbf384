"""From files to what answers: weights, image encoder, chat template, and an engine on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import llama_cpp

from cmg_gguf.engine.context import Branch, Branches
from cmg_gguf.engine.engine import Engine
from cmg_gguf.engine.prefix_cache import PrefixCache
from cmg_gguf.engine.steps import APPROXIMATE, AUTO, EAGER, EXACT
from cmg_gguf.engine.steps import Strategy as Steps
from cmg_gguf.errors import BackendError, UnsupportedError
from cmg_gguf.llama.context import DEFAULT_N_UBATCH, ContextOptions, LlamaContext
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.placement import Placement
from cmg_gguf.llama.projector import Encoder as Encoder
from cmg_gguf.llama.projector import Projector
from cmg_gguf.llama.repacking import REMEDY, is_safe
from cmg_gguf.llama.resolution import ImageTokens, limited
from cmg_gguf.prompt.limits import checked_max_pixels
from cmg_gguf.prompt.templates import ChatTemplate

Pairing = Literal["auto", "pair", "contexts"]
Strategy = Literal["auto", "exact", "approximate"]

DEFAULT_TEMPLATE = "vicuna"
PARALLEL_ON_CPU = 4
"""A CPU's kernels take rows by four, and four answers fill them."""
PARALLEL_ON_DEVICE = 8
"""A device computes more rows at the price of one, but the answers share one context's cells."""
MAX_PARALLEL = 64
"""Each takes two of llama.cpp's 256 sequences."""
MAX_PREFIXES = 8
"""Most prompts whose KV cells are kept: each takes two of llama.cpp's sequences."""
STATES_BYTES = 256 * 2**20
"""Memory for what recurrent layers hold of kept prompts, where two need no more."""
IMAGE_SHARE = 0.5
"""Of the context, what one picture takes at most, where its size decides."""
IMAGE_CACHE_BYTES = 64 * 2**20

STEPS: dict[Strategy, Steps] = {"auto": AUTO, "exact": EXACT, "approximate": APPROXIMATE}


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How a model pair is put together: see `GuidedVLM`."""

    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    pairing: Pairing = "auto"
    prefix_cells: int | None = None
    image_cache_bytes: int = IMAGE_CACHE_BYTES
    strategy: Strategy = "auto"
    n_parallel: int | None = None
    encoder: Encoder = "mended"
    max_pixels: int | None = None
    image_min_tokens: int | None = None
    image_max_tokens: int | None = None
    use_gpu: bool = True

    def __post_init__(self) -> None:
        checked_max_pixels(self.max_pixels)
        self.image_tokens()
        if self.n_parallel is not None and not 1 <= self.n_parallel <= MAX_PARALLEL:
            raise UnsupportedError(
                f"n_parallel={self.n_parallel} is out of range: 1 to {MAX_PARALLEL}, or None for "
                f"{PARALLEL_ON_CPU} on a CPU and {PARALLEL_ON_DEVICE} on an accelerator"
            )
        if self.pairing not in ("auto", "pair", "contexts"):
            raise UnsupportedError(f"pairing={self.pairing!r} is unknown: auto, pair or contexts")
        if self.encoder not in get_args(Encoder):
            raise UnsupportedError(f"encoder={self.encoder!r} is unknown: mended or stock")
        if self.strategy not in STEPS:
            raise UnsupportedError(
                f"strategy={self.strategy!r} is unknown: one of {', '.join(STEPS)}"
            )

    def image_tokens(self) -> ImageTokens:
        """Limits of a picture's tokens. Raises UnsupportedError for limits that cannot be."""
        return ImageTokens(fewest=self.image_min_tokens, most=self.image_max_tokens)


@dataclass(frozen=True, eq=False)
class Pair:
    """A language model and its image projector, opened, and the contexts of its engine."""

    model: Model
    projector: Projector
    template: ChatTemplate
    engine: Engine
    contexts: tuple[LlamaContext, ...]
    n_parallel: int
    max_pixels: int | None = None

    def close(self) -> None:
        """Frees contexts, image encoder and weights. Nothing of it may be used afterwards."""
        for context in self.contexts:
            context.close()
        self.projector.close()
        self.model.close()


Options = TypeVar("Options", PairOptions, ContextOptions, Placement)


def taken(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """The options of one kind among others, by name."""
    return kind(**{field.name: given[field.name] for field in fields(kind) if field.name in given})


def open_pair(
    model: Model, mmproj_path: str | Path, context: ContextOptions, options: PairOptions
) -> Pair:
    """Puts a pair together around loaded weights.

    Raises ProjectorError, BackendError, PromptError (template), UnsupportedError.
    """
    paired = _is_paired(options, model)
    template = _template(model, options)
    projector = _projector(mmproj_path, model, context, options)
    if context.n_ubatch is None:
        context = replace(context, n_ubatch=fitting_n_ubatch(projector))
    n_parallel = _n_parallel(options, model)
    n_slots = 0 if options.prefix_cells == 0 else _n_slots(model, paired=paired)
    n_seqs = n_parallel + n_slots
    n_aside = n_parallel if model.has_recurrent_layers else 0
    contexts: tuple[LlamaContext, ...]
    if paired:
        contexts = (LlamaContext(model, context, n_seq_max=2 * n_seqs + n_aside),)
        seqs = [(2 * i, 2 * i + 1) for i in range(n_seqs)]
    else:
        contexts = (
            LlamaContext(model, context, n_seq_max=n_seqs),
            LlamaContext(model, context, n_seq_max=n_parallel + n_aside),
        )
        seqs = [(i, i if i < n_parallel else 0) for i in range(n_seqs)]
    first, second = contexts[0], contexts[-1]
    asides = range(second.n_seq_max - n_aside, second.n_seq_max) if n_aside else [None] * n_parallel
    lanes = [
        Branches(Branch(first, a), Branch(second, b), aside)
        for (a, b), aside in zip(seqs[:n_parallel], asides, strict=True)
    ]
    max_cells = _checked_cells(options.prefix_cells, first.n_ctx)
    prefixes = PrefixCache((first, second), seqs[n_parallel:], max_cells)
    strategy = STEPS[options.strategy] if paired else EAGER
    engine = Engine(lanes, prefixes, strategy=strategy)
    return Pair(model, projector, template, engine, contexts, n_parallel, options.max_pixels)


def _projector(
    path: str | Path, model: Model, context: ContextOptions, options: PairOptions
) -> Projector:
    def make(limits: ImageTokens) -> Projector:
        return Projector(
            path,
            model,
            use_gpu=options.use_gpu,
            n_threads=context.n_threads,
            cache_bytes=options.image_cache_bytes,
            encoder=options.encoder,
            image_min_tokens=limits.fewest,
            image_max_tokens=limits.most,
        )

    n_ctx = context.n_ctx or model.n_ctx_train
    return limited(make, options.image_tokens(), round(IMAGE_SHARE * n_ctx))


def fitting_n_ubatch(projector: Projector) -> int:
    """Rows of one decode, where none are asked for: 512, or what the model's pictures need."""
    return max(DEFAULT_N_UBATCH, projector.rows_at_once())


def named_template(chosen: str | None, own: str | None, **texts: str) -> ChatTemplate:
    """The chosen template, by its name or Jinja text; else the model's own; else vicuna.

    texts: `bos` and `eos`. Raises PromptError.
    """
    source = chosen if chosen is not None else own or DEFAULT_TEMPLATE
    make = ChatTemplate.from_jinja if "{" in source else ChatTemplate.named
    return make(source, **texts)


def open_files(
    model_path: str | Path,
    mmproj_path: str | Path,
    context: ContextOptions,
    options: PairOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
    **loading: Any,
) -> Pair:
    """A pair from its two files. progress: called with percent done and 100. loading: see
    `Model.load`. Raises what it and `open_pair` raise."""
    told = None if progress is None else lambda share: progress(round(share * 100), 100)
    model = Model.load(model_path, progress=told, **loading)
    return open_pair(model, mmproj_path, context, options)


def open_on_llama(llama: llama_cpp.Llama, mmproj_path: str | Path, options: PairOptions) -> Pair:
    """A pair on the weights of a `llama_cpp.Llama`, in contexts of its own with its settings.

    Raises what `open_pair` raises; UnsupportedError where `llama` has a LoRA adapter; BackendError
    where its weights are repacked and llama.cpp would crash on them.
    """
    if getattr(llama, "_lora_adapter", None) is not None:
        raise UnsupportedError(
            "this Llama has a LoRA adapter, which guidance would not see; merge it into the model "
            "(llama-export-lora)"
        )
    model = Model(llama.model, path=Path(llama.model_path), owner=llama)
    if llama.model_params.use_extra_bufts and _computes_on_cpu(llama, model) and not is_safe():
        raise BackendError(
            "the weights of this Llama are repacked for AMX, and this build of llama.cpp crashes "
            f"on them, with or without guidance. Build it without: {REMEDY}; or open the files "
            "with GuidedVLM, which loads them as they are"
        )
    context = ContextOptions.from_params(llama.context_params)
    return open_pair(model, mmproj_path, context, options)


def _computes_on_cpu(llama: llama_cpp.Llama, model: Model) -> bool:
    """Whether any layer's weights lie in the CPU's memory."""
    n: int = llama.model_params.n_gpu_layers
    return not llama_cpp.llama_supports_gpu_offload() or 0 <= n <= model.n_layer


def _is_paired(options: PairOptions, model: Model) -> bool:
    # What a window let go of a sequence is not known where the sequence has a state.
    hidden = model.has_recurrent_layers and model.has_windows
    if options.pairing == "pair" and hidden:
        raise UnsupportedError(
            "this model has recurrent layers beside a sliding window, of which two sequences "
            'cannot share the cells; use pairing="contexts"'
        )
    paired = options.pairing != "contexts" and not hidden
    if options.strategy == "approximate" and model.has_recurrent_layers:
        raise UnsupportedError(
            'strategy="approximate" leaves rows out that a recurrent layer of this model would '
            'miss; use "exact"'
        )
    if options.strategy == "approximate" and not paired:
        raise UnsupportedError(
            'strategy="approximate" shares KV cells and two contexts have none in common; '
            'use "exact"'
        )
    return paired


def _n_slots(model: Model, *, paired: bool) -> int:
    """Prompts that may be kept. One that ends in a picture and one behind it each have a state."""
    if not model.has_recurrent_layers:
        return MAX_PREFIXES
    fitting = STATES_BYTES // (2 * max(1, model.state_bytes))
    return min(max(2, fitting), MAX_PREFIXES) if paired else 0


def _n_parallel(options: PairOptions, model: Model) -> int:
    if options.n_parallel is not None:
        return options.n_parallel
    if model.has_recurrent_layers:
        return 1  # each takes two states, and prompts never share a decode
    placed = model.placement is None or model.placement.on_device
    on_device = placed and llama_cpp.llama_supports_gpu_offload()
    return PARALLEL_ON_DEVICE if on_device else PARALLEL_ON_CPU


def _template(model: Model, options: PairOptions) -> ChatTemplate:
    # The tokenizer writes BOS itself where the model wants one.
    texts = {
        "bos": "" if model.adds_bos else model.special_text("bos"),
        "eos": model.special_text("eos"),
    }
    template = named_template(options.chat_template, model.chat_template(), **texts)
    return replace(template, variables=options.chat_template_kwargs)


def _checked_cells(prefix_cells: int | None, n_ctx: int) -> int:
    if prefix_cells is None:
        return n_ctx // 2
    if not 0 <= prefix_cells <= n_ctx:
        raise UnsupportedError(
            f"prefix_cells={prefix_cells} is out of range: 0 to {n_ctx} (n_ctx), or None for half"
        )
    return prefix_cells
