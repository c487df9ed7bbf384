"""One table: families down, comparisons across. Exit status 1 if anything is out of its limits."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from judge_suite.checks import CHECKS, Case, Cell, Check, openings, run
from judge_suite.converter import convert, llama_cpp_sources
from judge_suite.families import FAMILIES, FAST
from judge_suite.family import Family, pictures
from judge_suite.product import opened
from judge_suite.reference import Judge, round_gelu_inplace


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(1)
    names = arguments.families or (FAST if arguments.fast else tuple(FAMILIES))
    settings = {"encoder": arguments.encoder}
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    sources = llama_cpp_sources(work)
    checks = dict(CHECKS)
    if arguments.openings:
        checks["openings"] = partial(openings, n=arguments.openings)
    columns = list(checks)
    columns.insert(1, "cosine")
    print(" | ".join(["family", *columns, "seconds"]), flush=True)
    failed = []
    for name in names:
        started = time.monotonic()
        try:
            cells = judged(FAMILIES[name], work / name, sources, settings, checks, arguments.gelu)
        except Exception:
            traceback.print_exc()
            cells = {}
        row = [cells.get(column, Cell("-", False)) for column in columns]
        if not all(cell.passed for cell in row):
            failed.append(name)
        shown = [cell.shown + ("" if cell.passed else " !") for cell in row]
        print(" | ".join([name, *shown, f"{time.monotonic() - started:.0f}"]), flush=True)
    print(json.dumps({"judged": len(names), "failed": failed}))
    return 1 if failed else 0


def judged(
    family: Family,
    work: Path,
    sources: Path,
    settings: dict[str, Any],
    checks: Mapping[str, Check],
    gelu: str,
) -> dict[str, Cell]:
    """The table's row for one family, built anew in the folder `work`."""
    shutil.rmtree(work, ignore_errors=True)
    torch.manual_seed(0)
    checkpoint, files = work / "checkpoint", (work / "llm.gguf", work / "mmproj.gguf")
    model = family.build(checkpoint)
    convert(sources, checkpoint, files[0], mmproj=False, pre=family.pre, options=family.llm_options)
    if family.write_mmproj is not None:
        family.write_mmproj(model, files[1])
    else:
        names = family.mmproj_names
        convert(sources, checkpoint, files[1], mmproj=True, pre=family.pre, rename=names)
    if gelu == "table":
        round_gelu_inplace(family.text_model(model))
    judge = Judge(model, family.text_model(model))
    with opened(*files, **settings) as vlm:
        return run(Case(family, judge, vlm, files, pictures(family), settings), checks)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/judge", description=__doc__)
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], metavar="FAMILY")
    parser.add_argument("--fast", action="store_true", help=f"only {', '.join(FAST)}")
    parser.add_argument(
        "--encoder",
        choices=["mended", "stock"],
        default="mended",
        help="stock: the image encoder as llama.cpp has it",
    )
    parser.add_argument(
        "--gelu",
        choices=["exact", "table"],
        default="exact",
        help="table: transformers' decoders round GELU (tanh) as llama.cpp's table on a CPU does",
    )
    parser.add_argument(
        "--openings",
        type=int,
        default=0,
        metavar="N",
        help="each model is also opened N times, on memory that held NaN",
    )
    parser.add_argument("--work", type=Path, default=Path("build/judge"), help="where files go")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
