"""The model pair that comes with the package, so that a first answer needs nothing else.

    vlm = GuidedVLM(*embedded_pair())
    vlm.generate("Is there a fork in the image?", [picture], guidance=embedded_guidance())

A tiny LLaVA that was trained from nothing on the drawn world of `cmg_gguf.tiny.scenes`
(`scripts/train_embedded`); it knows nothing else. What it was trained on, and what was measured on
it, is in `models/README.md`.
"""

from __future__ import annotations

from pathlib import Path

from cmg_gguf.errors import ModelError
from cmg_gguf.guidance import Guidance
from cmg_gguf.settings import load_settings

FOLDER = Path(__file__).parent / "models"
NAME = "tiny-llava"


def embedded_pair() -> tuple[Path, Path]:
    """Model and mmproj. Raises ModelError if they are not there, as in a checkout without them."""
    pair = FOLDER / f"{NAME}.Q8_0.gguf", FOLDER / f"{NAME}.mmproj-f16.gguf"
    for path in pair:
        if not path.is_file():
            raise ModelError(
                f"{path.name} is not part of this installation; reinstall cmg-gguf, or name a "
                "model pair of your own"
            )
    return pair


def embedded_guidance() -> Guidance:
    """The settings that were chosen for this model, on scenes that nothing is reported on."""
    return load_settings(settings_file()).guidance


def settings_file() -> Path:
    """Those settings as a file: see `cmg_gguf.guidance.load_settings`."""
    return FOLDER / f"{NAME}.settings.json"
