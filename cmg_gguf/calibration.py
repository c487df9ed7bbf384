"""What each way of stepping costs with this model on this machine: measured once, then remembered.

choice = Choice(engine, "auto", cost_key(model, options, n_gpu_layers))
choice.settle()     # before a guided request
choice.name         # "lazy"

costs = remembered(key) or measure(engine)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from cmg_gguf import _core
from cmg_gguf.engine.context import Branch
from cmg_gguf.engine.engine import PairedEngine
from cmg_gguf.engine.fork import Forking, survey
from cmg_gguf.engine.lazy import Lazy, PromptEnd
from cmg_gguf.engine.rows import core_policy
from cmg_gguf.engine.steps import Masking, Plain, Together
from cmg_gguf.engine.strategy import CAUGHT_UP, STEPPING, Costs
from cmg_gguf.errors import CMGError, ContextLengthError, UnsupportedError
from cmg_gguf.guidance import LayerRange, TopRatio, static_layers
from cmg_gguf.llama.about import devices
from cmg_gguf.llama.context import ContextOptions, LlamaContext
from cmg_gguf.llama.model import Model

N_CELLS = 64
"""KV cells that measuring takes, at most."""
_N_BEFORE = 8
_log = logging.getLogger(__name__)
_FORMAT = 1

Key = Mapping[str, Any]
"""What costs depend on, JSON-ready."""


class Choice:
    """Which way of stepping an engine uses, and why.

    "auto" is what was measured before; with nothing measured, "adaptive" on a CPU, where a row less
    is time saved however it comes about. On an accelerator a decode can cost the same for one row
    and for two, so it is measured before the first guided request, which takes about a second.
    """

    def __init__(self, engine: PairedEngine, strategy: str, key: Key) -> None:
        self._engine, self._key = engine, key
        self._auto = strategy == "auto"
        self.name = strategy
        if not self._auto:
            self._use(strategy)
        elif not engine.paired:
            self._use("eager")
        elif costs := remembered(key):
            self._use(costs.best(), costs)
        elif not key["accelerated"]:
            self._use("adaptive")

    def settle(self) -> None:
        """Measures where that has to be; afterwards `name` is no longer "auto". Never fails."""
        if self.name != "auto":
            return
        try:
            self.calibrate(1.0)
        except CMGError as exc:
            _log.debug("the ways of stepping could not be timed: %s", exc)
            self._use("fork")

    def calibrate(self, seconds: float) -> Costs:
        """See `GuidedVLM.calibrate`."""
        if not self._engine.paired:
            raise UnsupportedError(
                'two contexts can only be stepped one after the other; use pairing="pair"'
            )
        n_ctx = self._engine.original.context.n_ctx
        if n_ctx < N_CELLS:
            raise ContextLengthError(f"n_ctx={n_ctx} is too small to measure in: {N_CELLS} and up")
        costs = measure(self._engine, seconds)
        remember(self._key, costs)
        if self._auto:
            self._use(costs.best(), costs)
        return costs

    def _use(self, name: str, costs: Costs | None = None) -> None:
        self.name = name
        self._engine.stepping = costs.stepping(name) if costs else STEPPING[name]


def cost_key(model: Model, options: ContextOptions, n_gpu_layers: int) -> Key:
    """What the costs of this model, in such a context, on this machine, are remembered by."""
    identity: list[object] = [model.path.name, model.size]
    with suppress(OSError):
        identity.append(model.path.stat().st_mtime_ns)
    return {
        "format": _FORMAT,
        "model": identity,
        "layers": model.n_layer,
        "devices": [[device.name, device.description, device.backend] for device in devices()],
        "n_gpu_layers": n_gpu_layers,
        "accelerated": n_gpu_layers != 0 and llama_cpp.llama_supports_gpu_offload(),
        "n_threads": options.n_threads,
        "flash_attn": options.flash_attn,
        "cache": [options.type_k, options.type_v, options.offload_kqv],
        "llama_cpp_python": llama_cpp.__version__,
    }


def cost_folder() -> Path:
    """The user's folder for files that can be made again, one of ours in it."""
    home = Path.home()
    base = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or base) / "cmg-gguf"


