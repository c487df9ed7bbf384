"""What makes a run this run: task, items, model, methods, seed. Two runs alike give one result.

It is written to `run.json` and compared when a run goes on, is merged, or is reported.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cmg_gguf import __version__
from cmg_gguf.errors import EvaluationError, ModelError
from cmg_gguf.evaluation.answers import RULES, YesNoRule
from cmg_gguf.evaluation.items import items_digest
from cmg_gguf.evaluation.method import Method
from cmg_gguf.evaluation.task import Item, Task

if TYPE_CHECKING:
    from cmg_gguf.vlm import GuidedVLM

FORMAT = 1
_END = 16 * 2**20
_TASKS = "cmg_gguf.evaluation.tasks."
_SILENT = ("n_threads", "n_parallel", "verbose", "progress", "use_mmap", "main_gpu")
"""Options of a model that do not change what it says, but for rounding."""


@dataclass(frozen=True)
class ModelFiles:
    """A model that any process can open. options: keyword arguments of `GuidedVLM`.

    n_parallel among them: how many questions it is asked at once. With 1, answers repeat to the
    bit and their seconds are their own; with more, answers share decodes, and repeat but for
    rounding.
    """

    model: str | Path
    mmproj: str | Path
    options: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> GuidedVLM:
        """The loaded model. Raises CMGError."""
        from cmg_gguf.vlm import GuidedVLM

        # Not by the clock: a run that is resumed or repeated gives the same answers.
        return GuidedVLM(self.model, self.mmproj, **{"strategy": "exact", **self.options})

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Name, size and checksum of both files, and the options that change answers."""
        options = {k: v for k, v in sorted(self.options.items()) if k not in _SILENT}
        return {
            "model": _file_identity(Path(self.model)),
            "mmproj": _file_identity(Path(self.mmproj)),
            "options": options,
        }


def manifest(
    task: Task,
    model: ModelFiles,
    methods: Sequence[Method],
    items: Sequence[Item],
    *,
    seed: int,
    limit: int | None,
) -> dict[str, Any]:
    """The content of `run.json` but for the shard, JSON-ready. Raises ModelError."""
    return {
        "format": FORMAT,
        "task": task_identity(task),
        "items": {**counted(items), "limit": limit},
        "model": model.identity,
        "methods": {method.name: method.settings() for method in methods},
        "seed": seed,
        "versions": {"cmg_gguf": __version__, "llama_cpp_python": version("llama-cpp-python")},
    }


def counted(items: Sequence[Item]) -> dict[str, Any]:
    """How many items there are, and a checksum of all there is to them, JSON-ready."""
    return {"count": len(items), "sha256": items_digest(items)}


def task_identity(task: Task) -> dict[str, Any]:
    """A task's class and settings, JSON-ready; `task_from` makes a task of this package of it."""
    cls = type(task)
    options = None
    if is_dataclass(task):
        values = {f.name: getattr(task, f.name) for f in fields(task) if f.init}
        options = {name: _plain(value) for name, value in values.items()}
    return {"name": task.name, "class": f"{cls.__module__}.{cls.__qualname__}", "options": options}


def places(task: Task) -> frozenset[str]:
    """Names of a task's settings that say where its files are, not what is in them."""
    if not is_dataclass(task):
        return frozenset()
    return frozenset(f.name for f in fields(task) if f.init and "Path" in str(f.type))


def grown(before: Mapping[str, Any], told: Mapping[str, Any], moved: frozenset[str]) -> Any:
    """A run's manifest with what may change between two starts of it taken from `told`: methods
    that it has not had, and where the task's files are (settings `moved`)."""
    task = dict(before.get("task") or {})
    new, old = told["task"]["options"] or {}, task.get("options") or {}
    options = {**old, **{name: new[name] for name in moved if name in new}}
    methods = {**told["methods"], **(before.get("methods") or {})}
    return {**before, "task": {**task, "options": options or None}, "methods": methods}


def task_from(identity: Mapping[str, Any]) -> Task:
    """The task that `task_identity` describes.

    Raises EvaluationError for a task that is none of this package's: nothing else is imported.
    """
    module, _, name = str(identity.get("class")).rpartition(".")
    options = identity.get("options")
    if not module.startswith(_TASKS) or not isinstance(options, Mapping):
        raise EvaluationError(
            f"task {identity.get('name')} is none of this package's; give the task itself (task=)"
        )
    try:
        cls = getattr(importlib.import_module(module), name)
        task = cls(**{key: _made(value) for key, value in options.items()})
    except (ImportError, AttributeError, TypeError, KeyError) as exc:
        raise EvaluationError(
            f"task {identity.get('name')} cannot be made as the run says ({exc}); was the run made "
            "by another version?"
        ) from exc
    return cast(Task, task)


def _plain(value: Any) -> Any:
    if isinstance(value, YesNoRule):
        return {"yes_no_rule": value.name}
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        values = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [_plain(v) for v in values]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return repr(value)


def _made(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"yes_no_rule"}:
        return RULES[value["yes_no_rule"]]
    return tuple(value) if isinstance(value, list) else value


def _file_identity(path: Path) -> dict[str, Any]:
    """Name, bytes, and the SHA-256 of the first and last 16 MiB: the header and some weights."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_END))
            file.seek(max(_END, size - _END))
            digest.update(file.read(_END))
    except OSError as exc:
        raise ModelError(
            f"model file {path} cannot be read ({exc.strerror}); give the path of a .gguf file"
        ) from exc
    return {"name": path.name, "bytes": size, "sha256_of_ends": digest.hexdigest()}
