"""From a question, messages or a whole text to the tokenised prompt of a model pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cmg_gguf.errors import PromptError
from cmg_gguf.llama.projector import Projector
from cmg_gguf.prompt.images import ImageSource, image_id, load_image
from cmg_gguf.prompt.messages import Rendered, render_messages
from cmg_gguf.prompt.reasoning import closing_mark
from cmg_gguf.prompt.segments import Prompt
from cmg_gguf.prompt.templates import ChatTemplate, Message

RAW_MARKER = "<__media__>"


def tokenized(
    prompt: str | Sequence[Message],
    images: Sequence[ImageSource] = (),
    *,
    raw: bool = False,
    salt: str | None = None,
    variables: Mapping[str, Any] | None = None,
    template: ChatTemplate,
    projector: Projector,
    max_pixels: int | None = None,
) -> Prompt:
    """The prompt in tokens; its images are read, but not encoded.

    prompt: a question, put behind `images` into a user's turn; or messages, which hold their
    images; where the last is the assistant's, the answer goes on from it. What they say stays text:
    neither "<__media__>" nor the spelling of a special token means anything in it. raw: the prompt
    is the full text for the model, in which special tokens are special and each "<__media__>"
    stands for one of `images`. salt: what is kept of it is found by prompts of the same salt alone.
    variables: of the template, see `ChatTemplate.render`. max_pixels: see `load_image`. Raises
    PromptError, ImageError.
    """
    model, marker = projector.model, projector.marker
    if raw:
        if not isinstance(prompt, str):
            raise PromptError("raw=True takes the prompt as one text, not as messages")
        rendered = Rendered(prompt.replace(RAW_MARKER, marker), list(images))
    else:
        messages = prompt if not isinstance(prompt, str) else _turn(prompt, images)
        rendered = render_messages(
            messages, template, marker=marker, specials=model.specials, variables=variables
        )
    pixels = [load_image(source, max_pixels=max_pixels) for source in rendered.images]
    tokens = projector.tokenize(
        rendered.text,
        pixels,
        ids=[_salted(image_id(rgb), salt) for rgb in pixels],
        salt=salt,
        add_bos=not _begins_with(model.special_text("bos"), rendered),
        seams=rendered.seams,
    )
    closing = closing_mark(rendered.text, rendered.said)
    return replace(tokens, closing=closing, is_begun=bool(rendered.said))


def _salted(key: str, salt: str | None) -> str:
    return key if salt is None else f"{key} of {salt}"


def _turn(question: str, images: Sequence[ImageSource]) -> list[Message]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def _begins_with(bos: str, prompt: Rendered) -> bool:
    """Whether the template, or who wrote the whole text, has put the BOS token there."""
    spelled = any(0 < seam < len(bos) for seam in prompt.seams)
    return bool(bos) and prompt.text.startswith(bos) and not spelled
