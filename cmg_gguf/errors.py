"""Every exception this package raises on purpose.

    CMGError
    ├── the caller's mistakes
    │   ├── GuidanceError        (also ValueError)
    │   ├── SamplingError        (also ValueError)
    │   ├── ImageError           (also ValueError)
    │   ├── EvaluationError      (also ValueError)
    │   ├── CaptionError         (also ValueError)
    │   └── PromptError          (also ValueError)
    │       └── ContextLengthError
    └── the world's
        ├── ModelError
        │   ├── ProjectorError
        │   └── HubError
        │       ├── HubNameError (also ValueError)
        │       └── HubConnectionError
        ├── BackendError         (also RuntimeError)
        └── UnsupportedError

A message is one line that names the value, the limit and the remedy: "layer 40 is out of range:
this model has 32 layers (0-31)".
"""

from __future__ import annotations

import reprlib

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 72


class CMGError(Exception):
    """Root of all errors of this package."""


class GuidanceError(CMGError, ValueError):
    """A guidance setting is out of its range, or two settings contradict each other."""


class SamplingError(CMGError, ValueError):
    """A sampling setting is out of its range."""


class ImageError(CMGError, ValueError):
    """An image source cannot be read as an image, or the image is over a limit."""


class EvaluationError(CMGError, ValueError):
    """A benchmark's files or settings are missing or wrong, or results do not belong together."""


class CaptionError(CMGError, ValueError):
    """A folder to caption, its files or the settings for that are not as they must be."""


class PromptError(CMGError, ValueError):
    """Messages, chat template and images do not make a prompt."""


class ContextLengthError(PromptError):
    """The prompt is longer than the context."""


class ModelError(CMGError):
    """The model file is missing, damaged, or not the kind of model asked for."""


class ProjectorError(ModelError):
    """The multimodal projector file is missing, damaged, or does not fit the model."""


class HubError(ModelError):
    """A model cannot be had from a hub: no such repository, no such file in it, or no access."""


class HubNameError(HubError, ValueError):
    """A name is not of the form owner/repo[:quant]."""


class HubConnectionError(HubError):
    """The hub is not reached, and the cache does not have the model."""


class BackendError(CMGError, RuntimeError):
    """llama.cpp refused to decode, or its graph is not as expected."""


class UnsupportedError(CMGError):
    """This model, build or platform cannot do what was asked for."""


def shown(value: object) -> str:
    """Return `repr(value)` shortened and on one line, as it stands in error messages."""
    return " ".join(_SHORT.repr(value).split())
