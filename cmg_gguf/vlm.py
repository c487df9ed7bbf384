"""`GuidedVLM`: a model pair that answers questions about images under guidance."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from cmg_gguf.answer.scheduler import Scheduler
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.chat.completion import chunks_of, completion_of, request_of
from cmg_gguf.errors import PromptError
from cmg_gguf.guidance import Guidance
from cmg_gguf.hub import fetch_pair
from cmg_gguf.llama.context import ContextOptions, usable_threads
from cmg_gguf.llama.header import projector_facts
from cmg_gguf.llama.log import set_verbose
from cmg_gguf.llama.placement import Placement, SplitMode
from cmg_gguf.llama.prompts import tokenized
from cmg_gguf.many import Outcome, generate_many
from cmg_gguf.opening import (
    IMAGE_CACHE_BYTES,
    Encoder,
    Pair,
    Pairing,
    PairOptions,
    Strategy,
    open_files,
    open_on_llama,
    taken,
)
from cmg_gguf.prompt.images import ImageSource
from cmg_gguf.prompt.segments import Prompt
from cmg_gguf.reply import Reply
from cmg_gguf.request import Messages, Request, request_from
from cmg_gguf.stream import Progress, Run, Stream


class GuidedVLM:
    """A LLaVA-style GGUF model and its mmproj, decoding with Cross-Modal Guidance.

        vlm = GuidedVLM("llava-v1.5-7b.Q4_K_M.gguf", "mmproj-f16.gguf")
        print(vlm.generate("Is there a fork?", ["kitchen.jpg"]).text)

    model_path, mmproj_path: the two GGUF files. n_ctx: KV cells for both branches together: the
    prompt once, the part behind its first image twice, two for each token of the answer.
    n_threads: 0 = all usable CPUs up to 4, else half of them (hyper-threads only get in the way).
    n_gpu_layers: layers on the accelerator, -1 = all (nothing changes without one). devices,
    split_mode, tensor_split, main_gpu: on which ones, see `cmg_gguf.llama.placement.Placement`.
    use_gpu: False keeps the image encoder on the CPU. offload_kqv: False keeps the KV cache there.
    chat_template: None = the model's own, "vicuna" if it has none; or a name ("vicuna", "mistral",
    "chatml"), or a Jinja template. chat_template_kwargs: what the template sees besides the
    messages, as {"enable_thinking": False}, unless a request says otherwise.
    pairing: "pair" = both branches in one context, "contexts" = one each (twice the
    memory and time; the reference), "auto" = a pair unless the model has recurrent layers beside a
    sliding window.
    prefix_cells: KV cells that may stay with past prompts, so that one which begins like them (same
    pixels, same tokens) goes on from there; None = half of n_ctx, 0 = none. An answer that needs
    them takes them. image_cache_bytes: memory for encoded images whose cells are gone; 0 = none.
    strategy: "auto" = whatever of the degraded branch can wait does, where that is the cheaper way
    by the engine's own clock; "exact" = both branches at every step, in one fixed way: the same
    request gives the same bits whatever the clock says; both give the same tokens, but for
    rounding. "approximate" = rows that waited in vain are never decoded: cheaper, and other tokens,
    see `cmg_gguf.engine.steps`. n_parallel: answers that are made at once, sharing n_ctx; None = 4
    on a CPU, 8 on an accelerator. encoder: "mended" = the image encoder is put right where
    llama.cpp's is not (`projector.mended` says what was), "stock" = it is left as it is.
    max_pixels: of a picture, width times height, at most; None = 64 megapixels, of a JPEG 256.
    image_min_tokens, image_max_tokens: of one picture, for models that take pictures of any
    resolution; None = the model's own, but a picture takes half of n_ctx at most. verbose:
    llama.cpp's log on stderr. The others: see `ContextOptions`.

    Any number of threads may ask; requests beyond n_parallel, or beyond what n_ctx has room for,
    wait in order. Raises ModelError, ProjectorError, BackendError, PromptError (template).
    """

    def __init__(
        self,
        model_path: str | Path,
        mmproj_path: str | Path,
        *,
        n_ctx: int = 4096,
        n_ubatch: int | None = None,
        n_threads: int = 0,
        n_gpu_layers: int = -1,
        devices: Sequence[str] | None = None,
        split_mode: SplitMode = "layer",
        tensor_split: Sequence[float] | None = None,
        main_gpu: int = 0,
        use_gpu: bool = True,
        use_mmap: bool = True,
        flash_attn: bool | None = None,
        type_k: str = "f16",
        type_v: str = "f16",
        offload_kqv: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        pairing: Pairing = "auto",
        prefix_cells: int | None = None,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
        strategy: Strategy = "auto",
        n_parallel: int | None = None,
        encoder: Encoder = "mended",
        max_pixels: int | None = None,
        image_min_tokens: int | None = None,
        image_max_tokens: int | None = None,
        verbose: bool = False,
        progress: Progress | None = None,
    ) -> None:
        given = {
            **locals(),
            "chat_template_kwargs": chat_template_kwargs or {},
            "n_threads": n_threads or usable_threads(),
        }
        options, context = taken(PairOptions, given), taken(ContextOptions, given)
        placed = vars(taken(Placement, given))
        set_verbose(verbose)
        told = progress and partial(progress, "load")
        files = model_path, mmproj_path
        pair = open_files(*files, context, options, progress=told, use_mmap=use_mmap, **placed)
        self._set_up(pair)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        mmproj_path: str | Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> GuidedVLM:
        """The model of a repository on the Hugging Face hub, from the cache where it is there.

            vlm = GuidedVLM.from_pretrained("owner/repo:Q4_K_M")

        name: "owner/repo", "owner/repo:QUANT" or "owner/repo:FILE.gguf"; `cmg_gguf.hub` says which
        files are taken, and how. mmproj_path: a projector file instead of the repository's.
        options: as in `GuidedVLM`. progress: "download" in bytes, before the others. Raises
        HubNameError, HubConnectionError, HubError, UnsupportedError without huggingface_hub, and
        what `GuidedVLM` raises.
        """
        told = progress and partial(progress, "download")
        return cls(*fetch_pair(name, mmproj_path, progress=told), progress=progress, **options)

    @classmethod
    def from_llama(
        cls,
        llama: llama_cpp.Llama,
        mmproj_path: str | Path,
        *,
        verbose: bool | None = None,
        **options: Any,
    ) -> GuidedVLM:
        """Guided decoding with the model that a `llama_cpp.Llama` has loaded.

        The weights are shared; the KV cache is not, for the patch must be in a context from the
        start. Its settings are those of `llama`'s. verbose: as in `GuidedVLM`, for all of
        llama.cpp; None = as it is. options: chat_template, chat_template_kwargs, pairing,
        prefix_cells, image_cache_bytes, strategy, n_parallel, encoder, max_pixels,
        image_min_tokens, image_max_tokens as in `GuidedVLM`; use_gpu = False keeps the image
        encoder on the CPU. Raises UnsupportedError where `llama` has a LoRA adapter: that belongs
        to its own context.
        """
        if verbose is not None:
            set_verbose(verbose)
        vlm = cls.__new__(cls)
        vlm._set_up(open_on_llama(llama, mmproj_path, PairOptions(**options)))
        # What is made from the weights must be freed before them.
        close = weakref.WeakMethod(vlm.close)
        llama._stack.callback(lambda: (closing := close()) is not None and closing())
        return vlm

    def _set_up(self, pair: Pair) -> None:
        self._pair = pair
        self._scheduler = Scheduler(pair.engine, pair.n_parallel, pair.engine.lock)
        self.model, self.projector = pair.model, pair.projector
        self.template, self.engine = pair.template, pair.engine
        self.n_ctx = pair.contexts[0].n_ctx
        """KV cells of the context."""
        self.n_ubatch = pair.contexts[0].n_ubatch
        """Rows of one decode, at most."""
        self.image_size = projector_facts(pair.projector.path).image_size
        """Pixels a side of what the image encoder sees; 0 where its file does not say."""
        self.max_pixels = pair.max_pixels
        """As it was asked for: see `load_image`."""

    def close(self) -> None:
        """Frees contexts, image encoder and weights. Answers under way and those that wait end with
        ModelError. The object is of no use afterwards."""
        self._scheduler.close()
        self._pair.close()

    def forget(self) -> None:
        """Lets all kept prompts and images go; answers under way go on."""

        def let_go() -> None:
            self.engine.forget()
            self.projector.forget()

        with self.engine.lock:  # first: whose holder may be closing, and waits for what is open
            self._scheduler.while_open(let_go)

    def __enter__(self) -> GuidedVLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def generate(
        self,
        prompt: str | Messages | Request,
        images: Sequence[ImageSource] = (),
        *,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Reply:
        """The whole answer at once. Takes and raises what `stream` does."""
        return self._run(request_from(prompt, images, settings), progress).whole()

    def generate_many(self, requests: Iterable[Request]) -> Iterator[Outcome]:
        """What comes of each request, as they finish, up to n_parallel at once.

            for outcome in vlm.generate_many(Request("Describe it.", [p]) for p in pictures):
                print(outcome.index, outcome.reply.text if outcome.reply else outcome.error)

        requests: of any length; no more are taken than can be worked on. A request that cannot be
        answered is an outcome with an error and stops nothing. Raises ModelError where the model is
        closed meanwhile. An iterator that is dropped ends what is under way.
        """
        return generate_many(
            lambda request, at_end: self._run(request, at_end=at_end), requests, self._scheduler
        )

    def stream(
        self,
        prompt: str | Messages | Request,
        images: Sequence[ImageSource] = (),
        *,
        progress: Progress | None = None,
        heard: Callable[[bool], None] = lambda over: None,
        **settings: Any,
    ) -> Stream:
        """An answer as it comes: iterate over its pieces, then read `.reply`. It goes on whether it
        is read or not.

        heard(over): for who must not wait, as an event loop: called by the engine's thread where
        `Stream.ready` may have something new, at last with True: nothing more will come. It must be
        quick and raise nothing.

        prompt, images, settings: as in `Request`, or one made before; a setting that is None is the
        default. What is wrong with the request is raised here, before anything is computed:
        PromptError, ContextLengthError, ImageError, GuidanceError, SamplingError. While iterating:
        BackendError.
        """
        request = request_from(prompt, images, settings)
        return self._run(request, progress, heard=heard)

    def heat(
        self,
        prompt: str | Messages,
        images: Sequence[ImageSource] = (),
        *,
        answer: str,
        guidance: Guidance | None = None,
        raw: bool = False,
        progress: Progress | None = None,
    ) -> Reply:
        """What the tokens of an answer that is given attend to in the pictures: a reply of these
        tokens with its `heat`, whatever the model would have said.

            vlm.heat("Is there a fork?", [picture], answer="Yes, a fork.").heat.map(0, [3])

        answer: in the tokens that the model's tokenizer makes of it, special ones as text.
        guidance: tells which layers are masked, and nothing else; None = the default. Takes and
        raises what `generate` does; PromptError for an empty answer.
        """
        tokens = self._scheduler.while_open(lambda: self.model.tokenize(answer))
        if len(tokens) == 0:
            raise PromptError("the answer is empty; give at least a word")

        def given(said: IntArray, logits: FloatArray) -> FloatArray:
            row = np.full_like(logits, -np.inf)
            row[tokens[len(said)]] = 0.0
            return row

        return self.generate(
            prompt,
            images,
            guidance=guidance,
            raw=raw,
            max_tokens=len(tokens),
            logits_processors=[given],
            heat=True,
            progress=progress,
        )

    def tokenize(
        self,
        prompt: str | Messages,
        images: Sequence[ImageSource] = (),
        *,
        raw: bool = False,
        salt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt for `engine`, as `Request` has it; its images are read, but not encoded: see
        `projector.encode`. Raises PromptError, ImageError."""
        return self._scheduler.while_open(
            lambda: tokenized(
                prompt,
                images,
                raw=raw,
                salt=salt,
                variables=chat_template_kwargs,
                template=self.template,
                projector=self.projector,
                max_pixels=self.max_pixels,
            )
        )

    def create_chat_completion(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        model: str | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """A chat completion in OpenAI's shape, or an iterator of its chunks with stream=True.

        settings: see `cmg_gguf.chat.completion.request_of`. model: its name in the reply. Raises
        what `stream` raises, and UnsupportedError.
        """
        request = request_of(messages, **settings)
        name = model if model is not None else str(self.model.path)
        if stream:
            return chunks_of(self.stream(request, progress=progress), name, self._token_bytes)
        reply = self.generate(request, progress=progress)
        return completion_of(reply, name, self._token_bytes)

    def _token_bytes(self, token: int) -> bytes:
        return self._scheduler.while_open(lambda: self.model.token_bytes(token))

    def _run(
        self,
        request: Request,
        progress: Progress | None = None,
        at_end: Callable[[], None] = lambda: None,
        heard: Callable[[bool], None] = lambda over: None,
    ) -> Stream:
        run = Run(self._pair, self._scheduler, request, progress, at_end, heard)
        stream = Stream(run)  # first: an answer that nobody gets, as at a Ctrl-C, ends
        try:
            self._scheduler.submit(run)
        except BaseException:
            stream.cancel()
            raise
        return stream
