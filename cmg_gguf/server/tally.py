"""Counts over the life of a server. Values for `metrics`; nothing here knows how they are told."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cmg_gguf.errors import BackendError

if TYPE_CHECKING:
    from cmg_gguf.server.answer import Answer

FEW_SECONDS = 1.0
"""Of an answer, where none has been made yet."""
SHARE = 0.2
"""Of the newest answer, in how long an answer takes."""


class Tally:
    """What has been answered. Belongs to one event loop.

    n_prompt_tokens: computed, those from kept prompts aside. n_answer_tokens: of finished answers
    and of those that were left. prompt_seconds: encoding pictures included.
    """

    def __init__(self) -> None:
        self.n_answers = self.n_left = self.n_refused = 0
        self.n_prompt_tokens = self.n_reused_tokens = self.n_image_tokens = 0
        self.n_answer_tokens = self.n_changed_tokens = 0
        self.prompt_seconds = self.answer_seconds = 0.0
        self.seconds_each = FEW_SECONDS
        """How long an answer takes, of late."""

    def note(self, answer: Answer) -> None:
        """Counts an answer that is over, or was left early."""
        try:
            reply = answer.reply
        except BackendError:
            self.n_left += 1
            self.n_answer_tokens += answer.n_tokens
            return
        seconds = reply.seconds
        self.n_answers += 1
        self.n_prompt_tokens += reply.n_prompt_tokens - reply.n_reused_tokens
        self.n_reused_tokens += reply.n_reused_tokens
        self.n_image_tokens += reply.n_image_tokens
        self.n_answer_tokens += len(reply.tokens)
        self.n_changed_tokens += reply.n_changed
        self.prompt_seconds += seconds.encode + seconds.prefill
        self.answer_seconds += seconds.decode
        whole = seconds.encode + seconds.prefill + seconds.decode
        self.seconds_each += SHARE * (whole - self.seconds_each)

    def seconds_to_wait(self, n_ahead: int, n_parallel: int) -> int:
        """Until a place may be free behind n_ahead answers; 1 to 60, whole."""
        return max(1, min(60, math.ceil(self.seconds_each * n_ahead / n_parallel)))
