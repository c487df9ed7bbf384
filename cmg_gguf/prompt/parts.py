"""What a message's content is made of, in every spelling that clients use: text, and pictures.

    read_part({"type": "text", "text": "What is this?"}, "part 0")     # Text("What is this?")
    read_part({"type": "image_url", "image_url": {"url": "a.png"}}, "part 0")  # Picture("a.png")
    attached({"role": "user", "content": "", "images": ["a.png"]}, "message 0")  # its `images`

A key that sounds like a picture or another file and is not read is an error: dropped, it would let
the model answer blind. So is a limit of one picture's size (Transformers' `max_pixels`): limits are
the model's, for all pictures alike. OpenAI's `detail` is taken and changes nothing: a picture is
always seen as finely as those limits allow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmg_gguf.errors import PromptError, shown
from cmg_gguf.prompt.sources import ImageSource

TEXTS = ("text", "input_text", "output_text")
PICTURES = ("image_url", "input_image", "image")
"""Types of parts: of OpenAI's chat completions and responses, of Anthropic and Transformers."""

_FILES = frozenset(
    (
        *("image", "img", "picture", "pic", "photo", "video", "frame", "audio", "sound"),
        *("file", "attachment", "media", "pdf", "blob"),
    )
)
"""Words of which a key's name has one where it seems to hold a picture or another file..."""
_ABOUT = frozenset(("type", "name", "format", "size", "count"))
"""...and none of these, with which it only says something about one."""

_LIMITS = frozenset(("pixel", "resize", "resized", "crop"))
"""Words of which a picture's key has one where it seems to limit or change its size."""

_WORDS = re.compile(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]+")


@dataclass(frozen=True)
class Text:
    """Some text."""

    text: str


@dataclass(frozen=True, eq=False)
class Picture:
    """Where a picture comes from."""

    source: ImageSource


def attached(message: Mapping[str, Any], where: str) -> list[Picture]:
    """Return the pictures of a message's key `images`, as Ollama has it: a list of sources.

    Raises:
        PromptError: it is no list or has no source in it, or another key seems to hold a file.
    """
    _check_unread(message, ("images",), where)
    images = message.get("images")
    if images is None:
        return []
    if isinstance(images, (str, bytes, bytearray, memoryview)) or not isinstance(images, Sequence):
        raise PromptError(f"{where} has the images {shown(images)}: give a list, as [image]")
    return [
        Picture(_given(image, "image", f"{where}, image {i}")) for i, image in enumerate(images)
    ]


def read_part(part: object, where: str) -> Text | Picture:
    """Return what a part of a content holds.

    Raises:
        PromptError: it has another form, lacks its text or picture, or another key seems to hold a
            file.
    """
    if not isinstance(part, Mapping):
        raise PromptError(f'{where} is {shown(part)}: it must be {{"type": ...}}')
    kind = part.get("type")
    if kind in TEXTS:
        _check_unread(part, (), where)
        if not isinstance(part.get("text"), str):
            raise PromptError(f"{where} has the text {shown(part.get('text'))}: give a string")
        return Text(str(part["text"]))
    if kind in PICTURES:
        return Picture(_picture(part, str(kind), where))
    raise PromptError(
        f"{where} has the type {shown(kind)}: it must be one of {', '.join((*TEXTS, *PICTURES))}"
    )


def _picture(part: Mapping[str, Any], kind: str, where: str) -> ImageSource:
    keys = tuple(_READERS) if kind == "image" else ("image_url",)
    _check_unread(part, keys, where)
    for holder in (part, *(part[key] for key in keys if isinstance(part.get(key), Mapping))):
        _check_unlimited(holder, where)
    given = [key for key in keys if part.get(key) is not None]
    if kind != "image":
        return _url(part.get("image_url"), "image_url", where)
    if not given:
        raise PromptError(
            f"{where} has no image: give a path, bytes, a PIL image or an array as one of "
            f"{', '.join(keys)}"
        )
    if len(given) > 1:
        raise PromptError(f"{where} has {' and '.join(given)}: give one of them")
    return _READERS[given[0]](part[given[0]], given[0], where)


def _given(value: Any, key: str, where: str) -> ImageSource:
    if value is None or isinstance(value, Mapping) or (isinstance(value, str) and not value):
        raise PromptError(
            f"{where} has the {key} {shown(value)}: give a path, a URL, base64, bytes, an open "
            "file, a PIL image or an array"
        )
    source: ImageSource = value
    return source


def _url(value: Any, key: str, where: str) -> str:
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or not url:
        raise PromptError(
            f'{where} has the {key} {shown(value)}: give a string or {{"url": string}}'
        )
    return url


def _path(value: Any, key: str, where: str) -> ImageSource:
    if isinstance(value, str) and value:
        return Path(value)
    return _given(value, key, where)


def _base64(value: Any, key: str, where: str) -> str:
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{where} has the {key} {shown(value)}: give base64 as a string")
    return text if text[:5].lower() == "data:" else f"data:;base64,{text}"


def _anthropic(value: Any, key: str, where: str) -> ImageSource:
    """A `source` as Anthropic's API has it; any other is what "image" takes."""
    if not isinstance(value, Mapping):
        return _given(value, key, where)
    if value.get("type") == "base64":
        return _base64(value.get("data"), f"{key}'s data", where)
    if value.get("type") == "url":
        return _url(value.get("url"), f"{key}'s url", where)
    raise PromptError(
        f'{where} has the {key} {shown(value)}: give {{"type": "base64", "data": string}} or '
        '{"type": "url", "url": string}'
    )


_READERS: dict[str, Callable[[Any, str, str], ImageSource]] = {
    "image": _given,
    "url": _url,
    "path": _path,
    "base64": _base64,
    "source": _anthropic,
    "data": _base64,
    "image_url": _url,
}
"""Keys of which an image part has one, and what reads it."""


def _check_unread(holder: Mapping[str, Any], read: Sequence[str], where: str) -> None:
    """Raise where a key that is not read seems to hold a file, and holds more than a number."""
    for key, value in holder.items():
        if key in read or key == "type" or not isinstance(key, str) or _is_nothing(value):
            continue
        words = _words(key)
        if words & _FILES and not words & _ABOUT:
            raise PromptError(
                f"{where} has {shown(key)}, which is not read: give pictures as parts of the "
                'content, {"type": "image", "image": source}, or as "images": [source]'
            )


def _check_unlimited(holder: Mapping[str, Any], where: str) -> None:
    """Raise where a key of a picture seems to limit its size."""
    for key, value in holder.items():
        if isinstance(key, str) and value is not None and _words(key) & _LIMITS:
            raise PromptError(
                f"{where} has {shown(key)}, which is not read: sizes are limited for all pictures "
                "of a model alike, by max_pixels, image_min_tokens and image_max_tokens "
                "(--max-pixels, --image-max-tokens)"
            )


def _words(key: str) -> set[str]:
    """The words of a key's name, in lower case, as they are and without an s at their end."""
    words = {word.lower() for word in _WORDS.findall(key)}
    return words | {word.removesuffix("s") for word in words}


def _is_nothing(value: object) -> bool:
    if isinstance(value, list | tuple | dict):
        return not value
    return value is None or isinstance(value, bool | int | float)
