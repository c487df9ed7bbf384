"""What exactness is asked over: scopes, ways to refresh, caches and widths."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import EXACT
from tiny_llava import TinyConfig

from cmg_gguf.guidance import Refresh, Scope

SCOPES: tuple[Scope, ...] = ("decode", "question", "text", "all")
REFRESHES: tuple[Refresh, ...] = ("prompt", "step")
HALF_FLASH = replace(EXACT, flash_attn=True, type_k="f16", type_v="f16")
WIDE = TinyConfig(n_embd=128)  # heads of 32, as a Q8_0 cache needs

every_scope = pytest.mark.parametrize("scope", SCOPES)
every_refresh = pytest.mark.parametrize("refresh", REFRESHES)
