"""An answer as JSON: what `--json` writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmg_gguf.reply import Reply
    from cmg_gguf.vlm import GuidedVLM


def reply_block(reply: Reply, vlm: GuidedVLM) -> dict[str, Any]:
    """Text, tokens and account of an answer. `plain` of a token: the one plain decoding draws."""
    from cmg_gguf.chat.completion import cmg_block, usage

    return {
        "text": reply.text,
        "reasoning": reply.reasoning,
        "finish_reason": reply.finish_reason,
        "tokens": [
            {"id": token.id, "text": token.text, "plain": token.plain, "changed": token.changed}
            for token in reply.tokens
        ],
        "usage": usage(reply),
        "cmg": cmg_block(reply, vlm.model.token_bytes),
    }


def question_block(vlm: GuidedVLM, images: Sequence[str], prompt: str) -> dict[str, Any]:
    """What was asked of which model."""
    return {
        "model": str(vlm.model.path),
        "mmproj": str(vlm.projector.path),
        "images": list(images),
        "prompt": prompt,
    }
