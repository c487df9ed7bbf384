"""How large a model is trained, on how much, for how long. Steps, not seconds: runs repeat."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE, PATCH = 112, 14
N_PATCHES = (IMAGE // PATCH) ** 2


@dataclass(frozen=True)
class Size:
    """n_embd, n_head, n_layer, n_ff: of the language model; v_ the same of the image encoder.

    typical, counter: training pictures of each kind. Steps and batch sizes by stage.
    """

    n_embd: int = 128
    n_head: int = 4
    n_layer: int = 6
    n_ff: int = 384
    v_embd: int = 128
    v_head: int = 4
    v_layer: int = 4
    v_ff: int = 512
    n_hidden: int = 256
    vocab: int = 1024
    n_text: int = 168
    typical: int = 56_000
    counter: int = 40_000
    texts: int = 80_000
    vision_steps: int = 2000
    vision_batch: int = 128
    text_steps: int = 1600
    joint_steps: int = 2400
    batch: int = 32


SIZES = {
    "small": Size(),
    "large": Size(
        n_embd=192,
        n_head=6,
        n_layer=8,
        n_ff=512,
        v_embd=192,
        v_head=6,
        v_layer=6,
        v_ff=768,
        typical=400_000,
        counter=200_000,
        texts=600_000,
        vision_steps=20_000,
        text_steps=6_000,
        joint_steps=40_000,
        batch=64,
    ),
}
