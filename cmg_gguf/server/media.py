"""Which pictures a request may name: data URLs, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cmg_gguf.errors import ImageError
from cmg_gguf.prompt.parts import Picture, attached, read_part
from cmg_gguf.request import Messages


@dataclass(frozen=True)
class Media:
    """What is allowed."""

    def resolved(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages, with nothing in them that names a file or a host. Raises ImageError,
        PromptError."""
        return [self._message(message, f"message {i}") for i, message in enumerate(messages)]

    def _message(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        for picture in attached(message, where):
            self._check(picture, where)
        content = message.get("content")
        for i, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, str):
                read = read_part(part, f"{where}, part {i}")
                if isinstance(read, Picture):
                    self._check(read, f"{where}, part {i}")
        return dict(message)

    def _check(self, picture: Picture, where: str) -> None:
        source = picture.source
        if not (isinstance(source, str) and source[:5].lower() == "data:"):
            raise ImageError(
                f"{where} has a picture that this server does not read: send it as a data: URL"
            )
