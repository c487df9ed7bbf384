"""Where the tests compute: `CMG_TEST_NGL=99 scripts/test` puts all layers on the accelerator."""

from __future__ import annotations

import os

N_GPU_LAYERS = int(os.environ.get("CMG_TEST_NGL", "0"))
"""Layers of every model that the tests open; image encoders stay on the CPU."""
