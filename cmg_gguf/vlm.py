"""`GuidedVLM`: a model pair that answers questions about images under guidance."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import llama_cpp

from cmg_gguf import _core
from cmg_gguf.answer.generate import Limits, Reply, Watch
from cmg_gguf.answer.stream import Progress, Run, Stream
from cmg_gguf.calibration import Choice, cost_key
from cmg_gguf.chat.completion import create_chat_completion
from cmg_gguf.engine.context import Branch
from cmg_gguf.engine.contrast import Contrast, ContrastEngine
from cmg_gguf.engine.engine import PairedEngine
from cmg_gguf.engine.kept import PrefixReuse
from cmg_gguf.engine.strategy import Costs, Strategy, check_strategy
from cmg_gguf.errors import ModelError, PromptError, UnsupportedError
from cmg_gguf.guidance import Guidance
from cmg_gguf.llama.context import ContextOptions, LlamaContext, usable_threads
from cmg_gguf.llama.log import set_verbose
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.projector import Projector
from cmg_gguf.prompt.images import ImageSource, image_id, load_image
from cmg_gguf.prompt.messages import render_messages
from cmg_gguf.prompt.segments import Prompt
from cmg_gguf.prompt.templates import ChatTemplate
from cmg_gguf.sampling import Sampling

Pairing = Literal["auto", "pair", "contexts"]

DEFAULT_TEMPLATE = "vicuna"
RAW_MARKER = "<__media__>"
MAX_PREFIXES = 8
"""Most prompts whose KV cells are kept: each takes two of llama.cpp's sequences."""
IMAGE_CACHE_BYTES = 64 * 2**20


