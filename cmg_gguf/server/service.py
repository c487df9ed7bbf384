"""What all routes share: one model, who may ask it when, and how it answers by default.

    request = service.request(messages, cmg="off", max_tokens=64)   # checked, nothing computed
    async with await service.open(request) as answer:               # its place, its pictures
        async for piece in answer: ...

Pictures that a request names reach the model by way of `Media` alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from cmg_gguf.chat.completion import request_of, sampling_of
from cmg_gguf.chat.heat import WEIGHT_BYTES
from cmg_gguf.errors import CMGError, GuidanceError, SamplingError, shown
from cmg_gguf.evidence import UNFITTED, EvidenceModel
from cmg_gguf.guidance import PLAIN, Guidance
from cmg_gguf.reply import Reply
from cmg_gguf.request import Messages, Request, checked_stops
from cmg_gguf.server.answer import Answer, Ear
from cmg_gguf.server.extent import check_extent, check_settings
from cmg_gguf.server.failures import Refused, refused
from cmg_gguf.server.lifetime import Lifetime
from cmg_gguf.server.limits import Limits
from cmg_gguf.server.media import Media
from cmg_gguf.server.queue import FullError, Queue
from cmg_gguf.server.tally import Tally
from cmg_gguf.settings import guidance_from_json, guidance_to_json
from cmg_gguf.stream import Stream
from cmg_gguf.vlm import GuidedVLM

OFF = "off"
ASKED_FOR = ("evidence", "heat")
"""In a request's `cmg`, beside guidance: what the reply is to have."""
N_PREPARED = 2
"""Of the requests that wait, those that are read already: so the engine waits for no picture."""


@dataclass(frozen=True)
class Defaults:
    """How a request is answered where it says nothing. The draws are llama-server's. evidence: the
    weights of those that ask for it."""

    guidance: Guidance = field(default_factory=Guidance)
    evidence: EvidenceModel = UNFITTED
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05

    def draws(self) -> dict[str, Any]:
        """How tokens are drawn, by the names of `sampling_of`."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}


class Service:
    """One model behind all routes. Made and used on one event loop.

    n_waiting: requests that may wait beyond those that are answered. draws_scenes: whether the page
    offers drawn scenes, which the built-in model knows.
    """

    def __init__(
        self,
        vlm: GuidedVLM,
        lifetime: Lifetime,
        *,
        name: str,
        defaults: Defaults | None = None,
        media: Media | None = None,
        limits: Limits | None = None,
        n_waiting: int = 32,
        draws_scenes: bool = False,
    ) -> None:
        self.name, self.lifetime = name, lifetime
        self.defaults = defaults or Defaults()
        self.media, self.limits = media or Media(), limits or Limits()
        self.created = int(time.time())
        self.draws_scenes = draws_scenes
        self.tally = Tally()
        self.n_ctx, self.n_parallel = vlm.n_ctx, len(vlm.engine.lanes)
        self.facts, self.chat_template = facts_of(vlm), vlm.template.source
        n_prepared = min(N_PREPARED, n_waiting)
        self.queue = Queue(self.n_parallel + n_prepared, n_waiting - n_prepared)

    @property
    def guidance(self) -> Guidance:
        """Of requests that say nothing about it."""
        return self.defaults.guidance

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token. While a request that the model answered is under way."""
        assert self.lifetime.vlm is not None
        return self.lifetime.vlm.model.token_bytes(token)

    def request(
        self,
        messages: Messages,
        *,
        cmg: object = None,
        salt: str | None = None,
        **settings: Any,
    ) -> Request:
        """A request as `chat.completion.request_of` makes it; a setting that is None is the
        server's default. cmg: None, "off", or guidance settings over the server's, and `evidence`:
        True = by the server's weights; `heat`: True = where the answer looked. salt: see
        `clients.salt_of`. Raises Refused, which names the setting."""
        given = {name: value for name, value in settings.items() if value is not None}
        check_extent(messages, self.n_ctx)
        check_settings(given)
        own = {name: value for name, value in self.defaults.draws().items() if name not in given}
        try:
            guidance, asked = self._asked(cmg)
        except (GuidanceError, TypeError) as exc:
            raise Refused(f"cmg: {exc}", param="cmg") from exc
        try:
            made = request_of(messages, guidance=guidance, **asked, **given, **own)
            return replace(made, salt=salt, max_tokens=self.limits.tokens(made.max_tokens))
        except CMGError as exc:
            raise refused(exc, _wrong_setting(given)) from exc

    async def open(self, request: Request) -> Answer:
        """Waits for a place, has the pictures read, and begins. Raises Refused where too many wait,
        and what the pictures or the prompt's length are refused with. Cancelled, it ends the
        answer."""
        return (await self.open_all([request]))[0]

    async def open_all(self, requests: Sequence[Request]) -> list[Answer]:
        """The same of several that have the same messages, all at once."""
        n = len(requests)
        if n > self.n_parallel:
            raise Refused(
                f"n={n} is out of range: 1 to {self.n_parallel}, the answers that are made at once",
                param="n",
            )
        try:
            await self.queue.enter(n)
        except FullError:
            self.tally.n_refused += 1
            raise self._busy() from None
        ears = [Ear(self.queue.leave) for _ in requests]
        try:
            messages = await self.media.resolved(requests[0].prompt)
        except BaseException:
            _give_back(ears)
            raise
        begun = asyncio.ensure_future(self._begin(requests, messages, ears))
        try:
            return await asyncio.shield(begun)
        except asyncio.CancelledError:
            begun.add_done_callback(_end_all)
            raise

    async def reply(self, request: Request) -> Reply:
        """The whole answer. Raises what `open` raises, and what ends an answer."""
        async with await self.open(request) as answer:
            return await answer.whole()

    async def _begin(
        self, requests: Sequence[Request], messages: Messages, ears: Sequence[Ear]
    ) -> list[Answer]:
        """Answers in places that are taken; each gives its own back when it is over."""
        streams: list[Stream] = []

        def submit(vlm: GuidedVLM) -> None:
            for request, ear in zip(requests, ears, strict=True):
                streams.append(vlm.stream(replace(request, prompt=messages), heard=ear.hear))
                self._check_heat(streams[-1])

        try:
            await asyncio.to_thread(submit, await self.lifetime.awake())
        except BaseException as exc:
            for stream in streams:
                stream.cancel()
            _give_back(ears[len(streams) :])
            if isinstance(exc, GuidanceError | SamplingError):
                raise refused(exc, _setting_beside_model(requests[0], exc)) from exc
            raise
        return [Answer(s, ear, self.tally.note) for s, ear in zip(streams, ears, strict=True)]

    def _asked(self, cmg: object) -> tuple[Guidance, dict[str, Any]]:
        """Guidance, and what else is asked for, by the names of `request_of`."""
        if cmg is None:
            return self.guidance, {}
        if cmg == OFF:
            return PLAIN, {}
        if not isinstance(cmg, Mapping):
            raise GuidanceError(
                f'{shown(cmg)} is neither "{OFF}" nor an object of settings; write {{"alpha": 1.0}}'
            )
        own = {name: value for name, value in cmg.items() if name not in ASKED_FOR}
        wants = {name: cmg.get(name, False) for name in ASKED_FOR}
        for name, value in wants.items():
            if not isinstance(value, bool):
                raise GuidanceError(f"{name}={shown(value)} is neither true nor false")
        guidance = guidance_from_json({**guidance_to_json(self.guidance), **own})
        evidence = self.defaults.evidence if wants["evidence"] else None
        return guidance, {"evidence": evidence, "heat": wants["heat"]}

    def _check_heat(self, stream: Stream) -> None:
        """Raises Refused where it would be more than is sent."""
        n_tokens, n_layers, n_images = stream.heat_shape
        limit = self.limits.heat_bytes
        if n_tokens * n_layers * n_images * WEIGHT_BYTES <= limit:
            return
        most = limit // (n_layers * n_images * WEIGHT_BYTES)
        remedy = f"set max_tokens to {most} or less" if most else "ask without it"
        raise Refused(
            f"cmg: heat of up to {n_tokens} tokens, {n_layers} layers and {n_images} image tokens "
            f"is more than {limit / 2**20:g} MiB; {remedy}",
            param="cmg",
        )

    def _busy(self) -> Refused:
        n_ahead = self.queue.n_taken + self.queue.n_waiting
        seconds = self.tally.seconds_to_wait(n_ahead, self.n_parallel)
        return Refused(
            f"{self.queue.n_waiting} requests wait already, and no more may; try again in "
            f"{seconds} s",
            429,
            code="queue_full",
            headers={"Retry-After": str(seconds)},
        )


