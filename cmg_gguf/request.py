"""What is asked of a model: one frozen value, checked once.

Request("Is there a fork?", ["kitchen.jpg"])
Request(messages, guidance=Guidance(alpha=2.0), max_tokens=64, stop=["\n"])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

from cmg_gguf.errors import PromptError, SamplingError, shown
from cmg_gguf.guidance import Guidance
from cmg_gguf.prompt.images import ImageSource
from cmg_gguf.sampling import LogitsProcessor, Sampling

Messages = Sequence[Mapping[str, Any]]
"""Chat messages as in OpenAI's API."""


@dataclass(frozen=True, eq=False)
class Contrast:
    """A degraded branch with a prompt of its own: another image, no image, another instruction.

        noised = Contrast("Is there a fork?", [noise])
        vlm.generate("Is there a fork?", [image], guidance=Guidance(alpha=1.0), contrast=noised)

    prompt, images: as in `Request`. strength: alpha of the draw behind n tokens, by n; None =
    `Guidance.alpha` for all.
    """

    prompt: str | Messages
    images: Sequence[ImageSource] = ()
    strength: Callable[[int], float] | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """One question and how to answer it.

    prompt: a question, or a list of chat messages; a media marker in it is just text. images: seen
    before the question; with messages, put them in there instead. guidance: see `Guidance`.
    contrast: None = the degraded branch is the same prompt with image tokens masked; else it is
    that prompt, unmasked, and of `guidance` alpha and beta alone count. sampling: greedy by
    default. max_tokens: at most this many; None = until the context is full. stop: strings that end
    the answer. raw: `prompt` is the full text for the model, without template: special tokens
    are special in it, and each "<__media__>" stands for one image. top_logprobs: None = no
    log-probabilities, else how many alternatives a token. logits_processors: change the logits that
    are drawn from, before everything else in the chain; called while other answers wait, so they
    must be quick. n_scores: of so many tokens from the first on, the reply has the scores of the
    whole vocabulary. salt: kept prompts and images are found by requests of the same salt alone.

    Raises PromptError or SamplingError for what cannot be.
    """

    prompt: str | Messages
    images: Sequence[ImageSource] = ()
    _: KW_ONLY
    guidance: Guidance = field(default_factory=Guidance)
    contrast: Contrast | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    raw: bool = False
    top_logprobs: int | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    n_scores: int = 0
    salt: str | None = None

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, self.images, raw=self.raw)
        if self.contrast is not None:
            _check_prompt(self.contrast.prompt, self.contrast.images, raw=self.raw)
        object.__setattr__(self, "stop", checked_stops(self.stop))
        if self.max_tokens is not None and self.max_tokens < 1:
            raise PromptError(
                f"max_tokens={self.max_tokens} is out of range: 1 and up, or None for no limit"
            )
        if self.n_scores < 0:
            raise SamplingError(f"n_scores={self.n_scores} is out of range: 0 and up")
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise SamplingError(f"top_logprobs={self.top_logprobs} is out of range: 0 and up")

    @property
    def strength(self) -> Callable[[int], float] | None:
        """alpha of the draw behind n tokens, by n; None = `Guidance.alpha` for all."""
        return None if self.contrast is None else self.contrast.strength


def request_from(
    prompt: str | Messages | Request, images: Sequence[ImageSource], settings: Mapping[str, Any]
) -> Request:
    """The request that was made before, or one of these; a setting that is None is the default.

    Raises TypeError for a setting that there is not, or one beside a `Request`.
    """
    if isinstance(prompt, Request):
        if images or settings:
            raise TypeError("a Request holds its images and settings; give nothing beside it")
        return prompt
    known = [f.name for f in fields(Request) if f.name not in ("prompt", "images")]
    for name in settings:
        if name not in known:
            raise TypeError(
                f"there is no setting {name!r}: there are {', '.join(known)}; temperature and its "
                "like are settings of sampling=Sampling(...)"
            )
    given = {name: value for name, value in settings.items() if value is not None}
    return Request(prompt, images, **given)


def checked_stops(stops: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings as a tuple. Raises SamplingError for one that is empty or no string."""
    if stops is None:
        return ()
    listed = (stops,) if isinstance(stops, str) else tuple(stops)
    for i, stop in enumerate(listed):
        if not isinstance(stop, str) or not stop:
            raise SamplingError(
                f"stop string {i} is {shown(stop)}: it must be a string of at least 1 character"
            )
    return listed


def _check_prompt(prompt: str | Messages, images: Sequence[ImageSource], *, raw: bool) -> None:
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise PromptError("images is a list; for one image give [image]")
    if isinstance(prompt, str):
        return
    if raw:
        raise PromptError("raw=True takes the prompt as one text, not as messages")
    if images:
        raise PromptError("with messages, images belong into the messages' content")