class GuidedVLM:
    """A LLaVA-style GGUF model and its mmproj, decoding with Cross-Modal Guidance.

        vlm = GuidedVLM("llava-v1.5-7b.Q4_K_M.gguf", "mmproj-f16.gguf")
        print(vlm.generate("Is there a fork?", ["kitchen.jpg"]).text)

    model_path, mmproj_path: the two GGUF files. n_ctx: KV cells for both branches together: the
    prompt once, the part behind its first image twice, two for each token of the answer.
    n_threads: 0 = all usable CPUs up to 4, else half of them (hyper-threads only get in the way).
    n_gpu_layers: layers on the accelerator, -1 = all (nothing changes without one). chat_template:
    None = the model's own, "vicuna" if it has none; or a name ("vicuna", "mistral", "chatml"), or a
    Jinja template. pairing: "pair" = both branches in one context, "contexts" = one each (twice the
    memory and time; the reference), "auto" = a pair unless the model has recurrent layers.
    prefix_cells: KV cells that may stay with past prompts, so that one which begins like them (same
    pixels, same tokens) goes on from there; None = half of n_ctx, 0 = none. An answer that needs
    them takes them. image_cache_bytes: memory for encoded images whose cells are gone; 0 = none.
    strategy: when the degraded branch is decoded: "eager" = at every step; "fork" = the same, but
    only from its first masked layer on; "lazy" = only where more than one token is plausible, with
    the rows of prompt and answer that waited, and forked; "adaptive" = "lazy" or "fork", by how
    often that is; all with the same tokens, but for rounding. "auto" = the fastest of them: what
    `calibrate` measured for this model before; else "adaptive" on a CPU, and on an accelerator what
    a second of measuring at the first guided request says. "lazy-approximate" = as "lazy", but rows
    that waited in vain are never decoded: other tokens, see `cmg_gguf.engine.lazy`.
    verbose: llama.cpp's log on stderr. The others: see `ContextOptions`.

    One request at a time: a new one ends a stream that is still open, whose next use raises
    BackendError. Raises ModelError, ProjectorError, BackendError, PromptError (template).
    """

    def __init__(
        self,
        model_path: str | Path,
        mmproj_path: str | Path,
        *,
        n_ctx: int = 4096,
        n_ubatch: int = 512,
        n_threads: int = 0,
        n_gpu_layers: int = -1,
        main_gpu: int = 0,
        use_mmap: bool = True,
        flash_attn: bool | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        offload_kqv: bool = True,
        chat_template: str | None = None,
        pairing: Pairing = "auto",
        prefix_cells: int | None = None,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
        strategy: Strategy = "auto",
        verbose: bool = False,
        progress: Progress | None = None,
    ) -> None:
        set_verbose(verbose)
        options = ContextOptions(
            n_ctx=n_ctx,
            n_ubatch=n_ubatch,
            n_threads=n_threads or usable_threads(),
            flash_attn=flash_attn,
            type_k=type_k,
            type_v=type_v,
            offload_kqv=offload_kqv,
        )
        model = Model.load(
            model_path,
            n_gpu_layers=n_gpu_layers,
            main_gpu=main_gpu,
            use_mmap=use_mmap,
            progress=(lambda share: progress("load", round(share * 100), 100))
            if progress
            else None,
        )
        resolved = _resolved(pairing, model)
        check_strategy(strategy, resolved)
        self._open(model, mmproj_path, chat_template, options, image_cache_bytes, n_gpu_layers != 0)
        self._assemble(options, resolved, prefix_cells)
        self._choice = Choice(self.engine, strategy, cost_key(model, options, n_gpu_layers))

    @classmethod
    def from_llama(
        cls,
        llama: llama_cpp.Llama,
        mmproj_path: str | Path,
        *,
        chat_template: str | None = None,
        pairing: Pairing = "auto",
        prefix_cells: int | None = None,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
        strategy: Strategy = "auto",
        use_gpu: bool = True,
    ) -> GuidedVLM:
        """Guided decoding with the model that a `llama_cpp.Llama` has loaded.

        The weights are shared; the KV cache is not, for the patch must be in a context from the
        start. Its settings are those of `llama`'s. Raises UnsupportedError where `llama` has a LoRA
        adapter: that belongs to its own context.
        """
        if getattr(llama, "_lora_adapter", None) is not None:
            raise UnsupportedError(
                "this Llama has a LoRA adapter, which guidance would not see; merge it into the "
                "model (llama-export-lora)"
            )
        model = Model(llama.model, path=Path(llama.model_path), owner=llama)
        vlm = cls.__new__(cls)
        options = ContextOptions.from_params(llama.context_params)
        resolved = _resolved(pairing, model)
        check_strategy(strategy, resolved)
        vlm._open(model, mmproj_path, chat_template, options, image_cache_bytes, use_gpu)
        vlm._assemble(options, resolved, prefix_cells)
        n_gpu_layers = llama.model_params.n_gpu_layers if use_gpu else 0
        vlm._choice = Choice(vlm.engine, strategy, cost_key(model, options, n_gpu_layers))
        # What is made from the weights must be freed before them.
        close = weakref.WeakMethod(vlm.close)
        llama._stack.callback(lambda: (closing := close()) is not None and closing())
        return vlm

    def _open(
        self,
        model: Model,
        mmproj_path: str | Path,
        chat_template: str | None,
        options: ContextOptions,
        image_cache_bytes: int,
        use_gpu: bool,
    ) -> None:
        self.model = model
        self.template = _template(model, chat_template)
        self.projector = Projector(
            mmproj_path,
            model,
            use_gpu=use_gpu,
            n_threads=options.n_threads,
            cache_bytes=image_cache_bytes,
        )

    def _assemble(
        self,
        options: ContextOptions,
        pairing: Literal["pair", "contexts"],
        prefix_cells: int | None,
    ) -> None:
        self.pairing = pairing
        selections = _core.Selections(self.model.n_layer)
        # A recurrent state cannot be cut back to where two prompts part.
        keeps = prefix_cells != 0 and not self.model.has_recurrent_layers
        n_slots = MAX_PREFIXES if keeps else 0

        def context(n_seq_max: int) -> LlamaContext:
            return LlamaContext(
                self.model, self.projector, selections, options, n_seq_max=n_seq_max
            )

        if pairing == "pair":
            both = context(2 + 2 * n_slots)
            original, degraded = Branch(both, 0), Branch(both, 1)
            self._contexts = [both]
            slots = [(2 + 2 * i, 3 + 2 * i) for i in range(n_slots)]
        else:
            self._contexts = [context(1 + n_slots), context(1)]
            original, degraded = (Branch(context, 0) for context in self._contexts)
            slots = [(1 + i, 0) for i in range(n_slots)]
        max_cells = _checked_cells(prefix_cells, original.context.n_ctx)
        prefixes = PrefixReuse(original, degraded, slots, max_cells)
        self.engine = PairedEngine(original, degraded, selections, prefixes)
        self._lock = threading.RLock()
        self._request = 0

    @property
    def n_ctx(self) -> int:
        """KV cells of the context."""
        return self.engine.original.context.n_ctx

    def calibrate(self, seconds: float = 2.0) -> Costs:
        """What each way of stepping costs here; remembered in the user's cache folder.

        Ends a stream that is still open. With strategy "auto" the fastest exact way is used from
        now on. Raises UnsupportedError for two contexts, ContextLengthError below 64 cells.
        """
        with self._lock:
            self._check_open()
            self._request += 1
            return self._choice.calibrate(seconds)

    @property
    def strategy(self) -> str:
        """The strategy in use; "auto" until the first guided request has settled it."""
        return self._choice.name

    def close(self) -> None:
        """Frees contexts, image encoder and weights at once. The object is of no use afterwards."""
        with self._lock:
            self._request = -1
            for context in self._contexts:
                context.close()
            self.projector.close()
            self.model.close()

    def forget(self) -> None:
        """Lets all kept prompts and images go. Ends an open stream, as a new request does."""
        with self._lock:
            self._check_open()
            self._request += 1
            self.engine.reset()
            self.engine.prefixes.forget()
            self.projector.embeddings.clear()

    def __enter__(self) -> GuidedVLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        images: Sequence[ImageSource] = (),
        **settings: Any,
    ) -> Reply:
        """The whole answer at once. Takes and raises what `stream` does."""
        stream = self.stream(prompt, images, **settings)
        for _ in stream:
            pass
        return stream.reply

    def stream(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        images: Sequence[ImageSource] = (),
        *,
        guidance: Guidance | None = None,
        contrast: Contrast | None = None,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        top_logprobs: int | None = None,
        logits_processors: Sequence[Callable[..., Any]] = (),
        watch: Watch | None = None,
        progress: Progress | None = None,
    ) -> Stream:
        """An answer as it comes: iterate over its pieces, then read `.reply`.

        prompt: a question, or a list of chat messages; a media marker in it is just text. images:
        seen before the question; with messages, put them in there instead. guidance: None =
        `Guidance()`. contrast: None = the degraded branch is the same prompt with image tokens
        masked; else it is that prompt, unmasked, and of `guidance` alpha and beta alone count.
        sampling: None = greedy. raw: `prompt` is the full text for the model, without template;
        each "<__media__>" in it stands for one image. watch: is called before each draw and can
        look at its scores, see `generation.Watch`.

        What is wrong with the request is raised here, before anything is computed: PromptError,
        ContextLengthError, ImageError, GuidanceError, SamplingError. While iterating: BackendError.
        """
        guidance = guidance if guidance is not None else Guidance()
        sampling = sampling if sampling is not None else Sampling()
        limits = Limits(
            max_tokens=_checked_max_tokens(max_tokens),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            top_logprobs=top_logprobs,
            processors=tuple(logits_processors),
            strength=contrast.strength if contrast is not None else None,
            watch=watch,
        )
        with self._lock:
            self._check_open()
            tokenized = self._tokenize(prompt, images, raw=raw)
            degraded = None
            if contrast is None:
                self.engine.check(tokenized, guidance)
            else:
                degraded = self._tokenize(contrast.prompt, contrast.images, raw=raw)
                ContrastEngine(self.engine).check(tokenized, degraded)
            return Stream(Run(self, tokenized, degraded, guidance, sampling, limits, progress))

    create_chat_completion = create_chat_completion

    def _tokenize(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        images: Sequence[ImageSource],
        *,
        raw: bool,
    ) -> Prompt:
        marker = self.projector.marker
        if raw:
            if not isinstance(prompt, str):
                raise PromptError("raw=True takes the prompt as one text, not as messages")
            text, sources = prompt.replace(RAW_MARKER, marker), list(images)
        else:
            rendered = render_messages(_messages(prompt, images), self.template, marker=marker)
            text, sources = rendered.text, rendered.images
        bos = self.model.special_text("bos")
        pixels = [load_image(source) for source in sources]
        return self.projector.tokenize(
            text,
            pixels,
            ids=[image_id(rgb) for rgb in pixels],
            add_bos=not (bos and text.startswith(bos)),
        )

    def _check_open(self) -> None:
        if self._request < 0:
            raise ModelError("this GuidedVLM is closed; make a new one")


