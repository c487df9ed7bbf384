"""Flags that say which model is asked, and how it is run. Names are llama-mtmd-cli's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from cmg_gguf.cli.placement_flags import (
    DeviceNames,
    GpuLayers,
    MainGpu,
    NoKvOffload,
    NoMmprojOffload,
    SplitModeName,
    TensorSplit,
    placement,
)

if TYPE_CHECKING:
    from cmg_gguf.stream import Progress
    from cmg_gguf.vlm import GuidedVLM

FlashAttention = Literal["on", "off", "auto"]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
Pairing = Literal["auto", "pair", "contexts"]
Strategy = Literal["auto", "exact", "approximate"]

_flag = partial(typer.Option, rich_help_panel="Model")

ModelFile = Annotated[
    Path | None,
    _flag(
        "--model",
        "-m",
        metavar="FILE",
        help="GGUF file of the language model. Without it, the built-in tiny one answers, which "
        "knows only the drawn scenes of the demo.",
    ),
]
ProjectorFile = Annotated[
    Path | None,
    _flag("--mmproj", metavar="FILE", help="GGUF file of the model's image projector (mmproj)."),
]
RepositoryName = Annotated[
    str | None,
    _flag(
        "--hf-repo",
        "-hf",
        metavar="REPO",
        help="Instead of -m and --mmproj, files of a repository on the Hugging Face hub, "
        "downloaded once: owner/repo:QUANT, or owner/repo alone for Q4_K_M, else Q8_0, else the "
        "first. HF_TOKEN opens private ones.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """A model pair and the context it runs in."""

    model: ModelFile = None
    mmproj: ProjectorFile = None
    hf_repo: RepositoryName = None
    ctx_size: Annotated[
        int,
        _flag(
            "--ctx-size",
            "-c",
            min=0,
            metavar="N",
            help="Room for tokens: the prompt counts once, the part behind its first image twice, "
            "each token of the answer twice; 0 = what the model was trained with.",
        ),
    ] = 4096
    n_gpu_layers: GpuLayers = -1
    device: DeviceNames = None
    split_mode: SplitModeName = "layer"
    tensor_split: TensorSplit = None
    main_gpu: MainGpu = 0
    no_kv_offload: NoKvOffload = False
    no_mmproj_offload: NoMmprojOffload = False
    threads: Annotated[
        int,
        _flag(
            "--threads",
            "-t",
            min=0,
            max=512,
            metavar="N",
            help="CPU threads; 0 = all usable CPUs up to 4, else half of them. 1 where other "
            "programs keep the CPUs busy.",
        ),
    ] = 0
    ubatch_size: Annotated[
        int | None,
        _flag(
            "--ubatch-size",
            "-ub",
            min=8,
            max=65536,
            metavar="N",
            help="Most prompt tokens in one step. Default: 512, or what a picture needs where the "
            "model decodes it at once (see info).",
        ),
    ] = None
    flash_attn: Annotated[
        FlashAttention,
        _flag("--flash-attn", "-fa", help="Flash attention; auto = where it is supported."),
    ] = "auto"
    cache_type_k: Annotated[
        CacheType,
        _flag(
            "--cache-type-k",
            "-ctk",
            metavar="TYPE",
            help=f"Number type of cached keys: {', '.join(get_args(CacheType))}.",
        ),
    ] = "f16"
    cache_type_v: Annotated[
        CacheType,
        _flag(
            "--cache-type-v",
            "-ctv",
            metavar="TYPE",
            help="Number type of cached values; the q types need flash attention.",
        ),
    ] = "f16"
    chat_template: Annotated[
        str | None,
        _flag(
            "--chat-template",
            metavar="TEMPLATE",
            help="vicuna, mistral, chatml or a Jinja text. Default: the model's own, vicuna if it "
            "has none.",
        ),
    ] = None
    no_think: Annotated[
        bool,
        _flag(
            "--no-think",
            help="Answer without reasoning first, where the chat template leaves that open: short "
            "for --template-kwargs '{\"enable_thinking\": false}'.",
        ),
    ] = False
    chat_template_kwargs: Annotated[
        str,
        _flag(
            "--template-kwargs",
            metavar="JSON",
            help="An object of what the chat template sees besides the messages.",
        ),
    ] = "{}"
    pairing: Annotated[
        Pairing,
        _flag(
            "--pairing",
            help="pair = both branches of guidance in one context, contexts = one each (twice the "
            "memory and time), auto = pair where the model allows it.",
        ),
    ] = "auto"
    prefix_cells: Annotated[
        int | None,
        _flag(
            "--prefix-cells",
            min=0,
            metavar="N",
            help="How much of -c may stay with past prompts, for those that begin alike; 0 = "
            "nothing. Default: half.",
        ),
    ] = None
    strategy: Annotated[
        Strategy | None,
        _flag(
            "--strategy",
            help="When the degraded branch is decoded: auto = at every token or only where more "
            "than one is plausible, whichever is cheaper by the clock; exact = at every token, so "
            "that the same request gives the same bits; approximate = where more than one token is "
            "plausible and never for those before (cheaper, other tokens). Default: auto, but in "
            "eval and caption exact.",
        ),
    ] = None
    stock_encoder: Annotated[
        bool,
        _flag(
            "--stock-encoder",
            help="Leave the image encoder as llama.cpp has it, also where it is known not to do "
            "what the model was trained with (see info).",
        ),
    ] = False
    max_pixels: Annotated[
        int | None,
        _flag(
            "--max-pixels",
            min=1,
            metavar="N",
            help="Largest width times height of an image. Default: 64 million, of a JPEG 256 "
            "million, for it is scaled while it is read.",
        ),
    ] = None
    image_min_tokens: Annotated[
        int | None,
        _flag(
            "--image-min-tokens",
            min=1,
            metavar="N",
            help="Fewest tokens of an image, for models that take any resolution. Default: the "
            "model's own.",
        ),
    ] = None
    image_max_tokens: Annotated[
        int | None,
        _flag(
            "--image-max-tokens",
            min=1,
            metavar="N",
            help="Most tokens of an image, for such models. Default: the model's own, but no more "
            "than half of -c.",
        ),
    ] = None
    verbose: Annotated[
        bool, _flag("--verbose", "-v", help="Show llama.cpp's log on standard error.")
    ] = False

    def open(
        self, progress: Progress | None = None, *, files: tuple[Path, Path] | None = None
    ) -> GuidedVLM:
        """The loaded model. files: what `pair` gave before. Raises CMGError; BadParameter where a
        file is not named."""
        from cmg_gguf.vlm import GuidedVLM

        return GuidedVLM(*(files or self.pair(progress)), **self.options(), progress=progress)

    def options(self) -> dict[str, Any]:
        """The flags as keyword arguments of `GuidedVLM`."""
        variables = self.template_variables
        return {
            "n_ctx": self.ctx_size,
            "n_ubatch": self.ubatch_size,
            "n_threads": self.threads,
            **self.placement,
            "offload_kqv": not self.no_kv_offload,
            "use_gpu": not self.no_mmproj_offload,
            "flash_attn": {"on": True, "off": False}.get(self.flash_attn),
            "type_k": self.cache_type_k,
            "type_v": self.cache_type_v,
            "chat_template": self.chat_template,
            **({"chat_template_kwargs": variables} if variables else {}),
            "pairing": self.pairing,
            "prefix_cells": self.prefix_cells,
            "encoder": "stock" if self.stock_encoder else "mended",
            **{name: value for name, value in self._where_given.items() if value is not None},
            "verbose": self.verbose,
        }

    @property
    def placement(self) -> dict[str, Any]:
        """On which devices the model lies: see `Placement`. Raises BadParameter."""
        named = self.n_gpu_layers, self.device, self.split_mode
        return placement(*named, self.tensor_split, self.main_gpu)

    @property
    def _where_given(self) -> dict[str, Any]:
        """Options that are `GuidedVLM`'s own default, or `eval`'s, where they are None."""
        return {
            "strategy": self.strategy,
            "max_pixels": self.max_pixels,
            "image_min_tokens": self.image_min_tokens,
            "image_max_tokens": self.image_max_tokens,
        }

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template sees besides the messages. Raises BadParameter."""
        try:
            given = json.loads(self.chat_template_kwargs)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise typer.BadParameter(
                f"{self.chat_template_kwargs!r} is no JSON object; write "
                "'{\"enable_thinking\": false}'",
                param_hint="'--template-kwargs'",
            )
        return {**given, "enable_thinking": False} if self.no_think else given

    @property
    def built_in(self) -> bool:
        """Whether the model that comes with the package is meant: none is named."""
        return self.model is None and self.mmproj is None and self.hf_repo is None

    @property
    def own_settings(self) -> Path | None:
        """File of the guidance settings that the model comes with."""
        from cmg_gguf.tiny.pair import settings_file

        return settings_file() if self.built_in else None

    def pair(self, progress: Progress | None = None) -> tuple[Path, Path]:
        """Model and projector file: the built-in pair where none is named. Downloads what is named
        by its repository.

        Raises BadParameter where only one is named, or both ways to name one are used; ModelError.
        """
        from cmg_gguf.hub import fetch_pair
        from cmg_gguf.tiny.pair import embedded_pair

        self.check()
        if self.hf_repo is not None:
            told = progress and partial(progress, "download")
            return fetch_pair(self.hf_repo, self.mmproj, progress=told)
        if self.model is not None and self.mmproj is not None:
            return self.model, self.mmproj
        return embedded_pair()

    def held_pair(self) -> tuple[Path, Path] | None:
        """What `pair` gives without a connection; None where something must be downloaded. Raises
        what `pair` raises."""
        from cmg_gguf.hub import held_pair

        self.check()
        return self.pair() if self.hf_repo is None else held_pair(self.hf_repo, self.mmproj)

    def check(self) -> None:
        """Raises what `pair` raises for flags that do not go together, and for names that are
        none."""
        from cmg_gguf.hub import split_name

        if self.hf_repo is not None:
            if self.model is not None:
                raise typer.BadParameter(
                    f"the model is {self.model.name} already; leave one of the two out",
                    param_hint="'--hf-repo' / '-hf'",
                )
            split_name(self.hf_repo)
        elif self.mmproj is not None and self.model is None:
            raise typer.BadParameter(
                "an image projector is only read with its model; name that too",
                param_hint="'--model' / '-m'",
            )
        elif self.model is not None and self.mmproj is None:
            raise typer.BadParameter(
                f"none is given; name the image projector that belongs to {self.model.name}",
                param_hint="'--mmproj'",
            )
