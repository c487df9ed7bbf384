"""Which pictures a request may name: the one place where a request reaches files or hosts.

    await Media().resolved(messages)                          # data: URLs and base64, nothing else
    await Media(folder=Path("/pictures")).resolved(messages)  # and files below that folder
    await Media(hosts=[Host.of("pics.example.org")]).resolved(messages)  # and that host's

What is handed on holds every picture itself and names none. A picture that is named and cannot be
had is told in the same words, whatever is there: a client learns nothing of files and hosts. Why
goes to this module's log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from cmg_gguf.errors import ImageError, PromptError, shown
from cmg_gguf.prompt.images import load_image
from cmg_gguf.prompt.limits import checked_max_pixels
from cmg_gguf.prompt.parts import Picture, attached, read_part
from cmg_gguf.prompt.sources import ImageSource, image_of_base64
from cmg_gguf.server.files import read_below
from cmg_gguf.server.remote import Host, fetched, is_remote

MAX_BYTES = 32 << 20
MAX_PICTURES = 16
MAX_REQUEST_PIXELS = 128_000_000
"""Three bytes each, twice while the prompt is made: of each request that is read at once."""
SECONDS = 20.0

Pixels = NDArray[np.uint8]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Media:
    """What a request's pictures may be, besides data: URLs and base64.

    folder: files below it; None = none. hosts: whose http and https URLs are fetched. max_bytes: of
    a file or of what a host sends. max_pixels: of one picture, see `load_image`. max_pictures and
    max_request_pixels: of one request, as they are kept. seconds: for all of a request's.

    Raises ImageError for a folder that is none, and for limits that are not above 0.
    """

    folder: Path | None = None
    hosts: Sequence[Host] = ()
    max_bytes: int = MAX_BYTES
    max_pixels: int | None = None
    max_pictures: int = MAX_PICTURES
    max_request_pixels: int = MAX_REQUEST_PIXELS
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        checked_max_pixels(self.max_pixels)
        for name in ("max_bytes", "max_pictures", "max_request_pixels", "seconds"):
            if not getattr(self, name) > 0:
                raise ImageError(f"{name}={shown(getattr(self, name))} is out of range: above 0")
        if self.folder is not None:
            if not Path(self.folder).is_dir():
                raise ImageError(
                    f"media path {shown(str(self.folder))} is no folder: name one that is there"
                )
            object.__setattr__(self, "folder", Path(self.folder).resolve())

    async def resolved(self, messages: Any) -> Any:
        """The messages with each picture's pixels, an (H, W, 3) uint8 array, in place of what holds
        or names it.

        messages: as in `Request`, out of JSON. What is no list of messages is given back: it names
        no picture, and `Request` says what is wrong with it.

        Raises PromptError for too many pictures or pixels and what has another form (see
        `cmg_gguf.prompt.parts`), ImageError for a picture that is not allowed or cannot be had.
        """
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            return messages
        named = [found for i, message in enumerate(messages) for found in _pictures(message, i)]
        if len(named) > self.max_pictures:
            raise PromptError(
                f"the messages have {len(named)} pictures and the limit is {self.max_pictures}: "
                "send fewer"
            )
        taken: list[Pixels] = []
        with anyio.move_on_after(self.seconds) as limit:
            for source, where in named:
                taken.append(await _taken(source, where, self))
                self._check_together(taken)
        if limit.cancelled_caught:
            where = named[len(taken)][1]
            raise _refusal(f"not there within {self.seconds:g} seconds", where, self)
        there = iter(taken)
        return [_holding(message, there) for message in messages]

    def _check_together(self, taken: Sequence[Pixels]) -> None:
        n_pixels = sum(rgb.shape[0] * rgb.shape[1] for rgb in taken)
        if n_pixels > self.max_request_pixels:
            raise PromptError(
                f"the first {len(taken)} pictures have {n_pixels} pixels together and the limit of "
                f"a request is {self.max_request_pixels}: scale them down or send fewer"
            )


def _pictures(message: Any, i: int) -> Iterator[tuple[ImageSource, str]]:
    """Every picture of a message and where it stands, in the order of `_holding`."""
    if not isinstance(message, Mapping):
        return
    for j, picture in enumerate(attached(message, f"message {i}")):
        yield picture.source, f"message {i}, image {j}"
    content = message.get("content")
    for j, part in enumerate(content if isinstance(content, list | tuple) else ()):
        where = f"message {i}, part {j}"
        if isinstance(read := read_part(part, where), Picture):
            yield read.source, where


def _holding(message: Any, pixels: Iterator[Pixels]) -> Any:
    """The message with the next of `pixels` for each picture."""
    if not isinstance(message, Mapping):
        return message
    held = dict(message)
    if message.get("images") is not None:
        held["images"] = [next(pixels) for _ in message["images"]]
    if isinstance(content := message.get("content"), list | tuple):
        held["content"] = [
            {"type": "image", "image": next(pixels)}
            if isinstance(read_part(part, ""), Picture)
            else part
            for part in content
        ]
    return held


async def _taken(source: object, where: str, media: Media) -> Pixels:
    held: Any = None
    if isinstance(source, str):
        is_data = source[:5].lower() == "data:"
        held = source if is_data else image_of_base64(source.encode("ascii", "replace"))
    try:
        return await _decoded(await _named(source, media) if held is None else held, media)
    except ImageError as exc:
        if held is not None:
            raise ImageError(f"{where}: {exc}") from exc
        # What is wrong within a file is told no otherwise than that there is none.
        raise _refusal(str(exc), where, media) from None


async def _named(source: object, media: Media) -> bytes:
    """What a file or a host holds. Raises ImageError that says why there is nothing."""
    if isinstance(source, str) and is_remote(source):
        return await fetched(source, media.hosts, max_bytes=media.max_bytes)
    if not isinstance(source, str | PathLike):
        raise ImageError(f"{shown(source)} is of type {type(source).__name__}")
    if media.folder is None:
        raise ImageError(f"{shown(source)} is no base64 of an image, and no folder is open")
    read = partial(read_below, media.folder, source, max_bytes=media.max_bytes)
    return await anyio.to_thread.run_sync(read)


async def _decoded(source: str | bytes, media: Media) -> Pixels:
    load = partial(load_image, source, max_pixels=media.max_pixels)
    return await anyio.to_thread.run_sync(load)


def _refusal(reason: str, where: str, media: Media) -> ImageError:
    _LOG.info("%s: picture refused: %s", where, " ".join(reason.split()))
    files = ", a file below this server's media path" if media.folder is not None else ""
    hosts = ", a URL at one of the hosts that this server fetches from" if media.hosts else ""
    return ImageError(
        f"{where}: the picture cannot be had: give the base64 or data: URL of a whole image file"
        f"{files}{hosts}"
    )
