"""One answer of a loaded model, with progress before it and Ctrl-C during it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cmg_gguf.cli.interrupt import Interrupt
from cmg_gguf.cli.screen import Phase, Screen, Waiting, summary

if TYPE_CHECKING:
    from pathlib import Path

    from cmg_gguf.cli.guidance_flags import GuidanceFlags
    from cmg_gguf.cli.model_flags import ModelFlags
    from cmg_gguf.evidence import EvidenceModel
    from cmg_gguf.guidance import Guidance
    from cmg_gguf.reply import Piece, Reply
    from cmg_gguf.sampling import Sampling
    from cmg_gguf.stream import Stream
    from cmg_gguf.vlm import GuidedVLM

Message = Mapping[str, Any]


class Stopped(KeyboardInterrupt):
    """Ctrl-C in an answer. text: what had been said."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


@dataclass(frozen=True)
class Asker:
    """A loaded model, and what all answers of a command share. seconds: loading took. evidence: by
    which weights; None = none."""

    vlm: GuidedVLM
    screen: Screen
    max_tokens: int | None
    seconds: float
    evidence: EvidenceModel | None = None

    @classmethod
    def open(
        cls,
        flags: ModelFlags,
        guidance: GuidanceFlags,
        screen: Screen,
        *,
        max_tokens: int | None,
        blind: bool = False,
        evidence: bool = False,
    ) -> Asker:
        """Loads the model, and says so if it is the built-in one. blind: no image is shown.
        evidence: of each answer about an image; says so where its weights are not fitted.

        Raises CMGError; KeyboardInterrupt on Ctrl-C.
        """
        flags.check()
        note_built_in(screen, flags, guidance.told(flags.own_settings, blind=blind))
        weights = guidance.weights(flags.own_settings) if evidence else None
        if weights is not None and not weights.is_fitted:
            screen.note(
                "no settings file with weights for this model is given, so the evidence is not "
                "calibrated: its scores put words in an order, and are no probabilities"
            )
        files = fetched(screen, flags)
        note_unread(screen, flags, files[0])
        started = time.perf_counter()
        with Interrupt() as interrupt, screen.waiting("load") as waiting:

            def progress(phase: Phase, done: int, total: int) -> None:
                interrupt.check()
                waiting(phase, done, total)

            vlm = flags.open(progress, files=files)
        if flags.ubatch_size is None and vlm.n_ubatch > 512:
            screen.note(
                f"this model decodes a picture at once, so a step has room for {vlm.n_ubatch} "
                "tokens: more memory (-ub 512 takes small pictures only)"
            )
        return cls(vlm, screen, max_tokens, time.perf_counter() - started, weights)

    def ask(
        self,
        messages: Sequence[Message],
        guidance: Guidance,
        sampling: Sampling,
        show: Callable[[Piece], None] | None = None,
        *,
        heat: bool = False,
    ) -> Reply:
        """The answer. show: called with each piece as it comes; None = progress until the end.
        heat: as in `Request`.

        Raises CMGError; Stopped on Ctrl-C.
        """
        shown = _has_images(messages)
        stream: Stream | None = None
        try:
            with (
                Interrupt() as interrupt,
                self.screen.waiting("encode" if shown else "prefill") as waiting,
            ):

                def progress(phase: Phase, done: int, total: int) -> None:
                    interrupt.check()
                    waiting(phase, done, total)

                stream = self.vlm.stream(
                    messages,
                    guidance=guidance,
                    sampling=sampling,
                    max_tokens=self.max_tokens,
                    heat=heat,
                    evidence=self.evidence if shown else None,
                    progress=progress,
                )
                with closing(stream):
                    self._follow(stream, show, waiting, interrupt)
                return stream.reply
        except KeyboardInterrupt as exc:
            raise Stopped("" if stream is None else stream.text) from exc

    def _follow(
        self,
        stream: Stream,
        show: Callable[[Piece], None] | None,
        waiting: Waiting,
        interrupt: Interrupt,
    ) -> None:
        """Reads an answer to its end. Raises KeyboardInterrupt behind a piece after Ctrl-C."""
        n_tokens = 0
        try:
            for piece in stream:
                n_tokens += len(piece.tokens)
                if show is None or (piece.reasoning and not self.screen.shows_reasoning):
                    waiting.answering(n_tokens)
                else:
                    waiting.stop()
                    if piece.reasoning:
                        self.screen.think(piece.text)
                    else:
                        self.screen.end_thought()
                        show(piece)
                interrupt.check()
        finally:
            self.screen.end_thought()

    def summarise(self, reply: Reply, *, label: str = "", load: bool = True) -> None:
        """Writes the figures of an answer. load: those of loading the model too."""
        seconds = self.seconds if load else None
        self.screen.aside(label + summary(reply, load=seconds, max_tokens=self.max_tokens))


def fetched(screen: Screen, flags: ModelFlags) -> tuple[Path, Path]:
    """Model and projector file, with progress where they are downloaded.

    Raises what `ModelFlags.pair` raises; KeyboardInterrupt on Ctrl-C.
    """
    if flags.hf_repo is None:
        return flags.pair()
    with Interrupt() as interrupt, screen.waiting("download") as waiting:

        def progress(phase: Phase, done: int, total: int) -> None:
            interrupt.check()
            waiting(phase, done, total)

        return flags.pair(progress)


def note_built_in(screen: Screen, flags: ModelFlags, guided: str) -> None:
    """Says that the built-in model answers, if it does. guided: how it is guided, "" = no word."""
    if flags.built_in:
        how = f", {guided}" if guided else ""
        screen.note(
            f"no -m is given, so the built-in tiny model answers{how}: it knows only the drawn "
            "scenes of cmg-gguf demo"
        )


def note_unread(screen: Screen, flags: ModelFlags, model: Path) -> None:
    """Says which variables for the chat template it does not read. Raises ModelError, PromptError.

    model: the model file.
    """
    from cmg_gguf.facts import unread_variables

    for name in unread_variables(model, flags.chat_template, flags.template_variables):
        given = flags.no_think and name == "enable_thinking"
        screen.note(
            f"{'--no-think' if given else '--template-kwargs'} without effect: the chat template "
            f"does not read {name}"
        )


def user_message(text: str, images: Sequence[Any]) -> dict[str, Any]:
    """A user's turn with `images` ahead of its text."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def system_messages(text: str | None) -> list[dict[str, Any]]:
    """The system turn, if there is one."""
    return [] if text is None else [{"role": "system", "content": text}]


def _has_images(messages: Sequence[Message]) -> bool:
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return any(part["type"] == "image" for content in asked for part in content)
