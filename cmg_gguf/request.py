"""What is asked of a model: one frozen value, checked once.

Request("Is there a fork?", ["kitchen.jpg"])
Request(messages, guidance=Guidance(alpha=2.0), max_tokens=64, stop=["\n"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, fields
from numbers import Integral
from typing import Any

from cmg_gguf.errors import CMGError, GuidanceError, PromptError, SamplingError, shown
from cmg_gguf.evidence import EvidenceModel, checked_evidence
from cmg_gguf.guidance import Guidance
from cmg_gguf.prompt.images import ImageSource
from cmg_gguf.prompt.templates import checked_variables
from cmg_gguf.sampling import LogitsProcessor, Sampling
from cmg_gguf.settings import Settings

Messages = Sequence[Mapping[str, Any]]
"""Chat messages as in OpenAI's API."""


@dataclass(frozen=True, eq=False)
class Contrast:
    """A degraded branch with a prompt of its own: another image, no image, another instruction.

        noised = Contrast("Is there a fork?", [noise])
        vlm.generate("Is there a fork?", [image], guidance=Guidance(alpha=1.0), contrast=noised)

    prompt, images: as in `Request`. strength: alpha of the draw behind n tokens, by n; None =
    `Guidance.alpha` for all.

    Raises PromptError or GuidanceError for what cannot be.
    """

    prompt: str | Messages
    images: Sequence[ImageSource] = ()
    strength: Callable[[int], float] | None = None

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, self.images)
        if self.strength is not None and not callable(self.strength):
            raise GuidanceError(
                f"strength={shown(self.strength)} is no function of the number of tokens said; "
                "write lambda n: 1.0, or leave it out for that of guidance=Guidance(alpha=1.0)"
            )


