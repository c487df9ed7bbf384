"""The README's Python runs as it stands, on the built-in pair and a drawn scene."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cmg_gguf.tiny.pair import embedded_pair
from cmg_gguf.tiny.scenes import draw, make_scene

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_the_python_of_the_readme_runs_and_its_loop_ends_with_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cmg-gguf-demo").mkdir()
    for picture in ("kitchen.png", "cmg-gguf-demo/scene.png"):
        Image.fromarray(draw(make_scene("test", 0, "counter"))).save(picture)
    files = ("llava-v1.5-7b.Q4_K_M.gguf", "mmproj-f16.gguf", "kitchen.jpg")
    names: dict[str, Any] = {}
    for block in BLOCKS:
        for told, there in zip(files, (*embedded_pair(), "kitchen.png"), strict=True):
            block = block.replace(told, str(there))
        exec(block, names)
    vlm = names["vlm"]
    assert vlm.model.is_end(names["token"])
    assert names["stream"].reply.text in capsys.readouterr().out
    for opened in ("vlm", "tiny"):
        names[opened].close()
