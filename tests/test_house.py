"""The house: which room of the package may know which, and how long things may be.

Read from the sources, not from what is imported in one run: imports within functions and those for
types alone count like any other.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "cmg_gguf"

VALUES = "errors arrays guidance evidence settings sampling heat reply"
ASKING = f"{VALUES} request"
HOUSE = {
    # A room: what it may know. Lower rooms come first, so no arrow leads up.
    # --- values: what is asked and answered -----------------------------------------------------
    "errors": "",
    "arrays": "",
    "guidance": "errors arrays",
    "evidence": "errors",
    "settings": "errors guidance evidence",
    "sampling": "errors arrays",
    "heat": "errors arrays",
    "reply": "errors arrays guidance evidence heat",
    "tiny": VALUES,
    # --- prompts, and requests made of all that -------------------------------------------------
    "prompt": "errors arrays",
    "request": f"{VALUES} prompt",
    # --- two branches, llama.cpp, an answer: none knows another ---------------------------------
    "_core": "",
    "engine": f"{VALUES} prompt.segments _core",
    "llama": f"{VALUES} prompt engine.context tiny.pair _core llama_cpp",
    "answer": f"{ASKING} prompt.reasoning",
    "chat": ASKING,
    # --- where they are put together ------------------------------------------------------------
    "hub": "errors",
    "opening": f"{ASKING} prompt _core engine llama llama_cpp",
    "stream": f"{ASKING} prompt engine llama answer opening",
    "many": f"{ASKING} answer stream",
    "vlm": f"{ASKING} prompt llama llama_cpp answer chat hub opening stream many",
    "handler": f"{ASKING} opening vlm llama_cpp",
    "facts": f"{VALUES} llama llama_cpp opening",
    "__init__": f"{ASKING} stream many vlm handler llama.openmp",
    # --- what is built on them ------------------------------------------------------------------
    "evaluation": f"{ASKING} prompt chat vlm tiny __init__",
    "doctor": f"{VALUES} prompt engine llama opening vlm facts tiny __init__",
    "captioning": f"{ASKING} prompt vlm evaluation",
    "server": f"{ASKING} tiny prompt chat stream vlm __init__",
    "cli": f"{ASKING} prompt chat hub opening stream vlm facts tiny evaluation doctor captioning "
    "server "
    "__init__",
}
"""`__init__` is the package's own. A room named with a module ("prompt.segments") is known by
that module alone."""

MAX_LINES = 400
MAX_FUNCTION = 60
MEDIAN_FUNCTION = 12


class Module(NamedTuple):
    name: str
    """Within the package: "engine.rows"; "engine" for `engine/__init__.py`."""
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]


def read_modules() -> list[Module]:
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"))))
    return found


MODULES = read_modules()
NAMES = {module.name for module in MODULES} | {"_core"}


def known(module: Module) -> Iterator[str]:
    """What a module imports: modules of the package by their names within it, and "llama_cpp"."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module.path}:{node.lineno}: a relative import"
            # `from cmg_gguf import _core` is of a module, `from cmg_gguf import Guidance` is not.
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in imported:
            root, _, rest = name.partition(".")
            if root == PACKAGE:
                yield rest if rest in NAMES else rest.rpartition(".")[0] or "__init__"
            elif root == "llama_cpp":
                yield root


def may_know(room: str, name: str) -> bool:
    allowed = [room, *HOUSE.get(room, "").split()]
    return any(name == place or name.startswith(f"{place}.") for place in allowed)


def test_every_module_has_its_room_and_every_room_a_module() -> None:
    assert {module.room for module in MODULES} == set(HOUSE) - {"_core"}


def test_the_house_has_no_arrow_up() -> None:
    rooms = list(HOUSE)
    for i, room in enumerate(rooms):
        below = {"llama_cpp", *rooms[:i]}
        assert {name.partition(".")[0] for name in HOUSE[room].split()} <= below, room


def test_a_room_knows_what_it_may() -> None:
    arrows = [(module, name) for module in MODULES for name in known(module)]
    wrong = {f"{m.name} -> {name}" for m, name in arrows if not may_know(m.room, name)}
    assert sorted(wrong) == []


def test_no_module_knows_itself_by_way_of_others() -> None:
    arrows = {module.name: set(known(module)) - {module.name} for module in MODULES}
    TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


def test_a_module_is_less_than_400_lines() -> None:
    sources = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "csrc").iterdir()]
    lines = {str(path.relative_to(ROOT)): path.read_bytes().count(b"\n") for path in sources}
    assert {name: n for name, n in lines.items() if n >= MAX_LINES} == {}


def test_a_function_is_less_than_60_lines_and_most_are_short() -> None:
    lengths = {
        f"{module.name}.{node.name}": _end(node) - node.lineno + 1
        for module in MODULES
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: n for name, n in lengths.items() if n >= MAX_FUNCTION} == {}
    assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION


def _end(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno
