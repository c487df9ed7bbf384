"""Graphs of ggml's, written by hand and never computed: the patch is asked about their nodes as
llama.cpp would ask.

graph = Graph()
rows = graph.layer(0, graph.embed())
graph.obstacles()   # why no fork can be at layers 1, 2, ...
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
import pytest

from cmg_gguf import _core

N_LAYER, N_EMBD, N_HEAD = 4, 8, 2
F32, I32, I64 = 0, 26, 27
ALL = _core.TokenPolicy(_core.TokenRule.top_ratio, 1.0)


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


def ggml_function(name: str, *arguments: Any) -> Callable[..., int]:
    prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, *arguments)
    return prototype((name, llama_cpp.llama_cpp._lib))


class Graph:
    """Nodes in the order in which they were made. n_rows: rows of the batch."""

    def __init__(self, n_rows: int = 2) -> None:
        self.n_rows = n_rows
        self.nodes: list[int] = []
        self._context = ggml_function("ggml_init", _InitParams)(_InitParams(2**20, None, True))

    def close(self) -> None:
        ggml_function("ggml_free", ctypes.c_void_p)(self._context)

    def leaf(self, name: str, *shape: int, kind: int = F32) -> int:
        ne = (*shape, *(1,) * (4 - len(shape)))
        make = ggml_function(
            "ggml_new_tensor_4d", ctypes.c_void_p, ctypes.c_int, *[ctypes.c_int64] * 4
        )
        return self._named(make(self._context, kind, *ne), name)

    def node(self, op: str, *sources: int, name: str = "", sizes: tuple[Any, ...] = ()) -> int:
        """The node that `ggml_<op>` makes. sizes: what follows the sources."""
        kinds = {int: ctypes.c_int64, float: ctypes.c_float}
        types = [ctypes.c_void_p] * (1 + len(sources)) + [kinds[type(s)] for s in sizes]
        made = ggml_function(f"ggml_{op}", *types)(self._context, *sources, *sizes)
        self.nodes.append(self._named(made, name or f"node_{len(self.nodes)}"))
        return made

    def embed(self) -> int:
        tokens = self.leaf("inp_tokens", self.n_rows, kind=I32)
        return self.node("get_rows", self.leaf("tokens.weight", N_EMBD, 30), tokens, name="embd")

    def project(self, rows: int, n_out: int = N_EMBD) -> int:
        return self.node("mul_mat", self.leaf("weight", N_EMBD, n_out), rows)

    def layer(self, il: int, rows: int, other: int | None = None) -> int:
        """A residual layer: rows + weight * (rows or `other`)."""
        added = self.project(rows if other is None else other)
        return self.node("add", rows, added, name=f"l_out-{il}")

    def ask(self, patch: _core.GraphPatch) -> None:
        """Asks about every node, in order; none is computed."""
        callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(
            patch.callback
        )
        for node in self.nodes:
            callback(node, True, patch.user_data)

    def surveyed(self) -> _core.GraphPatch:
        """A patch that has seen this graph in a decode without a fork."""
        patch = _core.GraphPatch(N_LAYER, _core.Selections(N_LAYER))
        patch.begin(self.plan(_core.ForkPlan(layer=0, n_below=self.n_rows, slots=[], survey=True)))
        self.ask(patch)
        with pytest.raises(RuntimeError, match="rows into its KV cache"):
            patch.end()
        return patch

    def obstacles(self, *, leave_out: bool = True) -> list[str | None]:
        """Why no fork can be at layers 1, 2, ...; "" = it can."""
        patch, n_below = self.surveyed(), 1 if leave_out else 0
        return [
            patch.fork_obstacle(layer, n_rows=self.n_rows, n_below=n_below)
            for layer in range(1, N_LAYER)
        ]

    def plan(self, fork: _core.ForkPlan) -> _core.Plan:
        return _core.Plan(
            np.full((self.n_rows, 4), -1, np.int32),
            n_layer=N_LAYER,
            observe_layers=[],
            mask_layers=[],
            policy=ALL,
            n_image_tokens=0,
            fork=fork,
        )

    def _named(self, tensor: int, name: str) -> int:
        ggml_function("ggml_set_name", ctypes.c_void_p, ctypes.c_char_p)(tensor, name.encode())
        return tensor
