"""The graph patch in a real context: the cells it knows, its errors, its cost, and no trace."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import reference
from graphs import I32, N_CELLS, N_EMBD, Graph, tensor
from judge import prompt_rows
from plans import N_IMAGE, N_LAYER, NONE, Row, decode, part, plan
from prompts import ONE_IMAGE, PICTURE, PICTURES, TWO_IMAGES
from support import APART, EXACT, FINE, TOLERANCE, Rig, Tiny, logits
from unhooked import Unhooked

from cmg_gguf import _core
from cmg_gguf.engine.steps import Strategy
from cmg_gguf.errors import BackendError
from cmg_gguf.guidance import AttentionMass, Guidance, LowestCosine, Scope
from cmg_gguf.llama.context import LlamaContext
from cmg_gguf.prompt.segments import Prompt


def occupy(context: LlamaContext, seq: int, n: int) -> None:
    """Fills n cells with text of another sequence."""
    decode(context, [(300 + i, i, seq) for i in range(n)])


def check(rig: Rig, prompt: Prompt, guidance: Guidance) -> None:
    errors = rig.follow(prompt, guidance, rig.tiny.verdict(prompt, guidance))
    assert errors.max() <= TOLERANCE


# --- what it leaves behind ----------------------------------------------------------------------


def test_without_a_plan_a_pair_decodes_as_without_a_callback(tiny: Tiny) -> None:
    rig, plain, prompt = Rig(tiny), Unhooked(tiny), tiny.prompt(ONE_IMAGE, PICTURE)
    n = rig.decode_prompt(prompt)
    np.testing.assert_array_equal(
        logits(rig.contexts[0], prompt.segments[-1].n_tokens - 1), plain.prefill(prompt)
    )
    rig.contexts[0].share(0, 1, n)
    plain.share(0, 1)
    for i in range(4):
        decode(rig.contexts[0], [(300 + i, n + i, 0), (310 + i, n + i, 1)])
        plain.decode([300 + i, 310 + i], [n + i] * 2, [0, 1], [True] * 2)
        for row in (0, 1):
            np.testing.assert_array_equal(logits(rig.contexts[0], row), plain.logits(row))
    plain.close()


def test_masks_toggled_between_steps_touch_their_own_steps_alone(tiny: Tiny) -> None:
    masked_layers = [(), (2, 3, 5), (), (0,), (0,), (2, 3, 5), (), (1, 4), ()]
    rig, plain, prompt = Rig(tiny), Unhooked(tiny), tiny.prompt(ONE_IMAGE, PICTURE)
    context, ref = rig.contexts[0], tiny.ref
    n = rig.decode_prompt(prompt)
    context.share(0, 1, n)
    context.patch.copy_image_tokens(0, 1, N_IMAGE)
    plain.prefill(prompt)
    plain.share(0, 1)
    rig.selections.resize(1)
    for il in range(N_LAYER):
        rig.selections.set_tokens(0, il, np.arange(N_IMAGE, dtype=np.int32))
    tokens = [300 + i for i in range(len(masked_layers))]
    rows = np.concatenate([prompt_rows(ref, prompt), ref.embed(tokens)])
    is_image = np.append(prompt.is_image, np.zeros(len(tokens), np.bool_))
    blocked = np.zeros((N_LAYER, len(rows), len(rows)), np.bool_)
    degraded = []
    for i, (token, layers) in enumerate(zip(tokens, masked_layers, strict=True)):
        hide = plan([Row(0), Row(1, 0, mask=0)], part(rig.selections, mask=layers))
        decode(context, [(token, n + i, 0), (token, n + i, 1)], hide if layers else None)
        degraded.append(logits(context, 1))
        for il in layers:
            blocked[il, n + i, is_image] = True
        plain.decode([token] * 2, [n + i] * 2, [0, 1], [True] * 2)
        np.testing.assert_array_equal(logits(context, 0), plain.logits(0))
    plain.close()
    expected = ref.forward(rows, blocked).logits[n:]
    np.testing.assert_allclose(degraded, expected, rtol=0, atol=TOLERANCE)
    gaps = np.abs(expected - ref.forward(rows).logits[n:]).max(axis=1)
    assert gaps[0] == 0.0
    assert gaps[1:].min() > APART


# --- cells --------------------------------------------------------------------------------------


def test_cells_are_those_of_the_image_rows_in_every_layer(tiny: Tiny) -> None:
    rig, prompt = Rig(tiny, seqs=(4, 1), n_seq_max=5), tiny.prompt(TWO_IMAGES, *PICTURES)
    rig.decode_prompt(prompt)
    for il in range(N_LAYER):
        cells = rig.contexts[0].patch.cells(4, il)
        assert cells.tolist() == np.flatnonzero(prompt.is_image).tolist()
        assert rig.contexts[0].patch.cells(1, il).tolist() == []


def test_image_tokens_are_copied_and_cut_as_sequences_are(llama: Tiny) -> None:
    rig, prompt = Rig(llama), llama.prompt(TWO_IMAGES, *PICTURES)
    rig.decode_prompt(prompt)
    patch = rig.contexts[0].patch
    cells = patch.cells(0, 3).tolist()
    patch.copy_image_tokens(0, 1, N_IMAGE)
    assert patch.cells(1, 3).tolist() == cells[:N_IMAGE]
    patch.truncate_image_tokens(0, N_IMAGE + 3)
    assert patch.cells(0, 3).tolist() == cells[: N_IMAGE + 3]
    patch.truncate_image_tokens(0, 0)
    assert patch.cells(0, 3).tolist() == []
    patch.clear_image_tokens()
    assert patch.cells(1, 3).tolist() == []
    with pytest.raises(IndexError, match=f"layer {N_LAYER} of {N_LAYER}"):
        patch.cells(0, N_LAYER)


@pytest.mark.parametrize("scope", ["decode", "text", "all"])
def test_cells_behind_another_sequence_are_found(tiny: Tiny, scope: Scope) -> None:
    rig, prompt = Rig(tiny, n_seq_max=4), tiny.prompt(ONE_IMAGE, PICTURE)
    occupy(rig.contexts[0], 3, 21)
    check(rig, prompt, Guidance(scope=scope))
    cells = rig.contexts[0].patch.cells(0, 0)
    assert cells.tolist() == (21 + np.flatnonzero(prompt.is_image)).tolist()


@pytest.mark.parametrize("scope", ["decode", "text", "all"])
def test_cells_in_the_holes_that_others_left_are_found(tiny: Tiny, scope: Scope) -> None:
    rig, prompt = Rig(tiny, n_seq_max=6), tiny.prompt(ONE_IMAGE, PICTURE)
    context, guidance = rig.contexts[0], Guidance(scope=scope)
    check(rig, tiny.prompt(TWO_IMAGES, *PICTURES), guidance)
    rig.engine.reset()
    for seq, n in ((2, 7), (3, 11), (4, 13), (5, 3)):
        occupy(context, seq, n)
    context.truncate(2, 0)
    context.truncate(4, 0)
    check(rig, prompt, guidance)
    cells = context.patch.cells(0, 0)
    assert np.diff(cells).max() > 1
    check(rig, tiny.prompt(TWO_IMAGES, *PICTURES), guidance)


def test_cells_that_others_take_are_forgotten_without_a_plan_too(tiny: Tiny) -> None:
    rig, prompt = Rig(tiny, n_seq_max=3), tiny.prompt(ONE_IMAGE, PICTURE)
    context, image = rig.contexts[0], tiny.prompt(ONE_IMAGE, PICTURE).is_image
    rig.decode_prompt(prompt)
    context.patch.copy_image_tokens(0, 1, N_IMAGE)
    context.truncate(0, 0)
    n = int(image.argmax()) + 5
    occupy(context, 2, n)
    left = np.where(np.arange(len(image)) < n, NONE, np.arange(len(image)))[image]
    for il in range(N_LAYER):
        assert context.patch.cells(0, il).tolist() == left.tolist()
        assert context.patch.cells(1, il).tolist() == left.tolist()


@pytest.mark.parametrize("scope", ["decode", "text", "all"])
def test_cells_that_come_free_during_an_answer_may_be_taken(tiny: Tiny, scope: Scope) -> None:
    """Also by rows whose sequence has left cells behind its window."""
    rig, prompt = Rig(tiny, n_seq_max=4), tiny.prompt(TWO_IMAGES, *PICTURES)
    guidance = Guidance(scope=scope)
    verdict = tiny.verdict(prompt, guidance)
    occupy(rig.contexts[0], 3, 3)
    rig.engine.prefill(prompt, guidance)
    rig.contexts[0].truncate(3, 0)
    for step in verdict.steps:
        degraded = rig.engine.degraded_logits
        assert degraded is not None
        np.testing.assert_allclose(
            rig.engine.original_logits, step.original, rtol=0, atol=TOLERANCE
        )
        np.testing.assert_allclose(degraded, step.degraded, rtol=0, atol=TOLERANCE)
        rig.engine.step(step.token)


@pytest.mark.parametrize("scope", ["decode", "text", "all"])
def test_masks_grow_with_the_part_of_the_cache_in_use(tiny: Tiny, scope: Scope) -> None:
    """llama.cpp looks at 256 cells at a time; these answers begin below cell 256 and end above."""
    rig, prompt = (
        Rig(tiny, replace(EXACT, n_ctx=512), n_seq_max=4),
        tiny.prompt(TWO_IMAGES, *PICTURES),
    )
    guidance = Guidance(scope=scope)
    for start in range(0, 250 - rig.engine.cells_needed(prompt, guidance), 10):
        decode(rig.contexts[0], [(300 + i, start + i, 3) for i in range(10)])
    check(rig, prompt, guidance)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [N_IMAGE, 10**6])
def test_an_image_token_that_does_not_exist_ends_only_that_request(llama: Tiny, token: int) -> None:
    rig, prompt, guidance = Rig(llama), llama.prompt(ONE_IMAGE, PICTURE), Guidance(refresh="prompt")
    rig.engine.prefill(prompt, guidance)
    rig.engine.selections.set_tokens(0, rig.engine.layers[1], np.array([2, token], np.int32))
    with pytest.raises(BackendError, match=f"image token {token} .* the prompt has {N_IMAGE}"):
        rig.engine.step(300)
    check(rig, prompt, guidance)


@pytest.mark.parametrize("shape", [(6,), (1, 4), (1, 5), (1, 7), (1, 1, 6)])
def test_a_plan_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rows is \[n_rows, 6\]"):
        _core.Plan(np.zeros(shape, np.int32), [])


@pytest.mark.parametrize("il", [-1, N_LAYER])
def test_a_part_for_a_layer_that_does_not_exist_is_refused(il: int) -> None:
    selections = _core.Selections(N_LAYER)
    with pytest.raises(ValueError, match=f"layer {il} of {N_LAYER}"):
        part(selections, observe=[0, il])
    with pytest.raises(ValueError, match=f"layer {il} of {N_LAYER}"):
        part(selections, mask=[0, il])


def test_a_plan_for_another_model_is_refused_and_leaves_no_trace(llama: Tiny) -> None:
    rig, prompt = Rig(llama), llama.prompt(ONE_IMAGE, PICTURE)
    other = plan([Row(0)], part(_core.Selections(N_LAYER + 1)))
    with pytest.raises(ValueError, match=f"{N_LAYER + 1} layers, a patch for {N_LAYER}"):
        rig.contexts[0].patch.begin(other)
    with pytest.raises(ValueError, match=f"{N_LAYER + 1} layers, a patch for {N_LAYER}"):
        decode(rig.contexts[0], [(300, 0, 0)], other)
    check(rig, prompt, Guidance())


def test_an_error_without_a_plan_is_told_by_the_next_one_once(graph: Graph) -> None:
    patch = _core.GraphPatch(N_LAYER)
    rows = graph.embed()
    for il in (1, 2):  # the first of them is told
        index = graph.leaf("index", graph.n_rows, kind=I32)
        graph.node("set_rows", graph.leaf(f"cache_k_l{il}", N_EMBD, 16), rows, index)
    graph.ask(patch)
    nothing = plan([Row(0)] * graph.n_rows)
    with pytest.raises(RuntimeError, match=r"without a plan .* layer 1: .* 64-bit cells"):
        patch.begin(nothing)
    patch.begin(nothing)
    graph.ask(patch)
    with pytest.raises(RuntimeError, match=r"^layer 1: .* 64-bit cells"):
        patch.end()
    patch.begin(nothing)
    graph.ask(patch)
    patch.abandon()
    patch.begin(nothing)


def asked_to_write(graph: Graph, cells: Sequence[int]) -> _core.GraphPatch:
    """A patch that was asked about rows, all of images, that layer 1 writes into these cells."""
    patch = _core.GraphPatch(N_LAYER)
    index = graph.held("index", np.array(cells, np.int64))
    cache = graph.leaf("cache_k_l1", N_EMBD, N_CELLS)
    graph.attention(0, graph.embed())
    graph.node("set_rows", cache, graph.leaf("rows", N_EMBD, len(cells)), index)
    rows = [Row(0, 0, image_token=i) for i in range(graph.n_rows)]
    patch.begin(plan(rows, part(_core.Selections(N_LAYER))))
    graph.ask(patch)
    return patch


@pytest.mark.parametrize("n", [1, 3])
def test_a_cache_that_is_written_in_other_rows_is_not_understood(graph: Graph, n: int) -> None:
    patch = asked_to_write(graph, range(n))
    assert patch.cells(0, 1).tolist() == []
    with pytest.raises(RuntimeError, match=rf"^layer 1: .* in {n} rows where the batch has 2$"):
        patch.end()


@pytest.mark.parametrize("cell", [-1, N_CELLS, 2**40])
def test_a_cell_that_the_cache_has_not_is_noticed(graph: Graph, cell: int) -> None:
    patch = asked_to_write(graph, [3, cell])
    assert patch.cells(0, 1).tolist() == [3]
    with pytest.raises(RuntimeError, match=rf"^layer 1: .* in cell {cell} of {N_CELLS}$"):
        patch.end()


ATTENDING = 1, 3


def attend(graph: Graph, layers: Sequence[int]) -> None:
    rows = graph.embed()
    for il in layers:
        graph.attention(il, rows)


def planned(
    graph: Graph, n_decoded: int = 1, *, mask: Sequence[int] = (), observe: Sequence[int] = ()
) -> _core.Plan:
    """Rows of so many graphs, all of one part."""
    selections = _core.Selections(N_LAYER)
    selections.resize(1)
    return plan(
        [Row(0, 0, mask=0)] * graph.n_rows * n_decoded, part(selections, mask=mask, observe=observe)
    )


def test_layers_that_attend_may_be_masked(graph: Graph) -> None:
    patch = _core.GraphPatch(N_LAYER)
    attend(graph, ATTENDING)
    patch.begin(planned(graph, 2, mask=ATTENDING))
    graph.ask(patch)
    graph.ask(patch)
    patch.end()


@pytest.mark.parametrize(("mask", "observe"), [((1, 2), ()), ((), (2,)), ((1,), (0, 2))])
def test_a_layer_without_attention_cannot_be_planned_for(
    graph: Graph, mask: tuple[int, ...], observe: tuple[int, ...]
) -> None:
    patch = _core.GraphPatch(N_LAYER)
    attend(graph, ATTENDING)
    patch.begin(planned(graph, mask=mask, observe=observe))
    graph.ask(patch)
    first = min(set(mask + observe) - set(ATTENDING))
    with pytest.raises(RuntimeError, match=rf"^layer {first}: it has no attention .*: 1, 3$"):
        patch.end()
    patch.begin(planned(graph, mask=ATTENDING))
    graph.ask(patch)
    patch.end()


@pytest.mark.parametrize("first", [True, False])
def test_attention_that_one_micro_batch_lacks_is_missed(graph: Graph, first: bool) -> None:
    patch = _core.GraphPatch(N_LAYER)
    attend(graph, ATTENDING)
    with closing(Graph()) as lacking:
        attend(lacking, ATTENDING[:1])
        patch.begin(planned(graph, 2, mask=ATTENDING))
        for asked in (lacking, graph) if first else (graph, lacking):
            asked.ask(patch)
        with pytest.raises(RuntimeError, match=r"^layer 3: it has no attention .*: 1$"):
            patch.end()


def test_attention_that_is_not_recognised_is_told_from_none(graph: Graph) -> None:
    patch = _core.GraphPatch(N_LAYER)
    graph.attention(1, graph.embed())
    graph.nodes.pop()
    patch.begin(planned(graph, mask=[1]))
    graph.ask(patch)
    with pytest.raises(RuntimeError, match=r"^layer 1: its attention was not found"):
        patch.end()


def looked_at(graph: Graph, watched: str, mask: int) -> _core.GraphPatch:
    """A patch that was asked about the attention of layer 1 under this mask, q and K computed."""
    patch, selections = _core.GraphPatch(N_LAYER), _core.Selections(N_LAYER)
    selections.resize(1)
    selections.set_tokens(0, 1, np.zeros(1, np.int32))
    graph.attention(1, graph.embed())
    tensor(graph.nodes[-1]).src[1] = mask
    row = Row(0, 0, mask=0) if watched == "mask" else Row(0, 0, observe=0)
    patch.begin(plan([row] * graph.n_rows, part(selections, observe=[1], mask=[1])))
    for node in graph.nodes:
        if graph.call(patch, node, ask=True):
            graph.call(patch, node, ask=False)
    return patch


@pytest.mark.parametrize("viewed", [False, True])
@pytest.mark.parametrize("watched", ["mask", "observe"])
def test_a_mask_that_the_graph_computes_is_not_read(
    graph: Graph, watched: str, viewed: bool
) -> None:
    """As where a layer chooses itself which cells it looks at: nothing of it has run yet."""
    what_the_last_graph_left = np.zeros((graph.n_rows, N_CELLS), np.float32)
    mask = graph.node("scale", graph.leaf("mask", N_CELLS, graph.n_rows), sizes=(1.0,))
    graph.hold(mask, what_the_last_graph_left)
    mask = graph.node("view_tensor", mask) if viewed else mask
    patch = looked_at(graph, watched, mask)
    with pytest.raises(RuntimeError, match=r"^layer 1: node_\d .*is computed in the graph"):
        patch.end()


@pytest.mark.parametrize(
    "shape", [(N_CELLS - 1, 2), (N_CELLS + 1, 2), (N_CELLS, 1), (N_CELLS, 2, 2)], ids=str
)
@pytest.mark.parametrize("watched", ["mask", "observe"])
def test_a_mask_of_another_shape_is_not_understood(
    graph: Graph, watched: str, shape: tuple[int, ...]
) -> None:
    mask = graph.hold(graph.leaf("mask", *shape), np.zeros(shape[::-1], np.float32))
    patch = looked_at(graph, watched, mask)
    with pytest.raises(RuntimeError, match=r"^layer 1: the attention mask is not one \[n_kv"):
        patch.end()


def test_a_layer_that_attends_twice_does_not_pass_for_the_next(graph: Graph) -> None:
    patch = _core.GraphPatch(N_LAYER)
    attend(graph, [1])
    graph.nodes.append(graph.nodes[-1])
    graph.attention(2, graph.embed())
    patch.begin(planned(graph, mask=(1, 2)))
    graph.ask(patch)
    with pytest.raises(RuntimeError, match=r"^layer 2: .* a layer below attends twice"):
        patch.end()


def test_a_layer_that_reads_what_another_wrote_attends_behind_it(graph: Graph) -> None:
    patch = _core.GraphPatch(N_LAYER)
    attend(graph, [0, 1])
    graph.nodes += graph.nodes[-2:] * (N_LAYER - 2)  # these layers write nothing
    patch.begin(planned(graph, 2, mask=range(N_LAYER)))
    graph.ask(patch)
    graph.ask(patch)
    patch.end()
    assert patch.attended_layers == list(range(N_LAYER))


@pytest.mark.parametrize(("named", "found"), [("kq-0", [0]), ("kq-1", [])])
def test_a_product_that_another_backend_copies_is_found(
    graph: Graph, named: str, found: list[int]
) -> None:
    """As where a device cannot multiply by a cache of this type, and the CPU does."""
    patch, rows = _core.GraphPatch(N_LAYER), graph.embed()
    graph.attention(0, rows)
    *_, product, weights = graph.nodes
    copy = graph.leaf(f"CUDA0#{named}#0", *tensor(product).ne)
    tensor(weights).src[0] = copy
    tensor(product).name = b"kq-0"
    graph.ask(patch)
    assert patch.attended_layers == found


def test_a_graph_without_a_cache_has_nothing_to_mask(graph: Graph) -> None:
    patch = _core.GraphPatch(N_LAYER)
    graph.layer(0, graph.embed())
    patch.begin(planned(graph, mask=[0]))
    graph.ask(patch)
    with pytest.raises(RuntimeError, match=r"^layer 0: it has no attention .*: none$"):
        patch.end()


def test_the_layers_that_attend_are_seen_without_a_plan(graph: Graph) -> None:
    patch = _core.GraphPatch(N_LAYER)
    assert patch.attended_layers == []
    attend(graph, ATTENDING)
    graph.ask(patch)
    assert patch.attended_layers == list(ATTENDING)


# --- what it costs ------------------------------------------------------------------------------


def test_cosines_are_the_judges_and_only_there_when_asked_for(tiny: Tiny) -> None:
    rig, prompt, ref = Rig(tiny), tiny.prompt(ONE_IMAGE, PICTURE), tiny.ref
    rig.decode_prompt(prompt, read_residual=True)
    forward = ref.forward(prompt_rows(ref, prompt))
    influence = reference.candidate_influence(ref, forward, prompt.is_image)
    evidence = reference.layer_evidence(forward, influence, prompt.n_tokens - 1)
    np.testing.assert_allclose(rig.selections.cosines, evidence.cosine, atol=FINE)
    rig.engine.prefill(prompt, Guidance(layers=AttentionMass(0.5)))
    assert rig.engine.selections.cosines.tolist() == []
    np.testing.assert_allclose(rig.selections.cosines, evidence.cosine, atol=FINE)


@pytest.mark.parametrize("layers", [[2, 3, 5], [], AttentionMass(0.5), LowestCosine(0.5)], ids=str)
def test_a_step_costs_one_boundary_for_each_layer_it_observes(
    llama: Tiny, layers: list[int] | AttentionMass | LowestCosine
) -> None:
    rig, prompt = Rig(llama), llama.prompt(ONE_IMAGE, PICTURE)
    patch = rig.contexts[0].patch
    rig.engine.prefill(prompt, Guidance(layers=layers))
    for token in (300, 301, 302):
        before = patch.n_boundaries
        rig.engine.step(token)
        assert patch.n_boundaries - before == len(rig.engine.layers)


def test_steps_without_a_choice_to_make_cost_no_boundary(llama: Tiny) -> None:
    rig, prompt = Rig(llama), llama.prompt(ONE_IMAGE, PICTURE)
    patch = rig.contexts[0].patch
    for guidance, in_prompt in (
        (Guidance(layers=[2, 3, 5], refresh="prompt"), 3),
        (Guidance(layers=AttentionMass(0.5), refresh="prompt"), N_LAYER),
        (Guidance(alpha=0.0), 0),
    ):
        before = patch.n_boundaries
        rig.engine.prefill(prompt, guidance)
        assert patch.n_boundaries - before == in_prompt
        for token in (300, 301, 302):
            rig.engine.step(token)
        assert patch.n_boundaries - before == in_prompt


def test_each_micro_batch_with_observed_rows_costs_its_own_boundaries(llama: Tiny) -> None:
    rig, prompt = Rig(llama, EXACT), llama.prompt(TWO_IMAGES, *PICTURES)
    patch, first = rig.contexts[0].patch, int(prompt.is_image.argmax())
    rig.selections.resize(prompt.n_tokens)
    slots = np.arange(prompt.n_tokens, dtype=np.int32)
    slots[:first] = NONE
    before = patch.n_boundaries
    rig.decode_prompt(prompt, slots)
    assert len(prompt.segments) == 5
    assert patch.n_boundaries - before == N_LAYER * 4


class Interrupted:
    """A patch in whose `begin` or `end` an interrupt comes, when the work is done or not yet."""

    def __init__(self, patch: _core.GraphPatch, where: str) -> None:
        self._patch, self._where = patch, where

    def __getattr__(self, name: str) -> object:
        return getattr(self._patch, name)

    def begin(self, plan: _core.Plan) -> None:
        self._patch.begin(plan)
        if self._where == "behind begin":
            raise KeyboardInterrupt

    def end(self) -> None:
        if self._where == "before end":
            raise KeyboardInterrupt
        self._patch.end()


@pytest.mark.parametrize("where", ["behind begin", "before end"])
def test_an_interrupt_leaves_no_plan_behind(
    tiny: Tiny, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, plain, prompt = (
        Rig(tiny, stepping=Strategy(fork=True)),
        Unhooked(tiny),
        tiny.prompt(ONE_IMAGE, PICTURE),
    )
    rig.engine.prefill(prompt, Guidance())
    with monkeypatch.context() as patched:
        patched.setattr(rig.contexts[0], "patch", Interrupted(rig.contexts[0].patch, where))
        with pytest.raises(KeyboardInterrupt):
            rig.engine.step(300)  # a fork, whose plan would leave out rows of the next decode
    rig.engine.prefill(prompt, Guidance(alpha=0.0))
    np.testing.assert_array_equal(rig.engine.original_logits, plain.prefill(prompt))
    plain.close()
    check(rig, prompt, Guidance())
