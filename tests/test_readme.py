"""The Python of the README and of other documents runs as it stands, on the built-in pair and a
drawn scene."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from served import data_url, serving

from cmg_gguf.tiny.pair import embedded_pair
from cmg_gguf.tiny.scenes import draw, make_scene

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [
    README,
    *(
        path
        for place in (".github", "cmg_gguf", "scripts")
        for path in (ROOT / place).rglob("*.md")
    ),
]


def code(path: Path, languages: str) -> list[str]:
    """Fenced blocks of these languages, those within lists too."""
    fenced = rf"^( *)```(?:{languages})\n(.*?)^\1```"
    text = path.read_text("utf-8")
    return [
        textwrap.dedent(block) for _, block in re.findall(fenced, text, re.DOTALL | re.MULTILINE)
    ]


BLOCKS = code(README, "python")
CLIENTS = code(README, "py")
"""Of a running server: a program each."""


def test_no_python_of_a_document_is_left_out() -> None:
    found = [
        line
        for path in DOCUMENTS
        for line in path.read_text("utf-8").splitlines()
        if re.match(r"\s*(```|~~~)\s*\{?\.?(py|pycon)", line, re.IGNORECASE)
    ]
    assert len(found) == len(BLOCKS) + len(CLIENTS)
    assert BLOCKS
    assert CLIENTS


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
    assert names["outcome"].reply.text
    assert 0 <= names["word"].evidence <= 1
    assert names["stream"].reply.text in capsys.readouterr().out
    for opened in ("vlm", "tiny"):
        names[opened].close()


def test_a_client_of_the_readme_gets_its_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as running:
        for block in CLIENTS:
            told = (
                ("http://127.0.0.1:8080", running.url),
                ("data:image/png;base64,...", data_url(2)),
            )
            for example, there in told:
                assert example in block
                block = block.replace(example, there)
            names: dict[str, Any] = {}
            exec(block, names)
            names["client"].close()
            reply = names["reply"]
            assert reply.choices[0].finish_reason in ("stop", "length")
            said = f"{reply.choices[0].message.content} {reply.cmg['changed']}\n"
            assert capsys.readouterr().out == said
