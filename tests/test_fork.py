"""What a fork reads off graphs: where rows may enter, and which dimension counts them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import closing

import numpy as np
import numpy.typing as npt
import pytest
from graphs import (
    I32,
    I64,
    N_EMBD,
    N_HEAD,
    N_LAYER,
    SURVEYED,
    Build,
    Graph,
    ggml_function,
    obstacles,
    surveyed,
    tensor,
)

from cmg_gguf import _core


def finish(graph: Graph, rows: int, first: int) -> None:
    for il in range(first, N_LAYER):
        rows = graph.layer(il, rows)


def plain(graph: Graph) -> None:
    """Layers that read the stream alone."""
    finish(graph, graph.embed(), 0)


# --- where rows may enter ----------------------------------------------------------------------


def test_layers_that_read_only_the_stream_can_be_entered() -> None:
    assert obstacles(plain) == ["", "", ""]
    assert obstacles(plain, shrinks=False) == ["", "", ""]


def test_nothing_lies_below_layer_0_and_no_layer_behind_the_last() -> None:
    patch = surveyed(plain)
    for layer in (-1, 0, N_LAYER):
        assert patch.fork_obstacle(layer, shrinks=False) == "nothing lies below it"


def test_a_layer_is_not_entered_above_what_it_reads_from_below() -> None:
    def build(graph: Graph) -> None:
        embedding = graph.embed()
        rows = graph.layer(1, graph.layer(0, embedding))
        finish(graph, graph.layer(2, rows, embedding), 3)

    for shrinks in (False, True):
        assert obstacles(build, shrinks=shrinks) == ["it reads embd from below"] * 2 + [""]


def test_the_output_of_an_earlier_layer_is_also_from_below() -> None:
    def build(graph: Graph) -> None:
        first = graph.layer(0, graph.embed())
        finish(graph, graph.layer(2, graph.layer(1, first), first), 3)

    assert obstacles(build, shrinks=False) == ["", "it reads l_out-0 from below", ""]


def test_memory_that_is_written_below_and_read_above_is_seen() -> None:
    """A cache that layers share has no node of its own."""

    def build(graph: Graph) -> None:
        state = graph.leaf("cache_r_l0", N_EMBD, 16)
        rows = graph.layer(0, graph.embed())
        graph.node("set_rows", state, rows, graph.leaf("index", graph.n_rows, kind=I64))
        rows = graph.layer(2, graph.layer(1, rows))
        read = graph.node("view_2d", state, sizes=(N_EMBD, graph.n_rows, N_EMBD * 4, 0))
        graph.node("add", rows, read, name="l_out-3")

    expected = ["", *["it reads cache_r_l0 from below"] * 2]
    assert obstacles(build, shrinks=False) == expected


def test_a_copy_for_another_backend_is_what_it_copies() -> None:
    def build(graph: Graph) -> None:
        embedding = graph.embed()
        rows = graph.layer(1, graph.layer(0, embedding))
        copy = graph.leaf("CUDA0#embd#0", N_EMBD, graph.n_rows)
        finish(graph, graph.layer(2, rows, copy), 3)

    assert obstacles(build, shrinks=False)[:2] == ["it reads CUDA0#embd#0 from below"] * 2


def hoisted_view(graph: Graph, written: bool) -> None:
    """Layer 2 reads a cache through a view that was made before layer 0's output."""
    cache = graph.leaf("cache_v_l2", N_EMBD, 16)
    rows = graph.embed()
    if written:
        graph.node("set_rows", cache, rows, graph.leaf("index", graph.n_rows, kind=I64))
    view = graph.node("view_2d", cache, sizes=(N_EMBD, N_EMBD, N_EMBD * 4, 0), name="hoisted")
    rows = graph.layer(1, graph.layer(0, rows))
    finish(graph, graph.node("mul_mat", view, rows, name="l_out-2"), 3)


