"""A folder whose captioning is killed over and over ends as if it had not been."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from captioned import CORRUPT, MODEL, NAMES, SIDECARS, draw_odd, draw_pictures, files_in

from cmg_gguf.captioning import caption

CHILD = """\
import os, signal, sys
from pathlib import Path

from cmg_gguf.captioning import caption, layouts
from cmg_gguf.evaluation.executors import in_process
from cmg_gguf.evaluation.manifest import ModelFiles
from cmg_gguf.evaluation.records import Journal
from cmg_gguf.tiny.pair import embedded_pair

folder, log, where, to, existing = sys.argv[1:]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def answers(job, works):
    for record in in_process(job, works):
        if record.problem is None:
            with open(log, "a") as file:
                print(record.item, file=file)
        yield record

journalled, write = Journal.add, layouts.write_at_once
if where == "behind the journal":
    Journal.add = lambda *given: (journalled(*given), die())
elif where == "half a file":
    def half(path, text, part):
        path.with_name(part).write_text(text[: len(text) // 2])
        die()
    layouts.write_at_once = half
elif where == "half a line":
    def torn(journal, record):
        journalled(journal, record)
        journal._file.write(b'{"item": "to')
        journal._file.flush()
    Journal.add = torn

def n_answered():
    return len(open(log).readlines()) if os.path.exists(log) else 0

def progress(done, total):
    if where in ("behind", "half a line") and n_answered() > before:
        die()

before = n_answered()
caption(folder, ModelFiles(*embedded_pair(), {"n_parallel": 1}), executor=answers,
        progress=progress, recursive=True, max_tokens=24, to=to, existing=existing)
"""
WHERE = ["behind", "behind the journal", "half a file", "half a line"]


def killed(folder: Path, log: Path, where: str, *how: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(log), where, *how],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",  # not in this folder: the package is the installed one
    )
    assert run.returncode in (0, -signal.SIGKILL), run.stderr
    return run.returncode


@pytest.mark.parametrize("n", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_no_picture_is_answered_twice_and_the_right_files_are_there(tmp_path: Path, n: int) -> None:
    folder, log = tmp_path / "pictures", tmp_path / "log"
    draw_odd(folder)
    (folder / "kitchen.txt").write_text("tag")
    before = files_in(folder)
    for i in range(n):
        assert killed(folder, log, WHERE[i % 4], "txt", "append") == -signal.SIGKILL
        held = [folder / name for name in SIDECARS if (folder / name).exists()]
        assert all(path.read_text("utf-8").endswith((".", "tag")) for path in held)  # none half
    assert killed(folder, log, "", "txt", "append") == 0
    assert Counter(log.read_text("utf-8").splitlines()) == Counter(NAMES)
    assert files_in(folder) - before == {*SIDECARS, "caption-problems.jsonl"} - {"kitchen.txt"}
    assert (folder / "kitchen.txt").read_text().startswith("tag, This is ")
    assert (folder / "kitchen.txt").read_text().count("This is ") == 1
    (line,) = (folder / "caption-problems.jsonl").read_text().splitlines()
    assert json.loads(line)["image"] == CORRUPT


def test_one_file_for_all_has_every_caption_of_runs_that_were_killed(tmp_path: Path) -> None:
    folder, whole, log = tmp_path / "pictures", tmp_path / "whole", tmp_path / "log"
    names = [f"{i}.png" for i in range(4)]
    for made in (folder, whole):
        draw_pictures(made, names)
    for where in ("behind", "behind the journal", "half a file"):
        assert killed(folder, log, where, "metadata.jsonl", "overwrite") == -signal.SIGKILL
    assert killed(folder, log, "", "metadata.jsonl", "overwrite") == 0
    assert sorted(log.read_text().splitlines()) == names
    options: dict[str, Any] = {"max_tokens": 24, "to": "metadata.jsonl"}
    model = type(MODEL)(MODEL.model, MODEL.mmproj, {"n_parallel": 1})
    caption(whole, model, **options)
    assert files_in(folder) == {*names, "metadata.jsonl"}
    one, other = (
        sorted((made / "metadata.jsonl").read_text().splitlines()) for made in (folder, whole)
    )
    assert one == other
