"""A folder of pictures, captioned: `caption` does it, `Captions` says how.

    result = caption("photos", vlm, prompt="Describe the image.", existing="skip")
    print(result.n_written, result.problems)

Where the work is done is said by the executors of `cmg_gguf.evaluation`: in this process, in
several, or on a cluster.
"""

from __future__ import annotations

from cmg_gguf.captioning.run import Captioned, Planned, Problem, caption, planned
from cmg_gguf.captioning.settings import Captions, Existing, Layout

__all__ = [
    "Captioned",
    "Captions",
    "Existing",
    "Layout",
    "Planned",
    "Problem",
    "caption",
    "planned",
]
