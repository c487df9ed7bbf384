"""What a fork reads off a graph: where rows may enter, and which dimension counts them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from graphs import ALL, I32, I64, N_EMBD, N_HEAD, N_LAYER, Graph, ggml_function

from cmg_gguf import _core


@pytest.fixture
def single() -> Iterator[Graph]:
    """With one row, as the original branch alone has."""
    graph = Graph(1)
    yield graph
    graph.close()


def finish(graph: Graph, rows: int, first: int) -> None:
    for il in range(first, N_LAYER):
        rows = graph.layer(il, rows)


# --- where rows may enter ----------------------------------------------------------------------


def test_layers_that_read_only_the_stream_can_be_entered(graph: Graph, single: Graph) -> None:
    for one in (graph, single):
        finish(one, one.embed(), 0)
    assert graph.obstacles() == ["", "", ""]
    assert single.obstacles(leave_out=False) == ["", "", ""]


def test_a_layer_is_not_entered_above_what_it_reads_from_below(single: Graph) -> None:
    embedding = single.embed()
    rows = single.layer(1, single.layer(0, embedding))
    finish(single, single.layer(2, rows, embedding), 3)
    assert single.obstacles(leave_out=False) == ["it reads embd from below"] * 2 + [""]


def test_the_output_of_an_earlier_layer_is_also_from_below(single: Graph) -> None:
    first = single.layer(0, single.embed())
    finish(single, single.layer(2, single.layer(1, first), first), 3)
    assert single.obstacles(leave_out=False) == ["", "it reads l_out-0 from below", ""]


def test_memory_that_is_written_below_and_read_above_is_seen(single: Graph) -> None:
    """A cache that layers share has no node of its own."""
    state = single.leaf("cache_r_l0", N_EMBD, 16)
    rows = single.layer(0, single.embed())
    index = single.leaf("index", 1, kind=I64)
    single.node("set_rows", state, rows, index)
    rows = single.layer(2, single.layer(1, rows))
    read = single.node("view_2d", state, sizes=(N_EMBD, 1, N_EMBD * 4, 0))
    single.node("add", rows, read, name="l_out-3")
    assert single.obstacles(leave_out=False) == ["", *["it reads cache_r_l0 from below"] * 2]


def test_a_copy_for_another_backend_is_what_it_copies(single: Graph) -> None:
    embedding = single.embed()
    rows = single.layer(1, single.layer(0, embedding))
    copy = single.leaf("CUDA0#embd#0", N_EMBD, 1)
    finish(single, single.layer(2, rows, copy), 3)
    assert single.obstacles(leave_out=False)[:2] == ["it reads CUDA0#embd#0 from below"] * 2


@pytest.mark.parametrize("shape", [(N_EMBD, 3), (N_EMBD // 2, 2), (N_EMBD, 1, 2)])
def test_a_stream_of_another_shape_is_no_stream(graph: Graph, shape: tuple[int, ...]) -> None:
    graph.node("scale", graph.leaf("other", *shape), name="l_out-0", sizes=(1.0,))
    graph.node("scale", graph.embed(), name="l_out-1", sizes=(1.0,))
    found = graph.obstacles(leave_out=False)
    entered = shape == (N_EMBD // 2, 2)  # narrower, but a row a token
    assert found[0] is None
    assert (graph.obstacles()[0] == "") == entered


# --- which dimension counts rows ---------------------------------------------------------------


def heads(graph: Graph, rows: int) -> int:
    """(head_dim, n_head, n_rows): with two of each, the shape does not tell them apart."""
    size = N_EMBD // N_HEAD
    return graph.node("reshape_3d", graph.project(rows), sizes=(size, N_HEAD, graph.n_rows))


def permuted(graph: Graph, tensor: int, *axes: int) -> int:
    made = ggml_function("ggml_permute", *[ctypes.c_void_p] * 2, *[ctypes.c_int] * 4)(
        graph._context, tensor, *axes
    )
    graph.nodes.append(graph._named(made, f"permuted_{len(graph.nodes)}"))
    return made


def test_attention_without_flash_attention_is_understood(graph: Graph) -> None:
    rows = graph.embed()
    q = permuted(graph, heads(graph, rows), 0, 2, 1, 3)
    k = graph.leaf("k", N_EMBD // N_HEAD, 16, N_HEAD)
    v = graph.leaf("v", 16, N_EMBD // N_HEAD, N_HEAD)
    weights = graph.node("soft_max", graph.node("mul_mat", k, q))
    mixed = permuted(graph, graph.node("mul_mat", v, weights), 0, 2, 1, 3)
    out = graph.node("cont_2d", mixed, sizes=(N_EMBD, graph.n_rows))
    finish(graph, graph.layer(0, rows, out), 1)
    assert graph.obstacles() == ["", "", ""]


UNCLEAR: dict[str, Callable[[Graph, int], int]] = {
    "an operation on rows that is not known": lambda g, rows: g.node("cumsum", rows),
    "rows turned into columns": lambda g, rows: g.node(
        "mul_mat",
        g.node("cont", g.node("transpose", rows)),
        g.leaf("x", 2, g.n_rows),
    ),
    "rows beside an input that has them too": lambda g, rows: g.node(
        "mul", rows, g.leaf("scale", 1, 2)
    ),
    "rows copied for another backend": lambda g, rows: g.node(
        "sqr", g.leaf("CUDA0#l_out-0#0", N_EMBD, 2)
    ),
    "one of the rows": lambda g, rows: g.node("view_2d", rows, sizes=(N_EMBD, 1, N_EMBD * 4, 0)),
    "rows merged from the middle": lambda g, rows: g.node(
        "reshape_2d",
        g.node("cont", permuted(g, heads(g, rows), 0, 2, 1, 3)),
        sizes=(N_EMBD, 2),
    ),
    "in place": lambda g, rows: g.node("sqr_inplace", rows),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_rows_are_not_left_out_where_they_cannot_be_told(graph: Graph, name: str) -> None:
    rows = graph.layer(0, graph.embed())
    UNCLEAR[name](graph, rows)
    finish(graph, rows, 1)
    first, *others = graph.obstacles()
    assert first == ""
    assert all(reason is not None and "cannot be told" in reason for reason in others), others


@pytest.mark.parametrize(("n_positions", "understood"), [(2, True), (8, False)])
def test_several_positions_a_row_are_not_understood(
    graph: Graph, n_positions: int, understood: bool
) -> None:
    """Their places among the positions depend on the number of rows."""
    rows = graph.embed()
    rope = ggml_function("ggml_rope", *[ctypes.c_void_p] * 3, *[ctypes.c_int] * 2)
    if n_positions == 2:
        made = rope(
            graph._context, heads(graph, rows), graph.leaf("pos", n_positions, kind=I32), 4, 0
        )
    else:
        multi = ggml_function(
            "ggml_rope_multi",
            *[ctypes.c_void_p] * 4,
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_int),
            *[ctypes.c_int] * 2,
            *[ctypes.c_float] * 6,
        )
        sections = (ctypes.c_int * 4)(1, 1, 0, 0)
        positions = graph.leaf("pos", n_positions, kind=I32)
        floats = (1e4, 1.0, 0.0, 1.0, 32.0, 1.0)
        made = multi(
            graph._context, heads(graph, rows), positions, None, 4, sections, 8, 0, *floats
        )
    graph.nodes.append(made)
    finish(graph, rows, 0)
    assert (graph.obstacles() == [""] * 3) == understood, graph.obstacles()


# --- graphs that are not as surveyed ------------------------------------------------------------


def test_a_graph_of_another_order_is_noticed(graph: Graph) -> None:
    """Even where the operations are the same one by one."""
    rows, weight = graph.embed(), graph.leaf("weight", N_EMBD, N_EMBD)
    q, k = (graph.node("mul_mat", weight, rows, name=name) for name in ("Qcur-0", "Kcur-0"))
    below = list(graph.nodes)
    finish(graph, graph.node("add", q, k, name="l_out-0"), 1)
    patch = graph.surveyed()
    embd, first, second = below
    for graph.nodes, error in (
        ([embd, first, second], "l_out-0, .* was not found"),  # all was well up to here
        ([embd, second, first], "Kcur-0 is not as in the decode that was surveyed"),
    ):
        patch.begin(graph.plan(_core.ForkPlan(layer=1, n_below=1, slots=[0, 0])))
        graph.ask(patch)
        with pytest.raises(RuntimeError, match=error):
            patch.end()


# --- plans that cannot be ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_rows", "n_below", "slots"), [(2, 1, [0]), (2, 1, [0, 0]), (3, 1, [0] * 3), (4, 0, [0] * 5)]
)
def test_a_fork_that_cannot_be_is_refused(n_rows: int, n_below: int, slots: list[int]) -> None:
    patch = _core.GraphPatch(N_LAYER, _core.Selections(N_LAYER))
    plan = _core.Plan(
        np.full((n_rows, 4), -1, np.int32),
        n_layer=N_LAYER,
        observe_layers=[],
        mask_layers=[],
        policy=ALL,
        n_image_tokens=0,
        fork=_core.ForkPlan(layer=1, n_below=n_below, slots=slots),
    )
    with pytest.raises(ValueError, match="a fork of"):
        patch.begin(plan)


def test_nothing_is_known_of_a_graph_before_it_was_surveyed() -> None:
    patch = _core.GraphPatch(N_LAYER, _core.Selections(N_LAYER))
    assert patch.fork_obstacle(1, n_rows=2, n_below=1) is None
    assert patch.fork_obstacle(1, n_rows=1, n_below=1) is None
