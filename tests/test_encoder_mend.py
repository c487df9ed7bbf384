"""Image encoders that llama.cpp runs otherwise than they were trained, mended in their graphs."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from benchmarks.plain_llama import open_llama
from encoder_reference import embeddings
from graphs import I32, Graph, ggml_function, tensor
from guided import open_vlm
from numpy.typing import DTypeLike, NDArray
from prompts import picture
from tiny_encoder import Layout, TinyEncoder, weights_of, write_encoder
from tiny_llava import TinyConfig, TinyPair

from cmg_gguf import CMGChatHandler, Contrast, _core
from cmg_gguf.arrays import FloatArray
from cmg_gguf.chat.completion import cmg_block
from cmg_gguf.cli.screen import summary
from cmg_gguf.errors import BackendError, ProjectorError, UnsupportedError
from cmg_gguf.facts import pair_facts
from cmg_gguf.llama.legacy import lacks_layer
from cmg_gguf.llama.model import Model
from cmg_gguf.llama.projector import Projector
from cmg_gguf.prompt.segments import ImageSegment
from cmg_gguf.reply import MENDS
from cmg_gguf.tiny.pair import embedded_pair

CLOSE = 0.01
"""llama.cpp looks GELU up in a table of half precision; embeddings have an RMS of about 1."""
LAYOUTS: tuple[Layout, ...] = ("whole", "legacy", "feature_layer")

Opens = Callable[..., Projector]


@pytest.fixture(scope="module")
def model(pair: TinyPair) -> Iterator[Model]:
    model = Model.load(pair.llm, n_gpu_layers=0)
    yield model
    model.close()


@pytest.fixture
def opened(model: Model, tmp_path: Path) -> Iterator[Opens]:
    """Opens an encoder, or an mmproj file, with settings."""
    projectors = []

    def open_it(what: TinyEncoder | Path, **settings: Any) -> Projector:
        if isinstance(what, TinyEncoder):
            what = write_encoder(tmp_path / f"{what.kind}-{what.layout}.gguf", what)
        projectors.append(Projector(what, model, use_gpu=False, n_threads=1, **settings))
        return projectors[-1]

    yield open_it
    for projector in projectors:
        projector.close()


def encoded(projector: Projector, pixels: NDArray[np.uint8]) -> FloatArray:
    """(n_image_tokens, n_embd) of one picture."""
    prompt = projector.encode(projector.tokenize(projector.marker, [pixels], add_bos=False))
    rows = [s.embd for s in prompt.segments if isinstance(s, ImageSegment) and s.embd is not None]
    return np.concatenate(rows)


def distance(projector: Projector, encoder: TinyEncoder, seed: int) -> float:
    ours, theirs = encoded(projector, picture(seed)), embeddings(encoder, picture(seed))
    return float(np.abs(ours - theirs).max())


# --- what the judge says ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_encoder_with_a_class_token_gives_what_the_judge_says(
    opened: Opens, layout: Layout
) -> None:
    encoder = TinyEncoder("clip", layout=layout)
    projector = opened(encoder)
    assert max(distance(projector, encoder, seed) for seed in (2, 3, 4)) < CLOSE
    assert projector.mended == {"class token"} | ({"layer"} if layout == "legacy" else set())


@pytest.mark.parametrize(
    ("encoder", "mended"),
    [
        (TinyEncoder("internvl"), {"places"}),
        (TinyEncoder("cogvlm"), {"activation", "places"}),
        (TinyEncoder("cogvlm", names_gelu=True), {"places"}),
        (TinyEncoder("cogvlm", image_size=42), {"activation", "places"}),
    ],
)
def test_learned_places_stand_with_their_patches(
    opened: Opens, encoder: TinyEncoder, mended: set[str]
) -> None:
    projector = opened(encoder)
    side = encoder.image_size
    for seed in (2, 3, 4):
        pixels = picture(seed)[:side, :side].copy()
        assert np.abs(encoded(projector, pixels) - embeddings(encoder, pixels)).max() < CLOSE
    assert projector.mended == mended


def test_where_a_place_is_like_any_other_stock_gives_what_the_judge_says(opened: Opens) -> None:
    encoder = TinyEncoder("cogvlm", names_gelu=True, same_places=True)
    projector = opened(encoder, encoder="stock")
    assert max(distance(projector, encoder, seed) for seed in (2, 3, 4)) < CLOSE


def test_an_activation_that_a_file_does_not_name_is_the_one_that_it_would_name(
    opened: Opens,
) -> None:
    named, unnamed = (
        encoded(opened(TinyEncoder("cogvlm", names_gelu=names_gelu)), picture(2))
        for names_gelu in (True, False)
    )
    np.testing.assert_array_equal(named, unnamed)


@pytest.mark.parametrize(
    "encoder", [TinyEncoder("clip"), TinyEncoder("internvl"), TinyEncoder("cogvlm")]
)
def test_stock_is_what_llama_cpp_makes_of_it(opened: Opens, encoder: TinyEncoder) -> None:
    projector = opened(encoder, encoder="stock")
    assert distance(projector, encoder, 2) > 50 * CLOSE
    assert projector.mended == frozenset()


@pytest.mark.parametrize("side", [42, 70])
def test_any_number_of_patches_is_mended(opened: Opens, side: int) -> None:
    encoder = TinyEncoder("clip", image_size=side)
    pixels = picture(2, 4 * side)[:side, :side].copy()
    error = np.abs(encoded(opened(encoder), pixels) - embeddings(encoder, pixels)).max()
    assert error < CLOSE


# --- memory that nothing has written ------------------------------------------------------------


def leave_nan_behind() -> None:
    """Fills memory that is free again, of many sizes, with NaN."""
    blocks = [np.full(1 << power, np.nan, np.float32) for power in range(8, 21) for _ in range(4)]
    del blocks


def test_a_break_behind_a_row_is_never_made_of_what_memory_held(opened: Opens) -> None:
    encoder = TinyEncoder("pixtral")
    row_break = weights_of(encoder)["v.token_embd.img_break"]
    for seed in range(60):
        leave_nan_behind()
        projector = opened(encoder)
        found = encoded(projector, picture(seed))
        for row in range(encoder.n_side, len(found), encoder.n_side + 1):
            np.testing.assert_array_equal(found[row], row_break)
        projector.close()
    assert projector.mended == {"cleared"}


# --- what is in order ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TinyConfig(), TinyConfig(longest_edge=112), None])
def test_an_encoder_without_a_class_token_is_left_alone_bit_for_bit(
    written: Callable[[TinyConfig], TinyPair], config: TinyConfig | None
) -> None:
    llm, mmproj = embedded_pair() if config is None else written(config)
    model = Model.load(llm, n_gpu_layers=0)
    mended = Projector(mmproj, model, use_gpu=False, n_threads=1)
    stock = Projector(mmproj, model, use_gpu=False, n_threads=1, encoder="stock")
    np.testing.assert_array_equal(encoded(mended, picture(2)), encoded(stock, picture(2)))
    assert mended.mended == frozenset()
    for projector in (mended, stock):
        projector.close()
    model.close()


class EncoderGraph(Graph):
    """Four patches of eight numbers and a class token, in memory; nothing is computed.

    repeated: the class token is one for each picture of a batch.
    """

    N_ROWS = 5

    def joined(self, *, class_first: bool, repeated: bool = False) -> int:
        patches, token = self.project(self.leaf("pixels", 8, 4)), self.leaf("class", 8)
        if repeated:
            token = self.node("repeat_4d", token, sizes=(8, 1, 1, 1))
        both = (token, patches) if class_first else (patches, token)
        return self.node("concat", *both, sizes=(1,))

    def with_places(self, rows: int) -> int:
        """Rows with the places that an input names, 0 1 2 ... if it was filled so."""
        self.places = self.leaf("positions", self.N_ROWS, kind=I32)
        found = self.node("get_rows", self.leaf("v.position_embd", 8, self.N_ROWS), self.places)
        return self.node("add", rows, found)

    def kept(self, rows: int) -> int:
        self.rows = self.leaf("patches", self.N_ROWS - 1, kind=I32)
        return self.node("get_rows", rows, self.rows)

    def allocate(self) -> None:
        kind = ggml_function("ggml_backend_cpu_buffer_type")()
        make = ggml_function(
            "ggml_backend_alloc_ctx_tensors_from_buft", ctypes.c_void_p, ctypes.c_void_p
        )
        self._buffer = make(self._context, kind)

    def close(self) -> None:
        ggml_function("ggml_backend_buffer_free", ctypes.c_void_p)(self._buffer)
        super().close()

    def fill(self, leaf: int, values: Sequence[float], kind: DTypeLike = np.int32) -> None:
        data = np.array(values, kind)
        copy = llama_cpp.llama_cpp._lib.ggml_backend_tensor_set
        copy.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2
        copy(leaf, data.ctypes.data, 0, data.nbytes)

    def read(self, leaf: int, n: int, kind: DTypeLike = np.int32) -> list[float]:
        data: NDArray[Any] = np.empty(n, kind)
        copy = llama_cpp.llama_cpp._lib.ggml_backend_tensor_get
        copy.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2
        copy(leaf, data.ctypes.data, 0, data.nbytes)
        found: list[float] = data.tolist()
        return found

    def asked(self, kind: str = "") -> set[str]:
        """Asks about every node, in order, shows those it wants to see; what was mended.

        kind: of the projector that the graph is said to be of.
        """
        mend = _core.EncoderMend(kind)
        callback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(
            mend.callback
        )
        mend.begin()
        for node in self.nodes:
            if callback(node, True, mend.user_data):
                assert callback(node, False, mend.user_data)
        mend.end()
        return mend.mended


@pytest.fixture
def encoder_graph() -> Iterator[EncoderGraph]:
    graph = EncoderGraph()
    yield graph
    graph.close()


@pytest.mark.parametrize("class_first", [False, True])
def test_the_order_of_class_token_and_patches_decides(
    encoder_graph: EncoderGraph, class_first: bool
) -> None:
    graph = encoder_graph
    graph.kept(graph.with_places(graph.joined(class_first=class_first)))
    graph.allocate()
    graph.fill(graph.places, [0, 1, 2, 3, 4])
    graph.fill(graph.rows, [1, 2, 3, 4])
    assert graph.asked() == (set() if class_first else {"class token"})
    assert graph.read(graph.places, 5) == ([0, 1, 2, 3, 4] if class_first else [1, 2, 3, 4, 0])
    assert graph.read(graph.rows, 4) == ([1, 2, 3, 4] if class_first else [0, 1, 2, 3])


def test_places_and_rows_that_are_right_for_a_last_class_token_stay(
    encoder_graph: EncoderGraph,
) -> None:
    graph = encoder_graph
    graph.kept(graph.with_places(graph.joined(class_first=False)))
    graph.allocate()
    graph.fill(graph.places, [1, 2, 3, 4, 0])
    graph.fill(graph.rows, [0, 1, 2, 3])
    assert graph.asked() == set()
    assert graph.read(graph.places, 5) == [1, 2, 3, 4, 0]
    assert graph.read(graph.rows, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "class_first", "repeated", "mended"),
    [
        ("internvl", False, True, {"places"}),
        ("internvl", True, True, set()),
        ("llama4", False, False, set()),
        ("llama4", True, False, set()),
        ("cogvlm", False, False, {"places"}),
        ("cogvlm", True, False, set()),
    ],
)
def test_learned_places_are_shifted_only_behind_a_class_token_that_belongs_before_them(
    encoder_graph: EncoderGraph, kind: str, class_first: bool, repeated: bool, mended: set[str]
) -> None:
    graph = encoder_graph
    joined = graph.joined(class_first=class_first, repeated=repeated)
    graph.node("add", joined, graph.leaf("v.position_embd", 8, graph.N_ROWS))
    graph.allocate()
    assert graph.asked(kind) == mended


@pytest.mark.parametrize("reordered", [False, True])
def test_four_patches_that_make_a_token_are_reordered_twice(
    encoder_graph: EncoderGraph, reordered: bool
) -> None:
    graph = encoder_graph
    patches = graph.project(graph.leaf("pixels", 8, 16))
    pairs = graph.node("reshape_3d", patches, sizes=(16, 2, 4))
    tokens = graph.node("permute", pairs, sizes=(0, 2, 1, 3))
    tokens = graph.node("cont_4d", tokens, sizes=(32, 2, 2, 1))
    if reordered:
        tokens = graph.node("permute", tokens, sizes=(0, 2, 1, 3))
    graph.node("cont_2d", tokens, sizes=(32, 4))
    graph.allocate()
    assert graph.asked() == (set() if reordered else {"rows"})


def test_a_gated_network_has_no_quick_gelu(encoder_graph: EncoderGraph) -> None:
    graph = encoder_graph
    pixels = graph.leaf("pixels", 8, 4)
    kind = ggml_function("ggml_get_glu_op", ctypes.c_void_p)
    quick, usual, silu = (
        graph.node(f"{name}_split", graph.project(pixels), graph.project(pixels))
        for name in ("geglu_quick", "geglu", "swiglu")
    )
    silu_kind = kind(silu)
    graph.allocate()
    assert graph.asked() == {"activation"}
    assert kind(quick) == kind(usual)
    assert kind(silu) == silu_kind != kind(usual)


@pytest.mark.parametrize(("kind", "mended"), [("cogvlm", {"activation"}), ("mlp", set())])
def test_a_network_without_a_gate_keeps_quick_gelu_unless_its_model_has_none(
    encoder_graph: EncoderGraph, kind: str, mended: set[str]
) -> None:
    graph = encoder_graph
    rows = graph.project(graph.leaf("pixels", 8, 4))
    quick, usual, silu = (graph.node(name, rows) for name in ("gelu_quick", "gelu", "silu"))
    before = [tensor(node).op_params[0] for node in (quick, usual, silu)]
    graph.allocate()
    assert graph.asked(kind) == mended
    after = [tensor(node).op_params[0] for node in (quick, usual, silu)]
    assert after == [before[1] if mended else before[0], *before[1:]]


def test_memory_that_nothing_wrote_is_cleared_where_a_factor_of_zero_is_to_do_it(
    encoder_graph: EncoderGraph,
) -> None:
    graph = encoder_graph
    cleared = graph.node("scale", graph.leaf("unwritten", 8), sizes=(0.0,))
    graph.allocate()
    graph.fill(cleared, [np.nan, np.inf] * 4, np.float32)
    assert graph.asked() == {"cleared"}
    assert graph.read(cleared, 8, np.float32) == [0.0] * 8


def test_a_factor_of_zero_on_what_the_graph_computes_stays(encoder_graph: EncoderGraph) -> None:
    graph = encoder_graph
    graph.node("scale", graph.project(graph.leaf("pixels", 8, 4)), sizes=(0.0,))
    graph.allocate()
    assert graph.asked() == set()


# --- files that name one layer too few ----------------------------------------------------------


def test_a_file_of_the_old_converter_is_read_as_meant_and_stays_as_it_is(
    opened: Opens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    encoder = TinyEncoder("clip", layout="legacy")
    path = write_encoder(tmp_path / "old.gguf", encoder)
    before = hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns
    assert distance(opened(path), encoder, 2) < CLOSE
    assert (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns) == before
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    "encoder",
    [
        TinyEncoder("clip", layout="whole"),
        TinyEncoder("clip", layout="feature_layer"),
        # An even number of layers: as many as there were.
        TinyEncoder("clip", layout="legacy", n_layer=4),
        TinyEncoder("internvl"),
        TinyEncoder("pixtral"),
    ],
)
def test_any_other_file_is_not_taken_for_one(tmp_path: Path, encoder: TinyEncoder) -> None:
    assert not lacks_layer(write_encoder(tmp_path / "mmproj.gguf", encoder))


def test_no_room_for_the_copy_is_an_error_that_says_what_to_do(
    opened: Opens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_encoder(tmp_path / "old.gguf", TinyEncoder("clip", layout="legacy"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ProjectorError, match=r"one encoder layer short.*TMPDIR.*encoder=\"stock\""):
        opened(path)
    opened(path, encoder="stock")


# --- the same for whoever asks ------------------------------------------------------------------


def test_every_way_in_takes_the_setting(pair: TinyPair, tmp_path: Path) -> None:
    mmproj = write_encoder(tmp_path / "mmproj.gguf", TinyEncoder("clip"))
    found = {}
    for encoder in ("mended", "stock"):
        with open_vlm(TinyPair(pair.llm, mmproj), encoder=encoder) as vlm:
            found[encoder] = encoded(vlm.projector, picture(2))
        llama = open_llama(pair.llm, n_ctx=256, verbose=False)
        handler = CMGChatHandler(mmproj, encoder=encoder, use_gpu=False)
        through_llama = encoded(handler.vlm(llama).projector, picture(2))
        np.testing.assert_array_equal(through_llama, found[encoder])
        llama.close()
    assert np.abs(found["mended"] - found["stock"]).max() > 50 * CLOSE
    with pytest.raises(UnsupportedError, match="encoder='best' is unknown"):
        open_vlm(pair, encoder="best")


def test_a_reply_says_what_was_mended_for_its_pictures(pair: TinyPair, tmp_path: Path) -> None:
    mmproj = write_encoder(tmp_path / "mmproj.gguf", TinyEncoder("clip", layout="legacy"))
    with open_vlm(TinyPair(pair.llm, mmproj)) as vlm:
        ask = partial(vlm.generate, "What is it?", max_tokens=2)
        assert ask().mended == ()
        first, again, other = (ask([picture(seed)]) for seed in (2, 2, 3))
        assert again.n_reused_tokens > first.n_image_tokens  # its picture was not encoded again
        assert first.mended == again.mended == other.mended == ("class token", "layer")
        assert cmg_block(first, vlm.model.token_bytes)["mended"] == ["class token", "layer"]
        noised = Contrast("What is it?", [picture(4)])
        assert ask(contrast=noised).mended == ("class token", "layer")
        assert "encoder mended: class token, layer" in summary(first)
        assert "mended" not in summary(ask())
    with open_vlm(TinyPair(pair.llm, mmproj), encoder="stock") as vlm:
        assert vlm.generate("What is it?", [picture(2)], max_tokens=2).mended == ()


def test_what_is_mended_is_told_by_picture(opened: Opens) -> None:
    projector = opened(TinyEncoder("clip"))
    prompt = projector.tokenize(projector.marker, [picture(2)], add_bos=False)
    assert projector.mended_in(prompt) == frozenset()  # nothing has been encoded
    projector.encode(prompt)
    assert projector.mended_in(prompt) == {"class token"}
    text = projector.tokenize("no picture", [])
    assert projector.mended_in(text) == frozenset()


def test_info_says_what_is_mended(pair: TinyPair, tmp_path: Path) -> None:
    for encoder, mended in (
        (TinyEncoder("clip", layout="legacy"), ["class token", "layer"]),
        (TinyEncoder("internvl"), ["places"]),
        (TinyEncoder("cogvlm"), ["activation", "places"]),
        (TinyEncoder("pixtral"), ["cleared"]),
    ):
        facts = pair_facts(pair.llm, write_encoder(tmp_path / "mmproj.gguf", encoder))
        assert facts["mmproj"]["mended"] == mended
        assert set(mended) <= set(MENDS)
    assert pair_facts(pair.llm, pair.mmproj)["mmproj"]["mended"] == []


# --- errors -------------------------------------------------------------------------------------


def test_what_goes_wrong_in_a_mend_is_a_backend_error(
    opened: Opens, monkeypatch: pytest.MonkeyPatch
) -> None:
    projector = opened(TinyEncoder("clip"))

    class Broken:
        def begin(self) -> None: ...

        def end(self) -> None:
            raise RuntimeError("no memory for a mask")

    monkeypatch.setattr(projector, "_mend", Broken())
    with pytest.raises(BackendError, match=r"no memory for a mask.*stock"):
        encoded(projector, picture(2))
