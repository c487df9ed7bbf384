"""From messages to one prompt text with a marker for each image, and the images in order.

    template = ChatTemplate.named("vicuna")
    prompt = render_messages(messages, template, marker="<image-5f0c...>")
    prompt.text      # "... USER: <image-5f0c...>\\nWhat is this?\\nASSISTANT: "
    prompt.images    # one source for each marker

Text never becomes an image: the marker is the caller's secret, and images are told apart while
the template runs, so one that drops, repeats or swaps them is found out. Nor does it become a
special token: where a message spells one, `prompt.seams` says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmg_gguf.errors import PromptError, shown
from cmg_gguf.prompt.images import ImageSource
from cmg_gguf.prompt.specials import Specials
from cmg_gguf.prompt.templates import ChatTemplate, Message, text_part

ROLES = ("system", "user", "assistant", "tool")
NO_SPECIALS = Specials()

_SEAM = "seam"


@dataclass(frozen=True)
class Rendered:
    """A prompt: its text with one marker an image, and the image sources in that order.

    seams: offsets in the text over which no special token reaches: each is within one that a
    message spells, where it is characters.
    """

    text: str
    images: list[ImageSource]
    seams: tuple[int, ...] = ()


def render_messages(
    messages: Sequence[Message],
    template: ChatTemplate,
    *,
    marker: str,
    specials: Specials = NO_SPECIALS,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Rendered:
    """Return the prompt of `messages`: their text with `marker` where each image stands.

    A content is a string, or a list of parts that are joined without anything between, except
    that an image is followed by a newline if more follows:

        {"type": "text", "text": str}
        {"type": "image_url", "image_url": str | {"url": str}}
        {"type": "image", "image": any ImageSource}

    Args:
        marker: a random string, so that no text can contain it.
        specials: the special tokens that only the template may write. One that begins in one
            message and ends in another is not noticed, nor one of a single character.
        variables: see `ChatTemplate.render`; what they say is text, as what messages say is.

    Raises:
        PromptError: there is no message, a message has another form or role, a text contains the
            marker, the template fails, writes nothing, changes the letters of a special token that
            a message spells, or does not write each image exactly once and in order.
    """
    if not marker:
        raise PromptError("the image marker is empty: give a random string")
    if not messages:
        raise PromptError("there are 0 messages: give at least 1")
    images: list[ImageSource] = []
    flat = [_flat(message, i, marker, images) for i, message in enumerate(messages)]
    seam = _mark(marker, _SEAM)
    flat = [{**_broken(message, specials, seam), "role": message["role"]} for message in flat]
    text = template.render(
        flat,
        add_generation_prompt,
        tools=_broken(tools, specials, seam),
        variables=_broken(variables, specials, seam),
    )
    if not text.strip():
        raise PromptError(
            f"the chat template made an empty prompt of {len(flat)} messages: give messages with "
            "text, or another template"
        )
    return _with_markers(text, marker, images)


def _flat(message: Message, i: int, marker: str, images: list[ImageSource]) -> dict[str, Any]:
    """Return the message with its content as a string, and append its images to `images`."""
    if not isinstance(message, Mapping):
        raise PromptError(f'message {i} is {shown(message)}: it must be {{"role":, "content":}}')
    role = message.get("role")
    if role not in ROLES:
        raise PromptError(
            f"message {i} has the role {shown(role)}: it must be one of {', '.join(ROLES)}"
        )
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""  # a turn that only calls tools
    if isinstance(content, str):
        content = [text_part(content)]
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray, memoryview)):
        raise PromptError(
            f"message {i} has the content {shown(content)}: it must be a string or a list of parts"
        )
    before = len(images)
    pieces = [_piece(part, f"message {i}, part {j}", images) for j, part in enumerate(content)]
    text = "".join(piece for piece in pieces if piece is not None)
    if marker in text:
        raise PromptError(
            f"message {i} contains the image marker {shown(marker)}: draw another random marker"
        )
    return {**message, "content": _joined(pieces, marker, before)}


def _piece(part: object, where: str, images: list[ImageSource]) -> str | None:
    """Return the text of a part; None for an image, which is appended to `images`."""
    if not isinstance(part, Mapping):
        raise PromptError(f'{where} is {shown(part)}: it must be {{"type": ...}}')
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise PromptError(f"{where} has the text {shown(part.get('text'))}: give a string")
        return str(part["text"])
    if kind == "image_url":
        url = part.get("image_url")
        if isinstance(url, Mapping):
            url = url.get("url")
        if not isinstance(url, str) or not url:
            raise PromptError(
                f"{where} has the image_url {shown(part.get('image_url'))}: give a string or "
                '{"url": string}'
            )
        images.append(url)
        return None
    if kind == "image":
        if part.get("image") is None:
            raise PromptError(f"{where} has no image: give a path, bytes, a PIL image or an array")
        images.append(part["image"])
        return None
    raise PromptError(
        f"{where} has the type {shown(kind)}: it must be one of text, image_url, image"
    )


def _joined(pieces: Sequence[str | None], marker: str, i_image: int) -> str:
    """Return the pieces as one text; each None becomes the next image's own mark."""
    text = ""
    after_image = False
    for piece in pieces:
        if piece == "":
            continue
        if after_image:
            text += "\n"
        after_image = piece is None
        if piece is None:
            piece = _mark(marker, i_image)
            i_image += 1
        text += piece
    return text


def _mark(marker: str, i_image: int | str) -> str:
    return f"{marker}#{i_image}#"


def _broken(value: Any, specials: Specials, seam: str) -> Any:
    """Return the value with `seam` in each special token that a string in it spells."""
    if isinstance(value, str):
        return specials.broken(value, seam)
    if isinstance(value, Mapping):
        return {key: _broken(item, specials, seam) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_broken(item, specials, seam) for item in value]
    return value


def _with_markers(marked: str, marker: str, images: list[ImageSource]) -> Rendered:
    """Return the text with the plain marker for each image's own mark, once all are in place."""
    pieces = re.split(_mark(re.escape(marker), rf"(\d+|{_SEAM})"), marked)
    text, runs, found, seams = pieces[0], [pieces[0]], list[int](), list[int]()
    for label, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if label == _SEAM:
            seams.append(len(text))
            runs[-1] += piece
        else:
            found.append(int(label))
            text += marker
            runs.append(piece)
        text += piece
    if found != list(range(len(images))):
        raise PromptError(
            f"the chat template wrote the images {found} instead of {list(range(len(images)))}: "
            "use one that writes the content of each message exactly once and in order"
        )
    # A marker can also arise elsewhere: in a message's name, or across the edge of two texts.
    if text.split(marker) != runs:
        raise PromptError(
            f"the prompt contains the image marker {shown(marker)} outside of its {len(images)} "
            "images: draw another random marker"
        )
    if marker.lower() in "\n".join(runs).lower():
        raise PromptError(
            "the chat template changes the letters of a special token that a message spells: "
            "leave that token out, or use another template"
        )
    return Rendered(text, images, tuple(seams))
