"""What is wrong with a request, as its client knows errors.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "top_p", "code": null}}

Under /api/, where Ollama's clients ask: {"error": "..."}.
"""

from __future__ import annotations

import http
import logging
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cmg_gguf.errors import (
    BackendError,
    CMGError,
    ContextLengthError,
    ImageError,
    ModelError,
    PromptError,
)

_logger = logging.getLogger("cmg_gguf.server")

INVALID = "invalid_request_error"
CLIENT_GONE = 499
"""As nginx logs it; nobody reads it."""
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
OLLAMA = "/api/"
_SOON = {"Retry-After": "1"}


@dataclass(eq=False)
class Refused(Exception):  # noqa: N818  (what is told, not what went wrong)
    """A request that gets an error and no answer. kind: OpenAI's `type`; None = the status' own."""

    message: str
    status: int = 400
    _: KW_ONLY
    param: str | None = None
    code: str | None = None
    kind: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self, path: str = "") -> dict[str, Any]:
        """The error as JSON, in the shape that clients of `path` know."""
        if path.startswith(OLLAMA):
            return {"error": self.message}
        usual = INVALID if self.status < 500 else "server_error"
        kind = self.kind or _KINDS.get(self.status, usual)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def refused(exc: Exception, param: str | None = None) -> Refused:
    """What an exception means to the client; what nobody expected says nothing of itself."""
    if isinstance(exc, Refused):
        return exc
    if isinstance(exc, ContextLengthError):
        return Refused(str(exc), param=param or "messages", code="context_length_exceeded")
    if isinstance(exc, PromptError | ImageError):
        return Refused(str(exc), param=param or "messages")
    if isinstance(exc, ModelError):  # closed meanwhile, or its files are gone: they are not named
        _logger.warning("the model cannot answer: %s", exc)
        return Refused("the model is not loaded; try again later", 503, headers=_SOON)
    if isinstance(exc, BackendError):
        return Refused(str(exc), 500)
    if isinstance(exc, CMGError):
        return Refused(str(exc), param=param)
    if isinstance(exc, RecursionError):
        return Refused("the request nests too many objects and lists in each other; flatten it")
    _logger.error("a request failed", exc_info=exc)
    return Refused("the server failed; its log says more", 500)


def response(exc: Exception, path: str) -> JSONResponse:
    """The HTTP response of an exception."""
    found = refused(exc)
    return JSONResponse(found.body(path), found.status, dict(found.headers))


def install(app: FastAPI) -> None:
    """Has all errors of an application told in these shapes."""

    async def of_ours(request: Request, exc: Exception) -> JSONResponse:
        return response(exc, request.url.path)

    async def of_fields(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, RequestValidationError)
        return response(_wrong_field(exc), request.url.path)

    async def of_http(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, HTTPException)
        return response(_of_http(exc, request), request.url.path)

    for kind in (Refused, CMGError, Exception):
        app.add_exception_handler(kind, of_ours)
    app.add_exception_handler(RequestValidationError, of_fields)
    app.add_exception_handler(HTTPException, of_http)


def _wrong_field(exc: RequestValidationError) -> Refused:
    """The first of the errors that pydantic found."""
    first = exc.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be parsed")
        return Refused(f"the body is no JSON: {reason}")
    if not where:
        return Refused("the body is no JSON object; send one, as Content-Type: application/json")
    return Refused(f"{'.'.join(where)}: {first['msg']}", param=where[0])


def _of_http(exc: HTTPException, request: Request) -> Refused:
    if isinstance(exc.__cause__, RecursionError):  # of the JSON reader
        return refused(exc.__cause__)
    reasons = {
        404: f"there is no {request.url.path}; GET /openapi.json names what there is",
        405: f"{request.method} {request.url.path} is not there; it takes "
        f"{(exc.headers or {}).get('Allow', 'another method')}",
    }
    standard = http.HTTPStatus(exc.status_code).phrase
    detail = str(exc.detail)
    message = reasons.get(exc.status_code, detail) if detail == standard else detail
    return Refused(message, exc.status_code, headers=exc.headers or {})
