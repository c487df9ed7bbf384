"""What is wanted of a captioned folder: one frozen value, checked once."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, get_args

from cmg_gguf.captioning.texts import check_placeholders, reads_tags
from cmg_gguf.errors import CaptionError, shown
from cmg_gguf.evaluation.items import WHOLE, Shard
from cmg_gguf.evidence import EvidenceModel
from cmg_gguf.guidance import Guidance
from cmg_gguf.sampling import Sampling

Layout = Literal["txt", "jsonl", "kohya-json", "metadata.jsonl"]
Existing = Literal["skip", "overwrite", "append"]

PROMPT = "Describe the image."
MAX_TOKENS = 256


@dataclass(frozen=True)
class Captions:
    """How a folder is captioned.

    prompt: what is asked about each picture; {name} in it stands for the file's name without its
    suffix, {directory} for the name of the folder it lies in, {tags} for what its .txt file holds
    already. max_words: asked for in the prompt, and a longer caption is cut at the end of a
    sentence. prefix, suffix: put around each caption, with a space between. recursive: pictures of
    the folders in the folder too. to: the files that are written, as `cmg_gguf.captioning.layouts`
    tells. existing: what happens to a picture that has a caption there. limit: the first so many
    pictures alone. shard: this part of the pictures, for one machine of several. max_tokens: of an
    answer, at most; what that cuts off ends at its last whole sentence, if it has one.
    sampling.seed: each picture draws by its own name and this. evidence: weights by which captions
    are put in order for a review, see `cmg_gguf.captioning.review`; None = no review is written.

    Raises CaptionError for what cannot be.
    """

    prompt: str = PROMPT
    _: KW_ONLY
    max_words: int | None = None
    prefix: str = ""
    suffix: str = ""
    recursive: bool = False
    to: Layout = "txt"
    existing: Existing = "skip"
    limit: int | None = None
    shard: Shard = WHOLE
    guidance: Guidance = field(default_factory=Guidance)
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = MAX_TOKENS
    evidence: EvidenceModel | None = None

    def __post_init__(self) -> None:
        for name, kind in (("to", Layout), ("existing", Existing)):
            if getattr(self, name) not in get_args(kind):
                raise CaptionError(
                    f"{name}={shown(getattr(self, name))} is unknown: {', '.join(get_args(kind))}"
                )
        for name in ("max_words", "limit", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CaptionError(f"{name}={value} is out of range: 1 and up")
        for name in ("prompt", "prefix", "suffix"):
            if not isinstance(getattr(self, name), str):
                raise CaptionError(f"{name}={shown(getattr(self, name))} is no string")
        if not self.prompt.strip():
            raise CaptionError(f"the prompt is empty: ask something, such as {PROMPT!r}")
        if not isinstance(self.evidence, EvidenceModel | None):
            raise CaptionError(
                f"evidence={shown(self.evidence)} is no EvidenceModel: write EvidenceModel(), or "
                "load_settings(path).evidence for weights that were fitted"
            )
        check_placeholders(self.prompt)
        if reads_tags(self.prompt) and (self.to, self.existing) == ("txt", "skip"):
            raise CaptionError(
                "{tags} in the prompt is always empty here, for pictures with a .txt file are "
                "skipped: write existing=overwrite or append (--existing), or another layout (--to)"
            )
