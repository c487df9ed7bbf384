"""Replies and their pieces as a model could have given them, without one."""

from __future__ import annotations

from collections.abc import Sequence

from cmg_gguf import Guidance, Piece, Reply, Seconds, Token
from cmg_gguf.reply import FinishReason

WORDS = ("<think>", "It ", "is ", "red", ".", "</think>", "A ", "fork", "é")


def token_bytes(token: int) -> bytes:
    return WORDS[token].encode()


def tokens(ids: Sequence[int], *, logprobs: bool = False) -> tuple[Token, ...]:
    """Tokens of `WORDS`; 7 is one that guidance changed."""
    top = ((7, -0.25), (3, -1.5))
    return tuple(
        Token(i, WORDS[i], 3 if i == 7 else i, -0.25, top)
        if logprobs
        else Token(i, WORDS[i], 3 if i == 7 else i)
        for i in ids
    )


def answer(
    thought: Sequence[int] = (),
    said: Sequence[int] = (6, 7, 8),
    *,
    finish_reason: FinishReason = "stop",
    logprobs: bool = False,
) -> tuple[list[Piece], Reply]:
    """The pieces and the reply; what is thought has its marks."""
    n = len(thought) + 2 if thought else 0
    spoken = tokens(said, logprobs=logprobs)
    marked = (0, *thought, 5) if thought else ()
    pieces = [
        *(Piece(WORDS[i], tokens([i], logprobs=logprobs), reasoning=True) for i in thought),
        *(Piece(token.text, (token,)) for token in spoken),
    ]
    reply = Reply(
        text="".join(token.text for token in spoken),
        reasoning="".join(WORDS[i] for i in thought),
        n_reasoning_tokens=n,
        tokens=tokens(marked, logprobs=logprobs) + spoken,
        finish_reason=finish_reason,
        n_prompt_tokens=40,
        n_image_tokens=16,
        n_reused_tokens=24,
        guidance=Guidance(),
        layers=(1, 2),
        seed=7,
        seconds=Seconds(0.25, 0.5, 1.0),
    )
    return pieces, reply
