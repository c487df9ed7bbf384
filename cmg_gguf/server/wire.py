"""What bodies have in common: types are strict, what is unknown is ignored."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse


class Wire(BaseModel):
    """A request's body, or a part of one."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class WireResponse(JSONResponse):
    """A reply's body."""

    def render(self, content: Any) -> bytes:
        """The content as JSON."""
        return as_json(content)


def as_json(content: Any) -> bytes:
    """The content as JSON in UTF-8. Half a surrogate pair, which a client may have sent and is told
    again, becomes "?"."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