def facts_of(vlm: GuidedVLM) -> dict[str, Any]:
    """What a loaded model is, JSON-ready."""
    model = vlm.model
    return {
        "description": model.describe(),
        "n_vocab": model.n_vocab,
        "n_ctx_train": model.n_ctx_train,
        "n_embd": model.n_embd,
        "bytes": model.size,
        "layers": model.n_layer,
        "attention_layers": list(model.attention_layers),
    }


def _give_back(ears: Sequence[Ear]) -> None:
    """The places of answers that never began."""
    for ear in ears:
        ear.hear(True)


def _end_all(begun: asyncio.Future[list[Answer]]) -> None:
    if not begun.cancelled() and begun.exception() is None:
        for answer in begun.result():
            answer.close()


def _wrong_setting(given: Mapping[str, Any]) -> str | None:
    """The one of the settings that is wrong by itself; None where that is none, or several are
    wrong together."""
    for name, value in given.items():
        try:
            _CHECKS.get(name, partial(_check_sampled, name))(value)
        except CMGError:
            return name
    return None


def _setting_beside_model(request: Request, exc: Exception) -> str | None:
    """The setting that this model cannot do; None where several may be meant."""
    if isinstance(exc, GuidanceError):
        return "cmg"
    names = ("logit_bias", "grammar", "response_format")
    given = [name for name in names if getattr(request.sampling, name)]
    return given[0] if len(given) == 1 else None


def _check_sampled(name: str, value: Any) -> None:
    sampling_of(**{name: value})


def _check_asked(name: str, value: Any) -> None:
    request_of((), **{name: value})


_CHECKS: dict[str, Callable[[Any], object]] = {
    "stop": checked_stops,
    **{
        name: partial(_check_asked, name)
        for name in ("max_tokens", "logprobs", "top_logprobs", "chat_template_kwargs")
    },
}
