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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cmg_gguf.errors import PromptError, shown
from cmg_gguf.prompt.continuing import continued, is_continued
from cmg_gguf.prompt.parts import Picture, Text, attached, read_part
from cmg_gguf.prompt.sources import ImageSource
from cmg_gguf.prompt.specials import Specials
from cmg_gguf.prompt.templates import ChatTemplate, Message

ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {"developer": "system"}
"""What a role is called elsewhere."""
NO_SPECIALS = Specials()

_SEAM, _END = "seam", "end"


@dataclass(frozen=True)
class Rendered:
    """A prompt: its text with one marker an image, and the image sources in that order.

    seams: offsets in the text over which no special token reaches: each is within one that a
    message spells, where it is characters. said: what the assistant has said already of the answer
    that is asked for, see `render_messages`; the text ends with it.
    """

    text: str
    images: list[ImageSource]
    seams: tuple[int, ...] = ()
    said: str = ""


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

    and in the other spellings of `cmg_gguf.prompt.parts`. Pictures in a message's `images`, a list
    as Ollama has it, stand ahead of its content. The role "developer" is "system".

    An assistant's message that is the last is where the answer goes on: the text ends with it,
    to the last space, and without what the template writes behind it.

    Args:
        marker: a random string, so that no text can contain it.
        specials: the special tokens that only the template may write. One that begins in one
            message and ends in another is not noticed, nor one of a single character.
        add_generation_prompt: False = nothing is asked for: every message is closed.
        variables: see `ChatTemplate.render`; what they say is text, as what messages say is.

    Raises:
        PromptError: there is no message, a message has another form or role, a text contains the
            marker, the template fails, writes nothing, changes the letters of a special token that
            a message spells, or does not write each image exactly once and in order; or the last
            message is an assistant's and cannot be gone on with.
    """
    if not marker:
        raise PromptError("the image marker is empty: give a random string")
    if not messages:
        raise PromptError("there are 0 messages: give at least 1")
    images: list[ImageSource] = []
    flat = [_flat(message, i, marker, images) for i, message in enumerate(messages)]
    seam = _mark(marker, _SEAM)
    said = flat[-1]["content"] if is_continued(flat, add_generation_prompt) else ""
    flat = [{**_broken(message, specials, seam), "role": message["role"]} for message in flat]
    render = partial(
        template.render,
        tools=_broken(tools, specials, seam),
        variables=_broken(variables, specials, seam),
    )
    if said:
        text = continued(render, flat, _mark(marker, _END))
    else:
        text = render(flat, add_generation_prompt)
    return replace(_with_markers(text, marker, images), said=said)


def _flat(message: Message, i: int, marker: str, images: list[ImageSource]) -> dict[str, Any]:
    """Return the message with its content as a string, and append its images to `images`."""
    if not isinstance(message, Mapping):
        raise PromptError(f'message {i} is {shown(message)}: it must be {{"role":, "content":}}')
    role = message.get("role")
    role = OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        known = ", ".join((*ROLES, *OTHER_NAMES))
        raise PromptError(f"message {i} has the role {shown(role)}: it must be one of {known}")
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""  # a turn that only calls tools
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray, memoryview)):
        raise PromptError(
            f"message {i} has the content {shown(content)}: it must be a string or a list of parts"
        )
    parts: list[Text | Picture] = [*attached(message, f"message {i}")]
    if isinstance(content, str):
        parts.append(Text(content))
    else:
        parts += [read_part(part, f"message {i}, part {j}") for j, part in enumerate(content)]
    if marker in "".join(part.text for part in parts if isinstance(part, Text)):
        raise PromptError(
            f"message {i} contains the image marker {shown(marker)}: draw another random marker"
        )
    text = _joined(parts, marker, len(images))
    images += [part.source for part in parts if isinstance(part, Picture)]
    others = {key: value for key, value in message.items() if key != "images"}
    return {**others, "role": role, "content": text}


def _joined(parts: Sequence[Text | Picture], marker: str, i_image: int) -> str:
    """Return the parts as one text; each picture becomes the next image's own mark."""
    text = ""
    after_image = False
    for part in parts:
        if isinstance(part, Text) and not part.text:
            continue
        if after_image:
            text += "\n"
        after_image = isinstance(part, Picture)
        if isinstance(part, Text):
            text += part.text
        else:
            text += _mark(marker, i_image)
            i_image += 1
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
    if not marked.strip():
        raise PromptError(
            "the chat template made an empty prompt of the messages: give messages with text, or "
            "another template"
        )
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
