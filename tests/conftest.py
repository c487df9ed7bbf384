"""Tiny pairs, each written and opened once a session."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

# The judge's matrices are small: more threads only wait for each other. Before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from graphs import Graph
from support import Tiny
from tiny_llava import TinyConfig, TinyPair, write_pair

from cmg_gguf.llama.log import set_verbose

pytest_plugins = ["quick"]


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    set_verbose(False)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyConfig], TinyPair]:
    """The files of a pair of any shape."""

    @functools.cache
    def files(config: TinyConfig) -> TinyPair:
        return write_pair(tmp_path_factory.mktemp(config.arch), config)

    return files


@pytest.fixture(scope="session")
def open_tiny(written: Callable[[TinyConfig], TinyPair]) -> Callable[[TinyConfig], Tiny]:
    """A pair of any shape, loaded."""

    @functools.cache
    def opened(config: TinyConfig) -> Tiny:
        return Tiny(written(config))

    return opened


@pytest.fixture(scope="session")
def pair(written: Callable[[TinyConfig], TinyPair]) -> TinyPair:
    return written(TinyConfig())


@pytest.fixture(scope="session")
def gemma_pair(written: Callable[[TinyConfig], TinyPair]) -> TinyPair:
    """With windows: two of three layers see 32 positions."""
    return written(TinyConfig(arch="gemma3"))


@pytest.fixture(scope="session")
def llama(open_tiny: Callable[[TinyConfig], Tiny]) -> Tiny:
    return open_tiny(TinyConfig())


@pytest.fixture(scope="session")
def gemma(open_tiny: Callable[[TinyConfig], Tiny]) -> Tiny:
    return open_tiny(TinyConfig(arch="gemma3"))


@pytest.fixture(params=["llama", "gemma"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Either of them: one that sees all positions, one with windows."""
    found: Tiny = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def graph() -> Iterator[Graph]:
    """A graph of two rows, written by hand."""
    graph = Graph()
    yield graph
    graph.close()
