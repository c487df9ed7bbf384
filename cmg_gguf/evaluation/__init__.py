"""Does guidance reduce hallucination on this model and these images? Benchmarks and controls.

    from cmg_gguf import Guidance
    from cmg_gguf.evaluation import ModelFiles, chosen, evaluate, make_report, markdown
    from cmg_gguf.evaluation.tasks.pope import Pope

    run = evaluate(
        Pope(["coco_pope_random.json"], "val2014"),
        ModelFiles("llava.gguf", "mmproj.gguf"),
        chosen(["greedy", "sample", "cut", "cmg", "yes-bias"], Guidance()),
        "runs/pope",
    )
    print(markdown(make_report(run)))

The command line does the same: `cmg-gguf eval pope`. A benchmark of your own is a class with the
methods of `Task`, a way to answer one with those of `Method`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmg_gguf.evaluation.cluster import Dask
    from cmg_gguf.evaluation.executors import Processes, in_process
    from cmg_gguf.evaluation.frontier import swept
    from cmg_gguf.evaluation.items import Shard
    from cmg_gguf.evaluation.manifest import ModelFiles
    from cmg_gguf.evaluation.method import Method, Question
    from cmg_gguf.evaluation.methods import METHODS, chosen
    from cmg_gguf.evaluation.plots import write_plots
    from cmg_gguf.evaluation.records import Record
    from cmg_gguf.evaluation.report import Report, make_report
    from cmg_gguf.evaluation.report_text import markdown, write_report
    from cmg_gguf.evaluation.run import Run, evaluate, merge, read_run
    from cmg_gguf.evaluation.task import BadItem, Item, Task
    from cmg_gguf.evaluation.tuning import grid, tune

_WHERE = {
    "METHODS": "methods",
    "BadItem": "task",
    "Dask": "cluster",
    "Item": "task",
    "Method": "method",
    "ModelFiles": "manifest",
    "Processes": "executors",
    "Question": "method",
    "Record": "records",
    "Report": "report",
    "Run": "run",
    "Shard": "items",
    "Task": "task",
    "chosen": "methods",
    "evaluate": "run",
    "grid": "tuning",
    "in_process": "executors",
    "make_report": "report",
    "markdown": "report_text",
    "merge": "run",
    "read_run": "run",
    "swept": "frontier",
    "tune": "tuning",
    "write_plots": "plots",
    "write_report": "report_text",
}

__all__ = [
    "METHODS",
    "BadItem",
    "Dask",
    "Item",
    "Method",
    "ModelFiles",
    "Processes",
    "Question",
    "Record",
    "Report",
    "Run",
    "Shard",
    "Task",
    "chosen",
    "evaluate",
    "grid",
    "in_process",
    "make_report",
    "markdown",
    "merge",
    "read_run",
    "swept",
    "tune",
    "write_plots",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # On first use, for scoring alone needs no llama.cpp.
    if name in _WHERE:
        module = importlib.import_module(f"cmg_gguf.evaluation.{_WHERE[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
