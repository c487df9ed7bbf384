"""Whether this installation, and a model pair, do what they should: what `cmg-gguf doctor` tells.

for finding in examine(("llava.gguf", "mmproj.gguf"), n_ctx=4096):
    print(finding.status, finding.name, finding.found, finding.remedy)
"""

from __future__ import annotations

from cmg_gguf.doctor.examine import examine
from cmg_gguf.doctor.finding import Finding, Status

__all__ = ["Finding", "Status", "examine"]