def remembered(key: Key) -> Costs | None:
    """The costs that were remembered by this key; None if there are none, or none to be read."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        found = json.loads(_file(key).read_text("utf-8"))
        costs = found["costs"]
        if found["key"] == json.loads(json.dumps(key)):
            return Costs(
                **{**costs, "catch_up": tuple(costs["catch_up"]), "forks": tuple(costs["forks"])}
            )
    return None


def remember(key: Key, costs: Costs) -> None:
    """Writes the costs down. Where that cannot be done, they are measured again next time."""
    with suppress(OSError, RuntimeError):
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"key": key, "costs": asdict(costs)}, indent=1), "utf-8")
        part.replace(file)


def _file(key: Key) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cost_folder() / f"costs-{name}.json"


def calibrated(
    path: Path, options: ContextOptions, n_gpu_layers: int, seconds: float = 2.0
) -> Costs:
    """The costs of the model in this file, measured and remembered. No image projector is needed.

    Raises ModelError, BackendError.
    """
    model = Model.load(path, n_gpu_layers=n_gpu_layers)
    selections = _core.Selections(model.n_layer)
    context = LlamaContext(model, None, selections, options, n_seq_max=2)
    engine = PairedEngine(Branch(context, 0), Branch(context, 1), selections)
    return Choice(engine, "auto", cost_key(model, options, n_gpu_layers)).calibrate(seconds)


def measure(engine: PairedEngine, seconds: float = 2.0) -> Costs:
    """Times every way of stepping in turns, on scratch cells that are free again afterwards.

    The engine is empty before and after, and prompts that it kept are gone. seconds: when to stop;
    every way runs twice at least, and the first time does not count. Raises BackendError,
    ContextLengthError.
    """
    engine.reset()
    engine.prefixes.forget()
    try:
        return _Trial(engine).costs(time.perf_counter() + seconds)
    finally:
        engine.reset()


class _Trial:
    """Steps behind a text of a few tokens, with the masks of the default layers and none hidden."""

    def __init__(self, engine: PairedEngine) -> None:
        self._engine = engine
        original, degraded = engine.original, engine.degraded
        context = self._context = original.context
        self._token = context.n_vocab // 2
        layers = static_layers(LayerRange(), context.n_layer)
        policy = core_policy(TopRatio())
        masking = Masking(layers=layers, policy=policy, n_image_tokens=0, observed=False)
        engine.selections.resize(1)
        survey(original, degraded)
        for branch in (original, degraded):
            for i in range(_N_BEFORE):
                Plain(branch, 0).step(self._token, i)
        logits = np.empty(context.n_vocab, np.float32)
        addresses = logits.ctypes.data, logits.ctypes.data
        self._plain = Plain(original, addresses[0])
        whole, fork = Forking(context, ()), Forking(context, layers)
        self._forks = fork.pairs, fork.layer > 0
        self._pair = Together(original, degraded, masking, whole, addresses)
        self._fork = Together(original, degraded, masking, fork, addresses)
        self._lazy = Lazy(
            original, degraded, masking, fork, PromptEnd(logits, lambda: addresses[1])
        )

    def costs(self, until: float) -> Costs:
        times: dict[str, list[float]] = {}
        n_rounds = 0
        while n_rounds < 2 or time.perf_counter() < until:
            for name, ms in self._round().items():
                times.setdefault(name, []).append(ms)
            n_rounds += 1
        median = {name: statistics.median(runs[1:]) for name, runs in times.items()}
        return Costs(
            plain=median["plain"],
            pair=median["pair"],
            fork=median["fork"],
            lazy=median["lazy"],
            catch_up=tuple(median[f"catch up {n}"] for n in CAUGHT_UP),
            forks=self._forks,
        )

    def _round(self) -> dict[str, float]:
        """A step of another number of rows than the one before builds its graph anew. Plain and
        paired steps follow their own kind; lazy ones come between rows that catch up."""
        times = {}
        for name, stepper in (("plain", self._plain), ("pair", self._pair), ("fork", self._fork)):
            stepper.step(self._token, _N_BEFORE)
            times[name] = _milliseconds(partial(stepper.step, self._token, _N_BEFORE + 1))
            self._rewind()
        times["lazy"] = _milliseconds(partial(self._lazy.step, self._token, _N_BEFORE))
        for n in CAUGHT_UP:
            for i in range(n if n > 1 else 0):
                self._lazy.step(self._token, _N_BEFORE + i)
            times[f"catch up {n}"] = _milliseconds(lambda: self._lazy.degraded_address)
            self._rewind()
        return times

    def _rewind(self) -> None:
        for branch in (self._engine.original, self._engine.degraded):
            branch.context.truncate(branch.seq, _N_BEFORE)


def _milliseconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3
