"""What bodies have in common: types are strict, what is unknown is ignored."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Wire(BaseModel):
    """A request's body, or a part of one."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())