def test_a_view_is_not_from_below_for_being_made_there() -> None:
    """But what it looks at may be."""
    read = "it reads hoisted from below"
    for shrinks in (False, True):
        plain_view = obstacles(lambda graph: hoisted_view(graph, False), shrinks=shrinks)
        assert plain_view == ["", "", ""]
        written = obstacles(lambda graph: hoisted_view(graph, True), shrinks=shrinks)
        assert written == [read, read, ""]


def test_a_copy_of_a_view_is_of_what_the_view_looks_at() -> None:
    def build(graph: Graph) -> None:
        rows = graph.embed()
        view = graph.node("view_2d", rows, sizes=(N_EMBD, 1, N_EMBD * 4, 0), name="view")
        rows = graph.layer(0, rows)
        cache = graph.leaf("cache_v_l1", N_EMBD, 16)
        hoisted = graph.node("view_2d", cache, sizes=(N_EMBD, N_EMBD, N_EMBD * 4, 0))
        rows = graph.layer(1, rows)
        rows = graph.node("mul_mat", graph.copied(hoisted), rows, name="l_out-2")
        graph.node("add", rows, graph.copied(view), name="l_out-3")

    assert obstacles(build, shrinks=False) == ["it reads CUDA0#view#0 from below"] * 3


@pytest.mark.parametrize("shape", ["other rows", "narrower", "a third dimension"])
def test_a_stream_of_another_shape_is_no_stream(shape: str) -> None:
    def build(graph: Graph) -> None:
        sizes = {
            "other rows": (N_EMBD, 3),
            "narrower": (N_EMBD // 2, graph.n_rows),
            "a third dimension": (N_EMBD, 1, graph.n_rows),
        }
        graph.node("scale", graph.leaf("other", *sizes[shape]), name="l_out-0", sizes=(1.0,))
        graph.node("scale", graph.embed(), name="l_out-1", sizes=(1.0,))

    entered = shape == "narrower"  # but a row a token
    for shrinks in (False, True):
        expected = "" if entered else "its layers' outputs are not found"
        assert obstacles(build, shrinks=shrinks)[0] == expected


def test_what_one_of_the_graphs_reads_from_below_is_read() -> None:
    def build(graph: Graph) -> None:
        embedding = graph.embed()
        rows = graph.layer(0, embedding)
        finish(graph, graph.layer(1, rows, embedding if graph.n_rows == 7 else rows), 2)

    for sizes in (SURVEYED, SURVEYED[::-1]):
        found = obstacles(build, shrinks=False, sizes=sizes)
        assert found == ["it reads embd from below", "", ""]


# --- which dimension counts rows ---------------------------------------------------------------


def heads(graph: Graph, rows: int) -> int:
    """(head_dim, n_head, n_rows)."""
    size = N_EMBD // N_HEAD
    return graph.node("reshape_3d", graph.project(rows), sizes=(size, N_HEAD, graph.n_rows))


def permuted(graph: Graph, tensor: int, *axes: int, name: str = "") -> int:
    made = ggml_function("ggml_permute", *[ctypes.c_void_p] * 2, *[ctypes.c_int] * 4)(
        graph._context, tensor, *axes
    )
    graph.nodes.append(graph._named(made, name or f"permuted_{len(graph.nodes)}"))
    return made


def attention(graph: Graph) -> None:
    """Without flash attention."""
    rows = graph.embed()
    q = permuted(graph, heads(graph, rows), 0, 2, 1, 3)
    k = graph.leaf("k", N_EMBD // N_HEAD, 16, N_HEAD)
    v = graph.leaf("v", 16, N_EMBD // N_HEAD, N_HEAD)
    weights = graph.node("soft_max", graph.node("mul_mat", k, q))
    mixed = permuted(graph, graph.node("mul_mat", v, weights), 0, 2, 1, 3)
    out = graph.node("cont_2d", mixed, sizes=(N_EMBD, graph.n_rows))
    finish(graph, graph.layer(0, rows, out), 1)


def test_attention_without_flash_attention_is_understood() -> None:
    assert obstacles(attention) == ["", "", ""]


@pytest.mark.parametrize("sizes", [(N_HEAD, 5), (N_EMBD // N_HEAD, N_HEAD), (N_EMBD, 16)])
def test_rows_as_many_as_heads_or_numbers_in_one_graph_are_told_by_the_other(
    sizes: tuple[int, int],
) -> None:
    assert obstacles(attention, sizes=sizes) == ["", "", ""]


def lines(graph: Graph) -> int:
    """(N_EMBD / 2, 2 * n_rows): two lines a row."""
    return graph.node("reshape_2d", graph.embed(), sizes=(N_EMBD // 2, 2 * graph.n_rows))


def widened(graph: Graph) -> int:
    """(2 * N_EMBD, n_rows): the embeddings, and room for more of an image."""
    return graph.node("pad", graph.embed(), sizes=(N_EMBD, 0, 0, 0), name="wide")


def part_of(graph: Graph, wide: int, *, begin: int) -> int:
    """(N_EMBD, n_rows): of each row from its number `begin` on."""
    stride = tensor(wide).nb[1]
    return graph.node("view_2d", wide, sizes=(N_EMBD, graph.n_rows, stride, 4 * begin))


def test_layers_above_those_that_read_more_of_an_image_can_be_entered() -> None:
    """As in Qwen3-VL: each row is wide, and what lies behind its embedding is added later on."""

    def build(graph: Graph) -> None:
        rows = embedding = part_of(graph, widened(graph), begin=0)
        tensor(embedding).name = b"embedding"
        rows = graph.layer(0, rows)
        more = part_of(graph, embedding, begin=N_EMBD)
        finish(graph, graph.node("add", rows, more), 1)

    for shrinks in (False, True):
        assert obstacles(build, shrinks=shrinks) == ["it reads embedding from below", "", ""]


UNCLEAR: dict[str, Build] = {
    "an operation on rows that is not known": lambda g: g.node("cumsum", g.embed()),
    "rows turned into columns": lambda g: g.node(
        "mul_mat",
        g.node("cont", g.node("transpose", g.embed())),
        g.leaf("x", g.n_rows, g.n_rows),
    ),
    "rows beside an input that has them too": lambda g: g.node(
        "mul", g.embed(), g.leaf("scale", 1, g.n_rows)
    ),
    "one of the rows": lambda g: g.node("view_2d", g.embed(), sizes=(N_EMBD, 1, N_EMBD * 4, 0)),
    "rows merged from the middle": lambda g: g.node(
        "reshape_2d",
        g.node("cont", permuted(g, heads(g, g.embed()), 0, 2, 1, 3)),
        sizes=(N_EMBD, g.n_rows),
    ),
    "in place": lambda g: g.node("sqr_inplace", g.embed()),
    "a number of a row beside those of another": lambda g: g.node(
        "mul", lines(g), g.project(g.embed(), N_EMBD // 2)
    ),
    "a matrix for each half of the rows": lambda g: g.node(
        "mul_mat",
        g.leaf("two", N_EMBD // 2, 3, 2),
        g.node("reshape_3d", lines(g), sizes=(N_EMBD // 2, 1, 2 * g.n_rows)),
    ),
    "more rows": lambda g: g.node("pad", g.embed(), sizes=(0, 1, 0, 0)),
    "the next one's numbers": lambda g: part_of(g, widened(g), begin=2 * N_EMBD),
    "numbers of two": lambda g: part_of(g, widened(g), begin=2 * N_EMBD - 1),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_rows_are_not_left_out_where_they_cannot_be_told(name: str) -> None:
    def build(graph: Graph) -> None:
        rows = graph.layer(0, graph.embed())
        UNCLEAR[name](graph)
        finish(graph, rows, 1)

    first, *others = obstacles(build)
    assert first == ""
    assert all(reason is not None and "cannot be told" in reason for reason in others), others


def behind_a_copy(graph: Graph) -> None:
    """As on a GPU: the embedding lies on the host, and all that reads it reads a copy."""
    finish(graph, graph.copied(graph.embed()), 0)


def split_at_layer_1(graph: Graph) -> None:
    """As on two GPUs."""
    rows = graph.copied(graph.layer(0, graph.copied(graph.embed())), device="CUDA1")
    finish(graph, rows, 1)


@pytest.mark.parametrize("build", [behind_a_copy, split_at_layer_1])
def test_rows_that_only_another_backend_reads_can_be_left_out(build: Build) -> None:
    assert obstacles(build) == ["", "", ""]


def copied_and_read_at_home(graph: Graph) -> None:
    """Rows that are whole for the copy are no longer those that are left."""
    rows = graph.layer(0, graph.embed())
    graph.node("sqr", graph.copied(rows))
    finish(graph, rows, 1)


def one_of_two_of_a_name(graph: Graph) -> None:
    rows = graph.layer(0, graph.embed())
    squares = [graph.node("sqr", rows, name="square") for _ in range(2)]
    graph.node("sqr", graph.copied(squares[1]))
    finish(graph, rows, 1)


def between_heads(graph: Graph) -> None:
    """Where fewer rows would lie elsewhere."""
    rows = graph.layer(0, graph.embed())
    turned = graph.node("cont", permuted(graph, heads(graph, rows), 0, 2, 1, 3), name="turned")
    graph.node("sqr", graph.copied(turned))
    finish(graph, rows, 1)


def of_another_shape(graph: Graph) -> None:
    rows = graph.layer(0, graph.embed())
    graph.node("sqr", rows, name="square")
    graph.node("sqr", graph.leaf("CUDA0#square#0", N_EMBD, graph.n_rows, 2))
    finish(graph, rows, 1)


@pytest.mark.parametrize(
    "build", [copied_and_read_at_home, one_of_two_of_a_name, between_heads, of_another_shape]
)
def test_copied_rows_are_not_left_out_where_it_is_not_clear_which_they_are(build: Build) -> None:
    assert obstacles(build)[0] == ""
    assert all("cannot be told" in str(reason) for reason in obstacles(build)[1:])


def test_rows_that_are_copied_turned_can_be_left_out() -> None:
    """As q is, where the cache stays on the host: rows are the widest stride there."""

    def build(graph: Graph) -> None:
        rows = graph.layer(0, graph.embed())
        graph.node("sqr", graph.copied(permuted(graph, heads(graph, rows), 0, 2, 1, 3)))
        finish(graph, rows, 1)

    # The layer's own readers of the stream lie where it does: what is copied is q alone.
    assert obstacles(build) == ["", "", ""]


def turned_by(graph: Graph, positions: int, n_a_row: int) -> int:
    """Heads turned by as many positions a row."""
    rows = heads(graph, graph.embed())
    if n_a_row == 1:
        rope = ggml_function("ggml_rope", *[ctypes.c_void_p] * 3, *[ctypes.c_int] * 2)
        made = rope(graph._context, rows, positions, 4, 0)
    else:
        multi = ggml_function(
            "ggml_rope_multi",
            *[ctypes.c_void_p] * 4,
            ctypes.c_int,
            ctypes.POINTER(ctypes.c_int),
            *[ctypes.c_int] * 2,
            *[ctypes.c_float] * 6,
        )
        sections, floats = (ctypes.c_int * 4)(1, 1, 0, 0), (1e4, 1.0, 0.0, 1.0, 32.0, 1.0)
        made = multi(graph._context, rows, positions, None, 4, sections, 8, 0, *floats)
    graph.nodes.append(graph._named(made, f"turned_{len(graph.nodes)}"))
    return made


def positions_of(graph: Graph, n_a_row: int) -> npt.NDArray[np.int32]:
    """100, 101, ... for the first of each row, 200, 201, ... for the second."""
    of_rows = np.arange(graph.n_rows, dtype=np.int32)
    return np.concatenate([100 * i + of_rows for i in range(1, n_a_row + 1)])


@pytest.mark.parametrize("n_a_row", [1, 4])
def test_several_positions_a_row_are_understood(n_a_row: int) -> None:
    def build(graph: Graph) -> None:
        turned_by(graph, graph.leaf("pos", n_a_row * graph.n_rows, kind=I32), n_a_row)
        finish(graph, graph.embed(), 0)

    assert obstacles(build) == [""] * 3


@pytest.mark.parametrize("copied", [False, True])
def test_several_positions_a_row_that_are_computed_are_not_understood(copied: bool) -> None:
    """Nor copies of such: what they are is not known when their reader is asked about."""

    def build(graph: Graph) -> None:
        moved = graph.node("cont", graph.leaf("pos", 4 * graph.n_rows, kind=I32), name="moved")
        turned_by(graph, graph.copied(moved) if copied else moved, 4)
        finish(graph, graph.embed(), 0)

    found = obstacles(build)
    assert all("cannot be told" in str(reason) for reason in found), found


def read_positions(node: int) -> list[int]:
    """What a RoPE node reads."""
    source = tensor(tensor(node).src[1])
    return list((ctypes.c_int32 * source.ne[0]).from_address(source.data))


@pytest.mark.parametrize("n_below", [1, 3, 4])
def test_rows_below_keep_their_own_positions_of_every_section(n_below: int) -> None:
    def build(graph: Graph) -> None:
        values = positions_of(graph, 4)
        home, other = (graph.held(name, values) for name in ("pos", "CUDA0#pos#0"))
        for positions in (home, other, home):
            turned_by(graph, positions, 4)
        finish(graph, graph.embed(), 0)

    patch = surveyed(build)
    with closing(Graph(5)) as graph:
        build(graph)
        turned = graph.nodes[3:12:4]
        whole = positions_of(graph, 4).tolist()
        sources = [tensor(node).src[1] for node in turned]
        patch.begin(graph.plan(_core.ForkPlan(layer=3, n_below=n_below)))
        graph.ask(patch)
        kept = [100 * i + row for i in range(1, 5) for row in range(n_below)]
        assert [read_positions(node) for node in turned] == [kept] * 3
        assert tensor(turned[0]).src[1] == tensor(turned[2]).src[1] != tensor(turned[1]).src[1]
        patch.abandon()
        assert [read_positions(node) for node in turned] == [whole] * 3
        assert [tensor(node).src[1] for node in turned] == sources


# --- two graphs, and not one --------------------------------------------------------------------


def test_nothing_is_known_before_two_numbers_of_rows_were_surveyed() -> None:
    for sizes in ((), (5,), (7, 7)):
        assert obstacles(plain, sizes=sizes) == [None] * 3
        assert obstacles(plain, shrinks=False, sizes=sizes) == [None] * 3
    assert obstacles(plain, sizes=(7, 7, 2)) == [""] * 3


def folded(graph: Graph, kind: int) -> int:
    """35 numbers a row, in lines of `kind`. As many lines as there are numbers of them are 35 for
    5 rows and for 7, which both divide."""
    sizes = kind, 35 // kind * graph.n_rows
    return graph.node("reshape_2d", graph.project(graph.embed(), 35), sizes=sizes)


def turned(graph: Graph, kind: int) -> int:
    """Rows in the second dimension or in the third, by a node of the same name."""
    axes = (0, 2, 1, 3) if kind == 7 else (0, 1, 2, 3)
    return permuted(graph, heads(graph, graph.embed()), *axes, name="turned")


def crossed(graph: Graph, kind: int) -> int:
    """The same nodes in the same order, but the last one reads another."""
    rows = graph.embed()
    first, second = graph.project(rows), graph.project(rows)
    return graph.node("sqr", first if kind == 7 else second)


def longer(graph: Graph, kind: int) -> int:
    """One node more."""
    rows = graph.embed()
    return graph.node("sqr", rows) if kind == 7 else rows


def renamed(graph: Graph, kind: int) -> int:
    """The same operation on the same rows, for something else."""
    return graph.node("sqr", graph.embed(), name=f"square_of_{kind}")


every_make = pytest.mark.parametrize("make", [folded, turned, crossed, longer, renamed])


def around(make: Callable[[Graph, int], int], kind_of: Callable[[Graph], int]) -> Build:
    """`make` in layer 1."""

    def build(graph: Graph) -> None:
        rows = graph.layer(0, graph.embed())
        make(graph, kind_of(graph))
        finish(graph, rows, 1)

    return build


@every_make
@pytest.mark.parametrize("sizes", [SURVEYED, SURVEYED[::-1], (*SURVEYED, *SURVEYED)], ids=str)
def test_what_only_one_graph_says_of_rows_is_not_believed(
    make: Callable[[Graph, int], int], sizes: tuple[int, ...]
) -> None:
    build = around(make, lambda graph: graph.n_rows)
    first, *others = obstacles(build, sizes=sizes)
    assert first == ""
    told = "cannot be told", "depends on the number of rows"
    assert all(any(words in str(reason) for words in told) for reason in others), others
    assert obstacles(build, shrinks=False, sizes=sizes) == ["", "", ""]


@every_make
@pytest.mark.parametrize("kind", SURVEYED)
def test_what_both_graphs_say_of_rows_is_believed(
    make: Callable[[Graph, int], int], kind: int
) -> None:
    """Either of those that are not believed above, when the other is like it."""
    assert obstacles(around(make, lambda graph: kind)) == ["", "", ""]


# --- copies between backends --------------------------------------------------------------------


def n_rows_of(*addresses: int) -> list[int]:
    return [tensor(address).ne[1] for address in addresses]


def test_rows_are_whole_when_they_are_copied_and_fewer_when_the_copy_is_read() -> None:
    """A copy is made behind the boundary, before the first node that reads it is asked about."""
    patch = surveyed(split_at_layer_1)
    with closing(Graph(5)) as graph:
        split_at_layer_1(graph)
        embd, weighted, added, *above = graph.nodes
        first, second = tensor(weighted).src[1], tensor(above[0]).src[1]
        patch.begin(graph.plan(_core.ForkPlan(layer=3, n_below=2)))
        for node, copy in ((embd, first), (added, second)):
            if node == added:
                assert not graph.call(patch, weighted, ask=True)
                assert n_rows_of(embd, first, weighted) == [5, 2, 2]
            assert graph.call(patch, node, ask=True)
            assert n_rows_of(node, copy) == [2, 5]
            assert graph.call(patch, node, ask=False)
            assert n_rows_of(node, copy) == [5, 5]
        assert not graph.call(patch, above[0], ask=True)
        assert n_rows_of(added, second, above[0], first, weighted) == [5, 2, 2, 2, 2]
        patch.abandon()
        assert set(n_rows_of(first, second, *graph.nodes)) == {5}


def test_copies_stay_whole_where_all_rows_are_below() -> None:
    patch = surveyed(split_at_layer_1)
    with closing(Graph(5)) as graph:
        split_at_layer_1(graph)
        patch.begin(graph.plan(_core.ForkPlan(layer=3, n_below=5)))
        asked = [graph.call(patch, node, ask=True) for node in graph.nodes[:3]]
        assert asked == [False] * 3
        assert n_rows_of(*graph.nodes[:3], tensor(graph.nodes[1]).src[1]) == [5] * 4
        patch.abandon()


# --- the experts that rows take -----------------------------------------------------------------


COMPUTE = 16
"""ggml's flag of a node that is in a graph."""
OF_ANOTHER_GRAPH = -1066355654
"""What no expert is."""


def choosing(graph: Graph) -> int:
    """Rows that choose among as many experts as there are numbers, for nodes elsewhere as well."""
    rows = graph.layer(0, graph.embed())
    chosen = graph.node("argsort", graph.project(rows), sizes=(0,), name="experts")
    graph.node("sqr", graph.copied(chosen))
    finish(graph, rows, 1)
    return chosen


@pytest.mark.parametrize("n_below", [0, 2, 5])
def test_rows_that_are_left_out_take_experts_that_exist(n_below: int) -> None:
    """ggml's scheduler reads all rows' before it asks about what is computed of them."""
    patch, residuals = surveyed(choosing), _core.Residuals()
    with closing(Graph(5)) as graph:
        chosen = choosing(graph)
        stream = next(node for node in graph.nodes if tensor(node).name == b"l_out-1")
        graph.hold(stream, np.zeros((5, N_EMBD), np.float32))
        tensor(chosen).flags |= COMPUTE
        graph.hold(chosen, np.full((5, N_EMBD), OF_ANOTHER_GRAPH, np.int32))
        of_experts = (ctypes.c_int32 * (5 * N_EMBD)).from_address(tensor(chosen).data)
        for n in (5, n_below):  # all rows note what they may enter with
            patch.begin(graph.plan(_core.ForkPlan(layer=2, n_below=n), residuals=residuals))
            for node in graph.nodes[: graph.nodes.index(stream) + 1]:
                if graph.call(patch, node, ask=True):
                    graph.call(patch, node, ask=False)
            patch.abandon()
        kept = [OF_ANOTHER_GRAPH] * n_below * N_EMBD
        assert list(of_experts) == kept + [0] * (5 - n_below) * N_EMBD


# --- graphs that are not as surveyed ------------------------------------------------------------


def two_of_a_kind(graph: Graph) -> None:
    """Nodes that only their names tell apart."""
    rows, weight = graph.embed(), graph.leaf("weight", N_EMBD, N_EMBD)
    q, k = (graph.node("mul_mat", weight, rows, name=name) for name in ("Qcur-0", "Kcur-0"))
    finish(graph, graph.node("add", q, k, name="l_out-0"), 1)


def asked_error(patch: _core.GraphPatch, graph: Graph, n_below: int = 1) -> str:
    """What a fork at layer 1 says to this graph."""
    patch.begin(graph.plan(_core.ForkPlan(layer=1, n_below=n_below)))
    graph.ask(patch)
    with pytest.raises(RuntimeError) as error:
        patch.end()
    return str(error.value)


ALL_WELL = "what the layers below give, was not found"
"""For nothing is computed here, and so none of these forks is entered."""


@pytest.mark.parametrize("n_rows", [2, 3, 5, 12, 31])
def test_any_number_of_rows_forks_in_a_graph_as_surveyed(n_rows: int) -> None:
    patch = surveyed(attention)
    for n_below in {1, (n_rows + 1) // 2, n_rows - 1, n_rows}:
        with closing(Graph(n_rows)) as graph:
            attention(graph)
            assert ALL_WELL in asked_error(patch, graph, n_below)


def test_a_graph_of_another_order_is_noticed(graph: Graph) -> None:
    """Even where the operations are the same one by one."""
    patch = surveyed(two_of_a_kind)
    two_of_a_kind(graph)
    embd, first, second = graph.nodes[:3]
    graph.nodes = [embd, first, second]
    assert ALL_WELL in asked_error(patch, graph)
    graph.nodes = [embd, second, first]
    assert "Kcur-0 is not as in the decodes that were surveyed" in asked_error(patch, graph)


def test_a_node_more_is_noticed(graph: Graph) -> None:
    patch = surveyed(plain)
    rows = graph.embed()
    graph.node("sqr", rows, name="more")
    finish(graph, rows, 0)
    assert "more is not as in the decodes that were surveyed" in asked_error(patch, graph)


def test_a_copy_for_another_backend_that_was_not_surveyed_is_noticed(graph: Graph) -> None:
    """As from 32 rows on, where ggml moves work to a GPU whose weights lie on the host."""
    patch = surveyed(plain)
    rows, copy = graph.embed(), graph.leaf("CUDA0#embd#0", N_EMBD, graph.n_rows)
    graph.node("add", rows, graph.project(copy), name="l_out-0")
    assert "reads CUDA0#embd#0, unlike in the decodes" in asked_error(patch, graph)


def test_a_node_with_other_rows_is_noticed(graph: Graph) -> None:
    def build(one: Graph, n_head: int = N_HEAD) -> None:
        rows = one.embed()
        one.node("reshape_2d", rows, sizes=(N_EMBD // n_head, n_head * one.n_rows))
        finish(one, rows, 0)

    patch = surveyed(build)
    build(graph, 2 * N_HEAD)
    assert "does not have a row a token" in asked_error(patch, graph)


# --- plans that cannot be ----------------------------------------------------------------------


def begin(patch: _core.GraphPatch, n_rows: int, n_below: int, layer: int = 1) -> None:
    """Begins a fork; where nothing is below it, nothing was noted either, which is refused last."""
    with closing(Graph(n_rows)) as graph:
        plan = graph.plan(_core.ForkPlan(layer=layer, n_below=n_below))
    if n_below > 0:
        patch.begin(plan)
        patch.abandon()
    else:
        with pytest.raises(IndexError, match="where nothing was noted"):
            patch.begin(plan)


@pytest.mark.parametrize("sizes", [(), (5,), (7, 7)], ids=str)
@pytest.mark.parametrize("n_below", [0, 1, 3])
def test_rows_are_not_left_out_of_a_graph_that_is_not_known(
    n_below: int, sizes: tuple[int, ...]
) -> None:
    patch = surveyed(plain, sizes)
    begin(patch, 4, 4)  # rows below only note
    with pytest.raises(ValueError, match="two decodes of different numbers of rows"):
        begin(patch, 4, n_below)


def test_rows_are_not_left_out_where_there_is_an_obstacle() -> None:
    patch = surveyed(lambda graph: finish(graph, graph.node("cumsum", graph.embed()), 0))
    begin(patch, 2, 0)
    with pytest.raises(ValueError, match=r"layer 1: rows of .* cannot be told"):
        begin(patch, 2, 1)
    with pytest.raises(ValueError, match="nothing lies below it"):
        begin(patch, 2, 0, N_LAYER)


@pytest.mark.parametrize("n_rows", [5, 6, 12, 37])
def test_no_fewer_and_no_more_rows_fork_behind_others_than_were_surveyed(n_rows: int) -> None:
    begin(surveyed(plain, (12, 5, 37)), n_rows, 1)


@pytest.mark.parametrize("n_rows", [2, 4, 38, 64])
def test_fewer_or_more_rows_than_were_surveyed_do_not_fork_behind_others(n_rows: int) -> None:
    """Some of their nodes may lie where they did not in any of those decodes."""
    patch = surveyed(plain, (12, 5, 37))
    for n_below in (0, n_rows):
        begin(patch, n_rows, n_below)
    with pytest.raises(ValueError, match=f"of {n_rows} rows: decodes of 5 to 37 were surveyed"):
        begin(patch, n_rows, 1)


@pytest.mark.parametrize("n_below", [-1, 3])
def test_no_more_rows_are_below_than_there_are(n_below: int) -> None:
    with pytest.raises(ValueError, match=f"{n_below} rows below a fork of 2 rows"):
        begin(surveyed(plain), 2, n_below)


def test_a_layer_below_0_is_none() -> None:
    with pytest.raises(ValueError, match="a fork at layer -1"):
        begin(surveyed(plain), 2, 2, -1)


@pytest.mark.parametrize(("n_rows", "layer"), [(1, 0), (0, 0), (2, 1)])
def test_a_survey_is_of_two_rows_and_more_that_do_not_fork(n_rows: int, layer: int) -> None:
    rows = np.full((n_rows, 6), -1, np.int32)
    with pytest.raises(ValueError, match="a survey is made of"):
        _core.Plan(rows, [], fork=_core.ForkPlan(layer=layer, n_below=n_rows, survey=True))