@dataclass(frozen=True, eq=False)
class Request:
    """One question and how to answer it.

    prompt: a question, or a list of chat messages; a media marker in it is just text. Where the
    last message is the assistant's, the answer goes on from it: its text is what is new. images:
    seen before the question; with messages, put them in there instead. guidance: see `Guidance`.
    contrast: None = the degraded branch is the same prompt with image tokens masked; else it is
    that prompt, unmasked, and of `guidance` alpha and beta alone count. sampling: greedy by
    default. max_tokens: at most this many; None = until the context is full. stop: strings that end
    the answer, also within its reasoning. raw: `prompt` is the full text for the model, without
    template: special tokens
    are special in it, and each "<__media__>" stands for one image. top_logprobs: None = no
    log-probabilities, else how many alternatives a token. logits_processors: change the logits that
    are drawn from, before everything else in the chain; called while other answers wait, so they
    must be quick. n_scores: of so many tokens from the first on, the reply has the scores of the
    whole vocabulary. evidence: how much the picture supports each token and word of the answer, see
    `cmg_gguf.evidence`: True = by weights that are not fitted, or weights that were
    (`load_settings(path).evidence`). The tokens are drawn as without; when the last is said, the
    answer is read once more with the picture hidden: behind the first image, prompt and answer
    count twice in n_ctx, and each token takes 4 bytes a token of the vocabulary until then, beyond
    64 MiB in a temporary file. salt: kept prompts and images are found by requests of the same salt
    alone. repeatable: the same request gives the same bits on this machine, whatever was asked
    before and is asked beside it: it waits until no answer is under way, lets all kept prompts go,
    and is made alone. chat_template_kwargs: what the chat template sees besides the messages, as
    {"enable_thinking": False}, in place of the model's own; a name that the template does not read
    changes nothing. heat: the reply has what each token attended to in the pictures; changes no
    token, and costs the attention of one row a layer again. What could take more than 1 GiB is
    refused.

    Raises PromptError, GuidanceError or SamplingError for what cannot be.
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
    evidence: bool | EvidenceModel = False
    salt: str | None = None
    repeatable: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    heat: bool = False

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, self.images)
        _check_settings(self)
        variables = checked_variables(self.chat_template_kwargs)
        object.__setattr__(self, "chat_template_kwargs", variables)
        if self.raw:
            _check_raw(self.prompt, self.contrast)
            if variables:
                raise PromptError(
                    f"chat_template_kwargs={shown(variables)} reaches no template with raw=True: "
                    "leave it out, or write the prompt as it should be"
                )
        object.__setattr__(self, "stop", checked_stops(self.stop))
        if self.max_tokens is not None and not (_is_whole(self.max_tokens) and self.max_tokens > 0):
            raise PromptError(
                f"max_tokens={shown(self.max_tokens)} is out of range: whole numbers from 1 up, or "
                "None for no limit"
            )
        top = self.top_logprobs
        if top is not None and not (_is_whole(top) and top >= 0):
            raise SamplingError(
                f"top_logprobs={shown(top)} is out of range: whole numbers from 0 up, or None"
            )
        if not (_is_whole(self.n_scores) and self.n_scores >= 0):
            raise SamplingError(
                f"n_scores={shown(self.n_scores)} is out of range: whole numbers from 0 up"
            )
        if checked_evidence(self.evidence) is not None and self.contrast is not None:
            raise PromptError(
                "evidence hides the picture in the branch that contrast gives another prompt: ask "
                "for one of them"
            )
        if self.salt is not None and not isinstance(self.salt, str):
            raise PromptError(
                f"salt={shown(self.salt)} is no string; write salt={str(self.salt)!r}"
            )

    @property
    def evidence_model(self) -> EvidenceModel | None:
        """The weights that `evidence` means; None = it is not asked for."""
        return checked_evidence(self.evidence)

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
    if not isinstance(stops, Iterable) or isinstance(stops, (bytes, bytearray, Mapping)):
        raise SamplingError(
            f'stop={shown(stops)} is neither a string nor a list of strings; write ["END"]'
        )
    listed = (stops,) if isinstance(stops, str) else tuple(stops)
    for i, stop in enumerate(listed):
        if not isinstance(stop, str) or not stop:
            raise SamplingError(
                f"stop string {i} is {shown(stop)}: it must be a string of at least 1 character"
            )
    return listed


def check_guidance(value: object) -> None:
    """Raises GuidanceError for what is no `Guidance`, with how to write what it seems to mean."""
    if isinstance(value, Guidance):
        return
    if isinstance(value, Settings):
        remedy = "it holds one: write settings.guidance"
    elif value is False:
        remedy = "for plain decoding write Guidance(alpha=0.0, beta=0.0)"
    else:
        remedy = f"write {_spelled(Guidance, 'alpha', value)}"
    raise GuidanceError(f"guidance={shown(value)} is no Guidance; {remedy}")


def _check_prompt(prompt: str | Messages, images: Sequence[ImageSource]) -> None:
    if isinstance(images, _BYTES) or not isinstance(images, Sequence):
        raise PromptError(f"images={shown(images)} is no list; {_as_list(images)}")
    if isinstance(prompt, str):
        return
    if isinstance(prompt, Mapping):
        raise PromptError(f"the prompt {shown(prompt)} is one message; write [message]")
    if isinstance(prompt, _BYTES) or not isinstance(prompt, Sequence):
        raise PromptError(
            f"the prompt is {shown(prompt)}: give a question as a string, or a list of messages"
        )
    if images:
        raise PromptError("with messages, images belong into the messages' content")


_BYTES = (str, bytes, bytearray, memoryview)
"""Sequences that are one thing: of characters or bytes."""


def _as_list(images: object) -> str:
    """How to write as a list what was meant as images."""
    if images is None:
        return "for no image leave it out"
    several = isinstance(images, Iterable) and not isinstance(images, (*_BYTES, Mapping))
    if several and getattr(images, "ndim", 4) == 4:  # an array of one image is three-dimensional
        return "write list(images)"
    return "for one image write [image]"


def _check_settings(request: Request) -> None:
    """Raises for a setting of another type, with how to write what it seems to mean."""
    check_guidance(request.guidance)
    if not isinstance(request.sampling, Sampling):
        raise SamplingError(
            f"sampling={shown(request.sampling)} is no Sampling; write "
            f"{_spelled(Sampling, 'temperature', request.sampling)}"
        )
    if request.contrast is not None and not isinstance(request.contrast, Contrast):
        raise PromptError(
            f"contrast={shown(request.contrast)} is no Contrast; write Contrast(prompt, images)"
        )
    for name in ("raw", "repeatable", "heat"):
        if not isinstance(value := getattr(request, name), bool):
            raise PromptError(f"{name}={shown(value)} is neither True nor False; write one of them")
    if request.heat and request.contrast is not None:
        raise PromptError(
            "heat=True shows what one prompt's images got, and contrast= has two prompts; leave "
            "one of them out"
        )
    processors = request.logits_processors
    if not isinstance(processors, Sequence):
        remedy = "write [process]" if callable(processors) else "write [] for none"
        raise SamplingError(f"logits_processors={shown(processors)} is no list; {remedy}")
    for i, process in enumerate(processors):
        if not callable(process):
            raise SamplingError(
                f"logits processor {i} is {shown(process)}: give a function, (tokens, logits) -> "
                "logits"
            )


def _spelled(kind: type[Guidance] | type[Sampling], first: str, value: object) -> str:
    """The call that makes a `kind` of a dictionary or of a number, its field `first`."""
    given = value if isinstance(value, Mapping) else {first: value}
    with suppress(CMGError, TypeError):
        kind(**given)
        return f"{kind.__name__}({', '.join(f'{name}={v!r}' for name, v in given.items())})"
    return f"{kind.__name__}({first}=1.0)"


def _check_raw(prompt: str | Messages, contrast: Contrast | None) -> None:
    if not all(isinstance(p, str) for p in (prompt, *([contrast.prompt] if contrast else []))):
        raise PromptError("raw=True takes the prompt as one text, not as messages")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
