"""Shared by the tests that talk to a `GuidedVLM` on a tiny pair."""

from __future__ import annotations

import base64
import io
import time
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from offload import N_GPU_LAYERS
from PIL import Image
from prompts import picture
from tiny_llava import TinyPair

from cmg_gguf import GuidedVLM, Reply
from cmg_gguf.arrays import FloatArray, IntArray
from cmg_gguf.guidance import PLAIN

QUESTION = "What is there?"
N_IMAGE_TOKENS = 16
"""Of one picture of the default tiny pair."""


def open_vlm(pair: TinyPair, **settings: Any) -> GuidedVLM:
    """A `GuidedVLM` that gives the same numbers everywhere: one thread, one kind of attention."""
    defaults: dict[str, Any] = {
        "n_ctx": 256,
        "n_ubatch": 64,
        "n_threads": 1,
        "n_gpu_layers": N_GPU_LAYERS,
        "flash_attn": False,
        "type_k": "f32",
        "type_v": "f32",
    }
    return GuidedVLM(pair.llm, pair.mmproj, **{**defaults, **settings})


def ids(reply: Reply) -> list[int]:
    """The tokens of the answer."""
    return [token.id for token in reply.tokens]


def forced(vlm: GuidedVLM, tokens: list[int], *asked: Any) -> list[FloatArray]:
    """Plain logits of a prompt along an answer that is given."""

    def only(said: IntArray, logits: FloatArray) -> FloatArray:
        row = np.full_like(logits, -np.inf)
        row[tokens[len(said)]] = 0
        seen.append(logits.copy())
        return row

    seen: list[FloatArray] = []
    said = vlm.generate(*asked, guidance=PLAIN, max_tokens=len(tokens), logits_processors=[only])
    assert ids(said) == tokens
    return seen


def is_empty(vlm: GuidedVLM) -> bool:
    """Whether the sequences that answers are decoded in hold nothing, as soon as answers that were
    dropped have taken note of it."""
    for _ in range(1000):
        if not vlm.engine.sessions:
            break
        time.sleep(0.01)
    return not vlm.engine.sessions and not any(
        held(branch.context, branch.seq)
        for lane in vlm.engine.lanes
        for branch in (lane.original, lane.degraded)
    )


def held(context: Any, seq: int) -> int:
    """How many positions a sequence holds."""
    memory = llama_cpp.llama_get_memory(context.handle)
    return int(llama_cpp.llama_memory_seq_pos_max(memory, seq)) + 1


def png(pixels: NDArray[np.uint8]) -> bytes:
    """The pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(pixels: NDArray[np.uint8]) -> str:
    """The pixels as a `data:` URL."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def user(*parts: str | NDArray[np.uint8]) -> dict[str, Any]:
    """A user's turn; arrays are images."""
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": part}
            for part in parts
        ],
    }


def asked(image_seed: int = 0, question: str = QUESTION) -> list[dict[str, Any]]:
    """Messages that ask about one picture, as OpenAI's clients write them."""
    image = {"type": "image_url", "image_url": {"url": data_url(picture(image_seed))}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
