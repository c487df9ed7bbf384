"""A real server on loopback, in a thread of this process, on the built-in pair."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
from commands import PROGRAM, environment
from PIL import Image

from cmg_gguf import GuidedVLM
from cmg_gguf.server.running import Options, Server
from cmg_gguf.server.service import Defaults, Service
from cmg_gguf.tiny.pair import embedded_guidance, embedded_pair
from cmg_gguf.tiny.scenes import draw, make_scene

NAME = "tiny-llava"
QUESTION = "Describe the image."
SCENES = (5, 7, 8, 9, 12, 18)
"""In their answers the best two of each draw are .15 and more apart: answers that share a decode
differ by rounding."""


@dataclass(frozen=True)
class Served:
    """A server that runs. url: without a slash behind."""

    url: str
    service: Service
    server: Server

    @property
    def vlm(self) -> GuidedVLM:
        vlm = self.service.lifetime.vlm
        assert vlm is not None
        return vlm

    def client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **settings)

    def post(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body)

    def wait(self, happened: Any, seconds: float = 10.0) -> bool:
        """Whether happened() within so long."""
        end = time.monotonic() + seconds
        while not happened() and time.monotonic() < end:
            time.sleep(0.005)
        return bool(happened())

    @property
    def is_idle(self) -> bool:
        """Whether no session is open and no place taken."""
        queue = self.service.queue
        return not self.vlm.engine.sessions and queue.n_taken == queue.n_waiting == 0


def load(**settings: Any) -> GuidedVLM:
    """The built-in pair, which gives the same numbers every time."""
    known = {"n_threads": 1, "n_ctx": 2048, "strategy": "exact"}
    return GuidedVLM(*embedded_pair(), **{**known, **settings})


@contextmanager
def serving(vlm: dict[str, Any] | None = None, **settings: Any) -> Iterator[Served]:
    """vlm: settings of the model. settings: see `Options`."""
    opened = partial(load, **(vlm or {}))
    settings.setdefault("defaults", Defaults(guidance=embedded_guidance()))
    server = Server(opened(), opened, Options(port=0, **settings), name=NAME)
    started = threading.Event()
    server.on_start = started.set
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield Served(server.address, server.service, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def program(*arguments: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`cmg-gguf serve` as a program of its own, and its address."""
    process = subprocess.Popen(
        [*PROGRAM, "serve", "--port", "0", "-t", "1", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env={**environment(), **env},
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"is served at (\S+)/v1", line):
                break
        else:
            raise AssertionError("it has ended")
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def data_url(scene: int = 0) -> str:
    """A drawn scene."""
    buffer = io.BytesIO()
    Image.fromarray(draw(make_scene("test", SCENES[scene], "counter"))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def asking(scene: int | None = 0, text: str = QUESTION, **fields: Any) -> dict[str, Any]:
    """The body of a chat completion about a drawn scene, greedy. scene: None = no picture."""
    image = (
        {"type": "image_url", "image_url": {"url": data_url(scene)}} if scene is not None else None
    )
    parts = [image, {"type": "text", "text": text}] if image else text
    messages = [{"role": "user", "content": parts}]
    return {"messages": messages, "temperature": 0, "max_tokens": 24, **fields}
