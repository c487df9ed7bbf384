"""A catalogue of what can go wrong with one request, and how it must be told.

for fault in FAULTS:
    fault.happen(vlm)  # asserts type and words; the model stays usable
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from guided import QUESTION, asked, png
from numpy.typing import NDArray
from PIL import Image
from prompts import picture

from cmg_gguf import (
    BackendError,
    CMGError,
    ContextLengthError,
    Guidance,
    GuidanceError,
    GuidedVLM,
    ImageError,
    LayerRange,
    PromptError,
    Sampling,
    SamplingError,
    TopRatio,
)

Happening = Callable[[GuidedVLM], object]
PICTURE = picture(0)


@dataclass(frozen=True)
class Fault:
    """What goes wrong, the error it must give, and words of its message."""

    name: str
    cause: Happening
    error: type[BaseException]
    says: tuple[str, ...] = ()

    def happen(self, vlm: GuidedVLM) -> None:
        with pytest.raises(self.error) as info:
            self.cause(vlm)
        assert type(info.value) is self.error
        line = str(info.value)
        assert all(word in line for word in self.says), line
        assert "\n" not in line
        if isinstance(info.value, CMGError):
            assert 10 < len(line) < 400, line


def _huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def _image(name: str, source: Any, *says: str, error: type[CMGError] = ImageError) -> Fault:
    return Fault(f"image: {name}", lambda vlm: vlm.stream(QUESTION, [source]), error, says)


def _prompt(
    name: str,
    prompt: Any,
    *says: str,
    images: Sequence[Any] = (),
    error: type[CMGError] = PromptError,
    **settings: Any,
) -> Fault:
    return Fault(f"prompt: {name}", lambda vlm: vlm.stream(prompt, images, **settings), error, says)


def _setting(name: str, error: type[CMGError], make: Callable[[], Any], *says: str) -> Fault:
    return Fault(
        f"setting: {name}", lambda vlm: vlm.stream(QUESTION, [PICTURE], **make()), error, says
    )


def _under_way(name: str, cause: Happening, error: type[BaseException], *says: str) -> Fault:
    return Fault(f"under way: {name}", cause, error, says)


IMAGES = (
    _image("empty", b"", "0 bytes"),
    _image("junk", b"this is no image", "16 bytes", "PNG"),
    _image("truncated PNG", png(PICTURE)[:-60], "truncated"),
    _image("truncated JPEG", _jpeg(PICTURE)[:300], "300 bytes"),
    _image("header alone", png(PICTURE)[:33], "33 bytes"),
    _image("bomb", _huge_png(60_000, 60_000), "limit"),
    _image("wide bomb", _huge_png(2**31 - 1, 1), "limit"),
    _image("over the pixel limit", _huge_png(9_000, 9_000), "81000000"),
    _image("no such file", "/nowhere/picture.png", "/nowhere/picture.png"),
    _image("a folder", "/", "not a regular file"),
    _image("NUL in the path", "a\0.png", "cannot be opened"),
    _image("a web address", "https://example.org/a.png", "example.org", "download"),
    _image("a data URL of junk", "data:image/png;base64,AAAA", "26 characters"),
    _image("a data URL of no base64", "data:image/png;base64,???", "base64"),
    _image("another dtype", np.zeros((4, 4, 3), np.float32), "float32", "uint8"),
    _image("two channels", np.zeros((4, 4, 2), np.uint8), "(4, 4, 2)", "(H, W, 3)"),
    _image("channels first", np.zeros((3, 4, 5), np.uint8), "(3, 4, 5)"),
    _image("without pixels", np.zeros((0, 4, 3), np.uint8), "4 x 0"),
    _image("a number", 5, "5 of type int"),
    _image("nothing", None, "no image", error=PromptError),
)

PROMPTS = (
    _prompt("too long", "x" * 100_000, "100006 tokens", "has 256", error=ContextLengthError),
    _prompt(
        "too long with an image",
        "What " * 300,
        "16 of them image tokens",
        images=[PICTURE],
        error=ContextLengthError,
    ),
    _prompt(
        "more images than fit",
        QUESTION,
        "320 of them image tokens",
        images=[PICTURE] * 20,
        error=ContextLengthError,
    ),
    _prompt(
        "ends with an image", "a <__media__>", "ends with an image", images=[PICTURE], raw=True
    ),
    _prompt("no marker", "a", "0 images and 1 were", images=[PICTURE], raw=True),
    _prompt("a marker too many", "<__media__> a", "1 images and 0 were", raw=True),
    _prompt("raw messages", asked(), "one text", raw=True),
    _prompt("no messages", [], "0 messages"),
    _prompt("nothing", None, "prompt is None"),
    _prompt("an unknown role", [{"role": "wizard", "content": "a"}], "'wizard'", "user"),
    _prompt("no content", [{"role": "user"}], "content None"),
    _prompt("an unknown part", [{"role": "user", "content": [{"type": "video"}]}], "'video'"),
    _prompt("not messages", ["a"], "message 0", "'a'"),
    _prompt("one image for a list", QUESTION, "[image]", images="a.png"),
    _prompt("images twice", asked(), "messages' content", images=[PICTURE]),
    Fault(
        "prompt: the model's own marker",
        lambda vlm: vlm.stream(f"a {vlm.projector.marker}"),
        PromptError,
        ("marker",),
    ),
)

SETTINGS = (
    _setting("layer", GuidanceError, lambda: {"guidance": Guidance(layers=[40])}, "40", "(0-5)"),
    _setting(
        "no layer",
        GuidanceError,
        lambda: {"guidance": Guidance(layers=LayerRange(0.0, 0.01))},
        "hold no layer",
        "6",
    ),
    _setting(
        "alpha", GuidanceError, lambda: {"guidance": Guidance(alpha=-1.0)}, "-1.0", "0 to 100"
    ),
    _setting("beta", GuidanceError, lambda: {"guidance": Guidance(beta=1.5)}, "1.5", "0 to 1"),
    _setting(
        "ratio", GuidanceError, lambda: {"guidance": Guidance(tokens=TopRatio(2.0))}, "2.0", "1"
    ),
    _setting(
        "temperature", SamplingError, lambda: {"sampling": Sampling(temperature=-1.0)}, "-1.0"
    ),
    _setting(
        "grammar", SamplingError, lambda: {"sampling": Sampling(grammar="root ::= [")}, "parse"
    ),
    _setting(
        "token",
        SamplingError,
        lambda: {"sampling": Sampling(logit_bias={10**6: 1.0})},
        "1000000",
        "(0-763)",
    ),
    _setting("stop", SamplingError, lambda: {"stop": [""]}, "stop string 0"),
    _setting("max_tokens", PromptError, lambda: {"max_tokens": 0}, "max_tokens=0", "1"),
    _setting("a number for guidance", GuidanceError, lambda: {"guidance": 2.0}, "(alpha=2.0)"),
    _setting("a number for sampling", SamplingError, lambda: {"sampling": 0.5}, "Sampling("),
    _setting("a text for max_tokens", PromptError, lambda: {"max_tokens": "3"}, "'3'"),
    _setting("top_logprobs", SamplingError, lambda: {"top_logprobs": -1}, "top_logprobs=-1"),
)


def _interrupt_in(phase: str, at: int) -> Happening:
    def cause(vlm: GuidedVLM) -> None:
        def progress(now: str, done: int, total: int) -> None:
            if now == phase and done >= at:
                raise KeyboardInterrupt

        vlm.forget()  # what is kept is not decoded again, and has no progress
        vlm.generate(QUESTION, [PICTURE, picture(1)], progress=progress)

    return cause


def _processor_fails(at: int, failure: Callable[[Any], Any]) -> Happening:
    def cause(vlm: GuidedVLM) -> None:
        def process(tokens: Any, logits: Any) -> Any:
            return failure(logits) if len(tokens) == at else logits

        vlm.generate(QUESTION, [PICTURE], logits_processors=[process])

    return cause


def _fail_after(n_tokens: int, error: type[BaseException]) -> Happening:
    def failure(logits: Any) -> Any:
        raise error

    return _processor_fails(n_tokens, failure)


def _closed(vlm: GuidedVLM) -> None:
    stream = vlm.stream(QUESTION, [PICTURE])
    next(stream)
    stream.close()
    next(stream)


def _unfinished(vlm: GuidedVLM) -> None:
    stream = vlm.stream(QUESTION, [PICTURE])
    next(stream)
    try:
        _ = stream.reply
    finally:
        stream.close()


UNDER_WAY = (
    _under_way("interrupt while encoding", _interrupt_in("encode", 1), KeyboardInterrupt),
    _under_way("interrupt between images", _interrupt_in("prefill", 20), KeyboardInterrupt),
    _under_way("interrupt in mid-prompt", _interrupt_in("prefill", 24), KeyboardInterrupt),
    _under_way("interrupt at once", _fail_after(0, KeyboardInterrupt), KeyboardInterrupt),
    _under_way("interrupt later", _fail_after(7, KeyboardInterrupt), KeyboardInterrupt),
    _under_way("processor fails", _fail_after(3, ZeroDivisionError), ZeroDivisionError),
    _under_way(
        "processor cuts",
        _processor_fails(2, lambda logits: logits[:5]),
        SamplingError,
        "(5,)",
        "(764,)",
    ),
    _under_way(
        "processor forbids all",
        _processor_fails(2, lambda logits: logits * np.nan),
        BackendError,
        "no token can follow",
    ),
    _under_way(
        "everything is banned",
        lambda vlm: vlm.generate(
            QUESTION, sampling=Sampling(logit_bias=dict.fromkeys(range(764), -np.inf))
        ),
        BackendError,
        "no token can follow",
    ),
    _under_way("closed", _closed, StopIteration),
    _under_way("read too early", _unfinished, BackendError, "not finished"),
)

FAULTS = (*IMAGES, *PROMPTS, *SETTINGS, *UNDER_WAY)
EARLY = (*IMAGES, *PROMPTS, *SETTINGS)
"""Those that must be told before anything is computed."""
