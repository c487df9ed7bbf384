"""What a prompt must be, for a context to decode it."""

from __future__ import annotations

from cmg_gguf.engine.context import Context
from cmg_gguf.errors import ContextLengthError, PromptError, UnsupportedError
from cmg_gguf.prompt.segments import ImageSegment, Prompt


def check_prompt(prompt: Prompt, context: Context) -> None:
    """Raises PromptError for one that is empty or ends with an image, UnsupportedError for images
    that need larger micro-batches."""
    if prompt.n_tokens == 0:
        raise PromptError("the prompt is empty; give at least one token")
    if isinstance(prompt.segments[-1], ImageSegment):
        raise PromptError("the prompt ends with an image; put text behind it")
    for segment in prompt.segments:
        # A context of fewer cells is too short for the prompt, whatever n_ubatch is.
        n_ubatch = context.n_ubatch
        needed = segment.needs_ubatch if isinstance(segment, ImageSegment) else 0
        if n_ubatch < min(needed, context.n_ctx):
            raise UnsupportedError(
                f"this model decodes the {segment.n_tokens} tokens of an image at once and "
                f"n_ubatch is {n_ubatch}; raise n_ubatch"
            )


def check_cells(needed: int, n_ctx: int, who: str, why: str) -> None:
    """Raises ContextLengthError where more KV cells are needed than there are."""
    if needed > n_ctx:
        raise ContextLengthError(
            f"the {who} {needed} KV cells ({why} tokens) and the context has {n_ctx}; raise n_ctx "
            "or shorten the prompt"
        )
