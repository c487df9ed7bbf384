"""Graphs of ggml's, written by hand and never computed: the patch is asked about their nodes as
llama.cpp would ask.

def build(graph):
    rows = graph.layer(0, graph.embed())
    ...

obstacles(build)   # why no fork can be at layers 1, 2, ..., from graphs of 5 and of 7 rows
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, TypeAlias

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from cmg_gguf import _core

N_LAYER, N_EMBD, N_HEAD, N_CELLS = 4, 8, 2, 16
F32, I32, I64 = 0, 26, 27
SURVEYED = 5, 7
"""Rows of the graphs that are looked at: primes, and no count of anything else."""
FORKED = 2, 31
"""Rows of the smallest and of the largest graph that is looked at where others fork then."""


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


def ggml_function(name: str, *arguments: Any) -> Callable[..., int]:
    prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, *arguments)
    return prototype((name, llama_cpp.llama_cpp._lib))


class _Tensor(ctypes.Structure):
    """ggml_tensor, up to its name."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


def tensor(address: int) -> _Tensor:
    """A node or a leaf, to look at."""
    return _Tensor.from_address(address)


class Graph:
    """Nodes in the order in which they were made. n_rows: rows of the batch."""

    def __init__(self, n_rows: int = 2) -> None:
        self.n_rows = n_rows
        self.nodes: list[int] = []
        self._buffers: list[tuple[int, npt.NDArray[np.int64]]] = []
        self._context = ggml_function("ggml_init", _InitParams)(_InitParams(2**20, None, True))

    def close(self) -> None:
        for buffer, _memory in self._buffers:
            ggml_function("ggml_backend_buffer_free", ctypes.c_void_p)(buffer)
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

    def copied(self, node: int, *, device: str = "CUDA0") -> int:
        """What ggml's scheduler has another device's nodes read instead of this one."""
        of = tensor(node)
        copy = self.leaf(f"{device}#{of.name.decode()}#0", *of.ne, kind=of.type)
        tensor(copy).nb = of.nb
        return copy

    def layer(self, il: int, rows: int, other: int | None = None) -> int:
        """A residual layer: rows + weight * (rows or `other`)."""
        added = self.project(rows if other is None else other)
        return self.node("add", rows, added, name=f"l_out-{il}")

    def attention(self, il: int, rows: int) -> int:
        """K into the layer's cache, and the weights over it of all rows."""
        index = self.held(f"index_{il}", np.arange(self.n_rows, dtype=np.int64))
        cache = self.leaf(f"cache_k_l{il}", N_EMBD, N_CELLS)
        self.node("set_rows", cache, rows, index)
        scores = self.node("mul_mat", cache, rows)
        mask = self.leaf("mask", N_CELLS, self.n_rows)
        return self.node("soft_max_ext", scores, mask, sizes=(1.0, 0.0))

    def ask(self, patch: _core.GraphPatch) -> None:
        """Asks about every node, in order; none is computed."""
        for node in self.nodes:
            self.call(patch, node, ask=True)

    def call(self, patch: _core.GraphPatch, node: int, *, ask: bool) -> bool:
        """Asks about a node, or says that it is computed, as llama.cpp would; the answer."""
        callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(
            patch.callback
        )
        return bool(callback(node, ask, patch.user_data))

    def survey(self, patch: _core.GraphPatch) -> None:
        """Shows the patch this graph, as in a decode without a fork."""
        asked = _core.ForkPlan(layer=0, n_below=self.n_rows, survey=True)
        patch.begin(self.plan(asked, forks=False))
        self.ask(patch)
        with pytest.raises(RuntimeError, match="rows into its KV cache"):
            patch.end()

    def plan(
        self,
        fork: _core.ForkPlan,
        *,
        forks: bool = True,
        residuals: _core.Residuals | None = None,
    ) -> _core.Plan:
        """forks: rows below note residual 0, and the others enter with it."""
        rows = np.full((self.n_rows, 6), -1, np.int32)
        rows[:, 0] = rows[:, 1] = 0
        rows[:, 5] = 0 if forks else -1
        policy = _core.TokenPolicy(_core.TokenRule.top_ratio, 1.0)
        part = _core.Part(
            selections=_core.Selections(N_LAYER),
            policy=policy,
            n_image_tokens=0,
            residuals=residuals or _core.Residuals(),
        )
        return _core.Plan(rows, [part], fork=fork)

    def held(self, name: str, values: npt.NDArray[np.int64] | npt.NDArray[np.int32]) -> int:
        """A leaf whose values can be read."""
        kind = I64 if values.dtype == np.int64 else I32
        return self.hold(self.leaf(name, len(values), kind=kind), values)

    def hold(self, tensor: int, values: npt.NDArray[Any]) -> int:
        """Gives a node or a leaf memory, with these values in it."""
        memory = np.empty(values.nbytes // 8 + 9, np.int64)
        start = memory.ctypes.data + -memory.ctypes.data % 64
        ctypes.memmove(start, values.ctypes.data, values.nbytes)
        size_t, pointer = ctypes.c_size_t, ctypes.c_void_p
        buffer = ggml_function("ggml_backend_cpu_buffer_from_ptr", pointer, size_t)(
            start, values.nbytes
        )
        ggml_function("ggml_backend_tensor_alloc", *[pointer] * 3)(buffer, tensor, start)
        self._buffers.append((buffer, memory))
        return tensor

    def _named(self, tensor: int, name: str) -> int:
        ggml_function("ggml_set_name", ctypes.c_void_p, ctypes.c_char_p)(tensor, name.encode())
        return tensor


Build: TypeAlias = Callable[[Graph], object]


def surveyed(build: Build, sizes: Sequence[int] = FORKED) -> _core.GraphPatch:
    """A patch that has seen such graphs, of decodes of so many rows."""
    patch = _core.GraphPatch(N_LAYER)
    for n_rows in sizes:
        with closing(Graph(n_rows)) as graph:
            build(graph)
            graph.survey(patch)
    return patch


def obstacles(
    build: Build, *, shrinks: bool = True, sizes: Sequence[int] = SURVEYED
) -> list[str | None]:
    """Why no fork can be at layers 1, 2, ...; "" = it can. shrinks: with rows below it."""
    patch = surveyed(build, sizes)
    return [patch.fork_obstacle(layer, shrinks=shrinks) for layer in range(1, N_LAYER)]