def _template(model: Model, chosen: str | None) -> ChatTemplate:
    # The tokenizer writes BOS itself where the model wants one.
    adds_bos = llama_cpp.llama_vocab_get_add_bos(model.vocab)
    texts = {
        "bos": "" if adds_bos else model.special_text("bos"),
        "eos": model.special_text("eos"),
    }
    source = chosen if chosen is not None else model.chat_template() or DEFAULT_TEMPLATE
    if "{" in source:
        return ChatTemplate.from_jinja(source, **texts)
    return ChatTemplate.named(source, **texts)


def _resolved(pairing: Pairing, model: Model) -> Literal["pair", "contexts"]:
    if pairing not in ("auto", "pair", "contexts"):
        raise UnsupportedError(f"pairing={pairing!r} is unknown: auto, pair or contexts")
    if pairing == "pair" and model.has_recurrent_layers:
        raise UnsupportedError(
            "this model has recurrent layers, whose state two sequences cannot share; "
            'use pairing="contexts"'
        )
    if pairing == "auto":
        return "contexts" if model.has_recurrent_layers else "pair"
    return pairing


def _checked_cells(prefix_cells: int | None, n_ctx: int) -> int:
    if prefix_cells is None:
        return n_ctx // 2
    if not 0 <= prefix_cells <= n_ctx:
        raise UnsupportedError(
            f"prefix_cells={prefix_cells} is out of range: 0 to {n_ctx} (n_ctx), or None for half"
        )
    return prefix_cells


def _messages(
    prompt: str | Sequence[Mapping[str, Any]], images: Sequence[ImageSource]
) -> Sequence[Mapping[str, Any]]:
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise PromptError("images is a list; for one image give [image]")
    if not isinstance(prompt, str):
        if images:
            raise PromptError("with messages, images belong into the messages' content")
        return prompt
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def _checked_max_tokens(max_tokens: int | None) -> int | None:
    if max_tokens is not None and max_tokens < 1:
        raise PromptError(
            f"max_tokens={max_tokens} is out of range: 1 and up, or None for no limit"
        )
    return max_tokens
