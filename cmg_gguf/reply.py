"""An answer and its account. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cmg_gguf.arrays import FloatArray
from cmg_gguf.evidence import EvidenceModel
from cmg_gguf.guidance import Guidance
from cmg_gguf.heat.maps import Heat

FinishReason = Literal["stop", "length"]

MENDS = {
    "activation": "its networks have GELU, which its file does not name",
    "class token": "its class token stands before the patches (llama.cpp issue 25814)",
    "cleared": "what stands behind a row of patches does not depend on what memory held",
    "layer": "the last layer of its file is run (llama.cpp issue 25817)",
    "places": "each patch has the place that was learned for it",
    "rows": "image tokens come row by row",
}
"""What can be put right in an image encoder, by name, and what it then does otherwise than
llama.cpp's."""


@dataclass(frozen=True)
class Evidence:
    """What both branches say of a token: see `cmg_gguf.evidence`.

    log_p_o, log_p_d: its log-probability in nats, <= 0, in the model's own distribution and with
    every image token hidden; both before guidance and samplers. divergence: the two distributions'
    Jensen-Shannon divergence in nats, 0 to ln 2. entropy_o, entropy_d: of each, in nats. score: 0
    to 1, higher = the picture supports it more.
    """

    log_p_o: float
    log_p_d: float
    divergence: float
    entropy_o: float
    entropy_d: float
    score: float


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    id: its number. text: its own text; a part of a character shows as U+FFFD. plain: the token that
    plain decoding would have drawn here, from the same logits with the same settings and seed.
    logprob: log-probability in the guided distribution before other samplers, where asked for.
    top: the likeliest tokens of that distribution with their log-probabilities, best first.
    evidence: where it was asked for; a `Piece` comes before it is known, but where guidance hides
    every image token in every layer, scope "text".
    """

    id: int
    text: str
    plain: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    evidence: Evidence | None = None

    @property
    def changed(self) -> bool:
        """Whether guidance changed this token."""
        return self.id != self.plain


@dataclass(frozen=True)
class Word:
    """A word of an answer's text: letters, digits, and what joins them ("o'clock", "T-shirt");
    where a script puts no spaces between words, one character.

    text: itself. start, stop: `Reply.text[start:stop]` is it. first, last: the tokens within which
    it begins and ends, counted from 0. evidence: the score of the first of them, where it was asked
    for: what follows within a word mostly follows from its beginning.
    """

    text: str
    start: int
    stop: int
    first: int
    last: int
    evidence: float | None = None


@dataclass(frozen=True)
class Piece:
    """Some text of an answer as it streams, and the tokens drawn since the last piece.

    reasoning: whether it is what the model thinks before it answers.
    """

    text: str
    tokens: tuple[Token, ...]
    reasoning: bool = False


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds of an answer's phases: image encoding, prompt, tokens.

    Rows of the prompt that wait for a token to need them (`cmg_gguf.engine.steps`) count as its.
    """

    encode: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Reply:
    """An answer and its account.

    text: without the stop string, and without spaces in front. reasoning: what the model thought
    before it answered, without its marks; "" = nothing. Where the answer ends within it, text is
    "". tokens: all that were generated, without the end token; the first `n_reasoning_tokens` are
    reasoning, its marks included. end: the end token, None where the answer did not end with one.
    finish_reason: "stop" (end token or stop string), "length" (max_tokens, or the context is full).
    layers: those that are masked in the degraded branch; () without guidance. n_reused_tokens:
    prompt tokens whose KV cells were there from an earlier prompt that began alike. mended: what
    was put right in the image encoder for its pictures, names of `MENDS`, sorted. scores: of the
    first `Request.n_scores` draws, the end token's included: (n_vocab,) float32, the logits under
    guidance before the plausibility cut and all samplers. words: those of the text, in order.
    evidence: the weights of their scores; None = none were asked for. heat: what each token
    attended to in the pictures, where asked for.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    n_prompt_tokens: int
    n_image_tokens: int
    guidance: Guidance
    layers: tuple[int, ...]
    seed: int
    seconds: Seconds
    n_reused_tokens: int = 0
    end: Token | None = None
    reasoning: str = ""
    n_reasoning_tokens: int = 0
    mended: tuple[str, ...] = ()
    words: tuple[Word, ...] = ()
    evidence: EvidenceModel | None = None
    scores: tuple[FloatArray, ...] = field(default=(), repr=False, compare=False)
    heat: Heat | None = field(default=None, repr=False, compare=False)

    @property
    def n_changed(self) -> int:
        """How many tokens guidance changed."""
        return sum(token.changed for token in self.tokens)
