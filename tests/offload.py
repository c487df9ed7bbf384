"""Where the tests compute, and how exactly.

CMG_TEST_NGL=99 scripts/test   # with all layers on the accelerator
"""

from __future__ import annotations

import os

N_GPU_LAYERS = int(os.environ.get("CMG_TEST_NGL", "0"))
"""Layers of every model that the tests open; image encoders stay on the CPU."""
FLASH = os.environ.get("CMG_TEST_FLASH", "1") != "0"
"""Whether flash attention is tried. Some drivers crash in it."""
ON_DEVICE = N_GPU_LAYERS != 0

TOLERANCE = 0.1 if ON_DEVICE else 1e-4
"""Largest logit error against the judge with F32 weights and cache; the logits have an RMS of about
3. No device computes to 1e-4: exp, log and sin are approximate there, and products may be TF32."""
APART = 10 * TOLERANCE if ON_DEVICE else 100 * TOLERANCE
"""What two branches differ by at least, where a test tells them apart."""
FINE = 1e-2 if ON_DEVICE else 1e-6
"""Largest error of a cosine."""
