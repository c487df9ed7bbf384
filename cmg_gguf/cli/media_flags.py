"""Flags that say which pictures requests may name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cmg_gguf.server.media import Media

_flag = partial(typer.Option, rich_help_panel="Pictures")


@dataclass(frozen=True, kw_only=True)
class MediaFlags:
    """Where pictures may come from besides the request itself, and how much of them."""

    media_path: Annotated[
        Path | None,
        _flag(
            "--media-path",
            metavar="DIR",
            help="Requests may name files below this folder, by paths from there or file: URLs. "
            "Without it, none.",
        ),
    ] = None
    allow_image_host: Annotated[
        list[str] | None,
        _flag(
            "--allow-image-host",
            metavar="HOST[:PORT]",
            help="Requests may name http and https URLs at this host. Its addresses must be "
            "public; a host in a private network is given by its address. Repeat it for several.",
        ),
    ] = None
    max_images: Annotated[
        int, _flag("--max-images", min=1, metavar="N", help="Most pictures of a request.")
    ] = 16
    max_request_pixels: Annotated[
        int,
        _flag(
            "--max-request-pixels",
            min=1,
            metavar="N",
            help="Most pixels of all pictures of a request together.",
        ),
    ] = 128_000_000
    max_image_bytes: Annotated[
        int,
        _flag(
            "--max-image-bytes", min=1, metavar="N", help="Most bytes of a file or of a download."
        ),
    ] = 32 << 20
    image_timeout: Annotated[
        float,
        _flag(
            "--image-timeout",
            min=0.001,
            metavar="SECONDS",
            help="Time for all pictures that a request names.",
        ),
    ] = 20.0

    def media(self, max_pixels: int | None = None) -> Media:
        """What requests may name. Raises ImageError for a folder or host that is none."""
        from cmg_gguf.server.media import Media
        from cmg_gguf.server.remote import Host

        return Media(
            folder=self.media_path,
            hosts=tuple(map(Host.of, self.allow_image_host or ())),
            max_bytes=self.max_image_bytes,
            max_pixels=max_pixels,
            max_pictures=self.max_images,
            max_request_pixels=self.max_request_pixels,
            seconds=self.image_timeout,
        )
