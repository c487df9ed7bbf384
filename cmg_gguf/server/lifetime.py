"""The model while it is wanted: loaded when somebody asks, freed when nobody has for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cmg_gguf.vlm import GuidedVLM


class Lifetime:
    """A model that can be loaded again. Belongs to one event loop.

    vlm: as it was loaded first. idle_seconds: it is freed when nothing has used it for so long;
    None = never.
    """

    def __init__(
        self,
        vlm: GuidedVLM,
        load: Callable[[], GuidedVLM],
        idle_seconds: float | None = None,
    ) -> None:
        self.vlm: GuidedVLM | None = vlm
        """The model; None while it sleeps."""
        self._load, self._idle_seconds = load, idle_seconds
        self._lock = asyncio.Lock()
        self._n_uses = 0
        self._timer: asyncio.TimerHandle | None = None
        self._sleeping: asyncio.Task[None] | None = None

    async def awake(self) -> GuidedVLM:
        """The model, loaded now if it sleeps. Raises what loading raises."""
        async with self._lock:
            if self.vlm is None:
                self.vlm = await asyncio.to_thread(self._load)
            return self.vlm

    @contextmanager
    def used(self) -> Iterator[None]:
        """It does not fall asleep meanwhile."""
        self._n_uses += 1
        if self._timer is not None:
            self._timer.cancel()
        try:
            yield
        finally:
            self._n_uses -= 1
            if self._n_uses == 0 and self._idle_seconds is not None:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self._idle_seconds, self._fall_asleep)

    async def close(self) -> None:
        """Frees the model. Answers under way end."""
        async with self._lock:
            vlm, self.vlm = self.vlm, None
            if vlm is not None:
                await asyncio.to_thread(vlm.close)

    def _fall_asleep(self) -> None:
        self._sleeping = asyncio.get_running_loop().create_task(self._sleep())

    async def _sleep(self) -> None:
        if self._n_uses == 0:
            await self.close()
