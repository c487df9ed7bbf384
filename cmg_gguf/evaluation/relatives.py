"""Published relatives of Cross-Modal Guidance: what they do to the degraded branch's prompt.

All are greedy, with the plausibility cut of `beta` on the original logits:

    score = l_o + alpha * (l_o - l_d)

Each is the published idea on this package's engine, not the authors' code; what differs is said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from cmg_gguf.evaluation.method import Method, Question
from cmg_gguf.guidance import Guidance
from cmg_gguf.request import Contrast, Request

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])
"""Per channel, of values 0 to 1: CLIP's own normalisation, as in openai/CLIP."""

DISTURBING_ROLE = "You are a confused object detector."


@dataclass(frozen=True)
class Vcd(Method):
    """Visual Contrastive Decoding (arXiv 2311.16922): the degraded branch sees a noised image.

    step: of the diffusion, 0 (hardly any noise) to 999. Differs from the paper in that the noised
    image is rounded to 8 bits and cut to their range before it is encoded, and that it is the same
    for all questions about an image.
    """

    alpha: float = 1.0
    beta: float = 0.1
    step: int = 500
    name: str = "vcd"

    def request(self, question: Question) -> Request:
        images = [
            noised(image, self.step, size=question.image_size, seed=question.image_seed)
            for image in question.images
        ]
        guidance = Guidance(alpha=self.alpha, beta=self.beta)
        return question.ask(guidance=guidance, contrast=Contrast(question.item.prompt, images))


@dataclass(frozen=True)
class NoImage(Method):
    """The degraded branch is asked without the image, with constant strength."""

    alpha: float = 1.0
    beta: float = 0.1
    name: str = "no-image"

    def request(self, question: Question) -> Request:
        guidance = Guidance(alpha=self.alpha, beta=self.beta)
        return question.ask(guidance=guidance, contrast=Contrast(question.item.prompt))


@dataclass(frozen=True)
class M3id(Method):
    """M3ID (arXiv 2403.14003): no image in the degraded branch, and strength that grows.

    At the t-th token of the answer, counted from 1, alpha * (1 - g) / g with g = exp(-decay * t):
    0.02 at the first token, 1 at the 35th; published: alpha 1. Differs from the paper in that the
    plausibility cut stands in place of its own threshold on the model's confidence.
    """

    alpha: float = 1.0
    beta: float = 0.1
    decay: float = 0.02
    name: str = "m3id"

    def request(self, question: Question) -> Request:
        contrast = Contrast(question.item.prompt, strength=self.strength)
        return question.ask(guidance=Guidance(beta=self.beta), contrast=contrast)

    def strength(self, n_said: int) -> float:
        """Of the draw behind `n_said` tokens."""
        return self.alpha * math.expm1(self.decay * (n_said + 1))


@dataclass(frozen=True)
class Icd(Method):
    """Instruction Contrastive Decoding (arXiv 2403.18715): a disturbing role in the instruction.

    The degraded branch reads `role` ahead of the question, behind the image.
    """

    alpha: float = 1.0
    beta: float = 0.1
    role: str = DISTURBING_ROLE
    name: str = "icd"

    def request(self, question: Question) -> Request:
        contrast = Contrast(f"{self.role} {question.item.prompt}", question.images)
        return question.ask(guidance=Guidance(alpha=self.alpha, beta=self.beta), contrast=contrast)


def noise_share(step: int) -> tuple[float, float]:
    """(share of the image, share of the noise) at a step of VCD's diffusion, 0 to 999.

    sqrt(a) and sqrt(1 - a), where a is the product of 1 - beta_t over t <= step and beta_t =
    sigmoid(6 * (2t / 999 - 1)) * (0.005 - 0.00001) + 0.00001. Source: the authors' repository.
    """
    betas = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * (0.5e-2 - 1e-5) + 1e-5
    kept = float(np.prod(1 - betas[: step + 1]))
    return math.sqrt(kept), math.sqrt(1 - kept)


def noised(
    pixels: npt.NDArray[np.uint8], step: int, *, size: int, seed: int
) -> npt.NDArray[np.uint8]:
    """The image with VCD's noise: (H, W, 3) uint8, scaled to `size` pixels on its longer side.

    The noise is added at the size at which the encoder sees the image, in CLIP's normalisation:
    on a larger image it would be averaged away. Aspect ratio is kept.
    """
    height, width, _ = pixels.shape
    scale = size / max(height, width)
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    scaled = np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling.BICUBIC))
    normal = (scaled / 255 - CLIP_MEAN) / CLIP_STD
    image, noise = noise_share(step)
    mixed = image * normal + noise * np.random.default_rng(seed).standard_normal(normal.shape)
    levels: npt.NDArray[np.float64] = np.rint((mixed * CLIP_STD + CLIP_MEAN) * 255)
    return levels.clip(0, 255).astype(np.uint8)
