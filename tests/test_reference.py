"""The judge judged: `reference` against llama.cpp's plain decoding, and its parts by hand."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import llama_cpp
import numpy as np
import pytest
import reference
from llama_cpp import mtmd_cpp as mtmd
from numpy.typing import NDArray
from offload import N_GPU_LAYERS
from prompts import ONE_IMAGE, TWO_IMAGES, picture
from reference import F64, LayerEvidence, Mask, Policy, Reference
from tiny_llava import TinyConfig, TinyPair, write_pair
from tiny_vocabulary import EOS_TOKEN, vocabulary

F32 = NDArray[np.float32]
N_GENERATED = 8
N_BATCH = 512


class Prompt(NamedTuple):
    """A prompt as decoded: its rows (T, E), which are image rows (T,), each row's logits (T, V)."""

    rows: F64
    is_image: Mask
    logits: F32


class Plain:
    """llama.cpp with float32 KV and no flash attention; logits for every row decoded."""

    def __init__(self, pair: TinyPair) -> None:
        self.ref = Reference.load(pair.llm)
        llama_cpp.llama_backend_init()
        self.model = self._load(pair.llm)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = N_BATCH
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.n_threads = params.n_threads_batch = 1
        params.swa_full = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        vision = mtmd.mtmd_context_params_default()
        vision.use_gpu, vision.warmup, vision.print_timings = False, False, False
        self.vision = mtmd.mtmd_init_from_file(str(pair.mmproj).encode(), self.model, vision)
        assert self.context is not None
        assert self.vision is not None
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self.n_embd = llama_cpp.llama_model_n_embd(self.model)
        self.n_past = 0

    @staticmethod
    def _load(path: Path) -> Any:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = N_GPU_LAYERS
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model is not None
        return model

    def close(self) -> None:
        mtmd.mtmd_free(self.vision)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def prefill(self, text: str, *image_seeds: int) -> Prompt:
        """The prompt, decoded into an empty context; `ref` embeds its text tokens."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.n_past = 0
        rows, is_image, logits = [], [], []
        for chunk in self.chunks(text, [picture(seed) for seed in image_seeds]):
            if isinstance(chunk, list):
                rows.append(self.ref.embed(chunk))
                logits.append(self.decode_tokens(chunk))
            else:
                rows.append(chunk.astype(np.float64))
                logits.append(self._decode_embeddings(chunk))
            is_image += [not isinstance(chunk, list)] * len(chunk)
        return Prompt(np.concatenate(rows), np.array(is_image), np.concatenate(logits))

    def chunks(self, text: str, images: Sequence[NDArray[np.uint8]]) -> list[list[int] | F32]:
        """Token ids for each text chunk, embeddings (n_image_tokens, E) for each image."""
        bitmaps = [_bitmap(image) for image in images]
        chunks = mtmd.mtmd_input_chunks_init()
        raw = text.encode()
        given = mtmd.mtmd_input_text(
            text=raw, text_len=len(raw), add_special=True, parse_special=True
        )
        pointers = (mtmd.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        status = mtmd.mtmd_tokenize(
            self.vision, chunks, ctypes.byref(given), pointers, len(bitmaps)
        )
        assert status == 0
        n_chunks = mtmd.mtmd_input_chunks_size(chunks)
        found = [self._chunk(mtmd.mtmd_input_chunks_get(chunks, i)) for i in range(n_chunks)]
        mtmd.mtmd_input_chunks_free(chunks)
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        return found

    def _chunk(self, chunk: Any) -> list[int] | F32:
        n = mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            count = ctypes.c_size_t()
            tokens = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            assert tokens is not None
            return [tokens[i] for i in range(count.value)]
        assert mtmd.mtmd_encode_chunk(self.vision, chunk) == 0
        assert not mtmd.mtmd_decode_use_non_causal(self.vision, chunk)
        output = mtmd.mtmd_get_output_embd(self.vision)
        return np.array(np.ctypeslib.as_array(output, (n, self.n_embd)))

    def decode_tokens(self, tokens: Sequence[int]) -> F32:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        for i, token in enumerate(tokens):
            batch.token[i] = token
        return self._decode(batch, len(tokens))

    def _decode_embeddings(self, rows: F32) -> F32:
        batch = llama_cpp.llama_batch_init(len(rows), self.n_embd, 1)
        np.ctypeslib.as_array(batch.embd, rows.shape)[:] = rows
        return self._decode(batch, len(rows))

    def _decode(self, batch: Any, n: int) -> F32:
        batch.n_tokens = n
        for i in range(n):
            batch.pos[i] = self.n_past + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        assert status == 0
        self.n_past += n
        logits = llama_cpp.llama_get_logits(self.context)
        return np.array(np.ctypeslib.as_array(logits, (n, self.n_vocab)))


def _bitmap(image: NDArray[np.uint8]) -> Any:
    height, width, _ = image.shape
    pixels = (ctypes.c_uint8 * image.size).from_buffer_copy(image.tobytes())
    return mtmd.mtmd_bitmap_init(width, height, pixels)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def plain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Plain]:
    config = TinyConfig(arch=request.param)
    opened = Plain(write_pair(tmp_path_factory.mktemp("pair"), config))
    yield opened
    opened.close()


@pytest.mark.parametrize(("text", "seeds"), [(ONE_IMAGE, [0]), (TWO_IMAGES, [0, 1])])
def test_plain_logits_of_every_row_agree_with_llama_cpp(
    plain: Plain, text: str, seeds: list[int]
) -> None:
    prompt = plain.prefill(text, *seeds)
    logits, tokens = prompt.logits, list[int]()
    for _ in range(N_GENERATED):
        tokens.append(int(logits[-1].argmax()))
        logits = np.concatenate([logits, plain.decode_tokens(tokens[-1:])])
    rows = np.concatenate([prompt.rows, plain.ref.embed(tokens)])
    np.testing.assert_allclose(logits, plain.ref.forward(rows).logits, rtol=0, atol=1e-4)


def test_the_image_changes_the_logits(plain: Plain) -> None:
    one, other = (plain.prefill(ONE_IMAGE, seed).logits[-1] for seed in (0, 1))
    assert np.abs(one - other).max() > 1.0


def test_greedy_text_goes_on_without_repeating_one_token(plain: Plain) -> None:
    tokens = [int(plain.prefill(ONE_IMAGE, 0).logits[-1].argmax())]
    while len(tokens) < 32:
        tokens.append(int(plain.decode_tokens(tokens[-1:])[-1].argmax()))
    assert EOS_TOKEN not in tokens
    assert len(set(tokens)) >= 12


def test_the_window_of_gemma3_cuts_inside_the_prompt(plain: Plain) -> None:
    prompt = plain.prefill(TWO_IMAGES, 0, 1)
    n_rows, window = len(prompt.rows), TinyConfig().sliding_window
    expected = {"llama": [n_rows] * 6, "gemma3": [window, window, n_rows] * 2}
    seen = plain.ref.visible(n_rows)[:, -1]
    assert window < n_rows
    assert seen.sum(axis=1).tolist() == expected[plain.ref.hyper.arch]


def test_english_needs_no_byte_pieces(plain: Plain) -> None:
    tokens = plain.chunks("Is there a dog? Yes, 2 of them: (Rex & Max)!", [])[0]
    assert not any(vocabulary()[token].startswith("<0x") for token in tokens)


def test_a_projector_of_another_width_is_refused(plain: Plain, tmp_path: Path) -> None:
    pair = write_pair(tmp_path, TinyConfig(mmproj_n_embd=32))
    params = mtmd.mtmd_context_params_default()
    params.use_gpu = params.warmup = False
    assert mtmd.mtmd_init_from_file(str(pair.mmproj).encode(), plain.model, params) is None


def test_the_same_config_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = write_pair(tmp_path / "one"), write_pair(tmp_path / "two")
    other = write_pair(tmp_path / "other", TinyConfig(seed=1))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert one.llm.read_bytes() != other.llm.read_bytes()


def test_rope_turns_the_pairs_of_each_kind() -> None:
    x = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 2.0]])
    c, s, c2, s2 = np.cos(1.0), np.sin(1.0), np.cos(0.01), np.sin(0.01)
    interleaved = reference.rope(x, base=1e4, interleaved=True)
    halves = reference.rope(x, base=1e4, interleaved=False)
    np.testing.assert_allclose(interleaved[1], [c, s, -2 * s2, 2 * c2])
    np.testing.assert_allclose(halves[1], [c, -2 * s2, s, 2 * c2])


def test_gelu_has_the_tanh_form() -> None:
    x = np.array([-1.0, 0.0, 2.0])
    np.testing.assert_allclose(reference.gelu(x), [-0.158808, 0.0, 1.954598], rtol=1e-5)


def test_blocked_pairs_get_exactly_no_attention(plain: Plain) -> None:
    ref, (rows, is_image, _) = plain.ref, plain.prefill(ONE_IMAGE, 0)
    free = ref.forward(rows)
    blocked = np.zeros(free.attention.shape, np.bool_)
    blocked[2:, -4:, is_image] = True
    got = ref.forward(rows, blocked)
    assert (got.attention[blocked] == 0.0).all()
    assert (got.attention[~blocked & ref.visible(len(rows))] > 0.0).all()
    np.testing.assert_allclose(got.attention.sum(axis=2), 1.0, rtol=1e-12)
    np.testing.assert_array_equal(got.hidden[:3], free.hidden[:3])
    np.testing.assert_array_equal(got.logits[:-4], free.logits[:-4])
    assert (got.logits[-4:] != free.logits[-4:]).any(axis=1).all()


def test_a_row_with_nothing_to_see_is_refused(plain: Plain) -> None:
    with pytest.raises(ValueError, match="all of its keys"):
        plain.ref.forward(plain.ref.embed([1, 300]), np.ones((6, 2, 2), np.bool_))


@pytest.mark.parametrize(
    ("ratio", "n", "expected"),
    [(0.0, 4, []), (0.01, 4, [1]), (0.5, 4, [1, 3]), (0.375, 4, [1, 3]), (1.0, 4, [0, 1, 2, 3])],
)
def test_top_ratio_rounds_half_up_and_takes_at_least_one(
    ratio: float, n: int, expected: list[int]
) -> None:
    f = np.array([0.1, 0.4, 0.2, 0.3])[:n]
    assert np.flatnonzero(reference.top_ratio(f, ratio=ratio)).tolist() == expected


def test_ties_go_to_the_lower_index() -> None:
    tied = np.array([0.1, 0.3, 0.3, 0.3])
    assert reference.top_ratio(tied, ratio=0.5).tolist() == [False, True, True, False]
    assert reference.cumulative_mass(tied, mass=0.5).tolist() == [False, True, True, False]


def test_mean_std_is_strict_and_uses_the_populations_deviation() -> None:
    f = np.array([0.0, 0.0, 0.0, 4.0])  # mean 1, deviation sqrt(3)
    assert reference.mean_std(f, lam=1.7).tolist() == [False, False, False, True]
    assert not reference.mean_std(f, lam=1.74).any()
    assert reference.mean_std(np.array([0.5, 0.5]), lam=0.0).tolist() == [False, False]


@pytest.mark.parametrize(
    ("mass", "expected"), [(0.0, []), (0.5, [2]), (0.51, [0, 2]), (0.75, [0, 2]), (1.0, [0, 1, 2])]
)
def test_cumulative_mass_takes_the_fewest(mass: float, expected: list[int]) -> None:
    f = np.array([0.25, 0.25, 0.5])
    assert np.flatnonzero(reference.cumulative_mass(f, mass=mass)).tolist() == expected


def test_token_policies_take_nothing_from_nothing() -> None:
    for policy in (
        partial(reference.top_ratio, ratio=1.0),
        partial(reference.mean_std, lam=0.0),
        partial(reference.cumulative_mass, mass=1.0),
    ):
        assert policy(np.zeros(0)).shape == (0,)


def test_layer_policies_by_hand() -> None:
    evidence = LayerEvidence(np.array([1.0, 4.0, 4.0, 1.0]), np.array([0.9, 0.5, 0.7, 0.5]))

    def layers(policy: Callable[..., Mask], **options: Any) -> list[int]:
        return [int(il) for il in np.flatnonzero(policy(evidence, **options))]

    assert layers(reference.explicit_layers, layers=[3, 0]) == [0, 3]
    assert layers(reference.layer_range, start=1 / 3, stop=0.9) == [1, 2, 3]
    assert layers(reference.layer_range, start=0.125, stop=0.125) == []
    assert layers(reference.attention_mass, gamma=0.4) == [1]
    assert layers(reference.attention_mass, gamma=0.41) == [1, 2]
    assert layers(reference.lowest_cosine, share=0.0) == [1]
    assert layers(reference.lowest_cosine, share=0.625) == [1, 2, 3]


def test_the_cut_is_on_the_original_and_zero_beta_cuts_nothing() -> None:
    original, degraded = np.array([2.0, 1.0, -5.0]), np.array([2.0, 3.0, -9.0])
    cut = reference.combine(original, degraded, alpha=0.5, beta=0.1)
    assert cut.tolist() == [2.0, 0.0, -np.inf]
    assert reference.combine(original, degraded, alpha=0.5, beta=0.0).tolist() == [2.0, 0.0, -3.0]


IS_IMAGE = np.array([False, True, True, False, True, False, False])
N_PROMPT = 6


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("decode", [5, 6]),
        ("question", [5, 6]),
        ("text", [3, 5, 6]),
        ("all", [1, 2, 3, 4, 5, 6]),
    ],
)
def test_scopes_by_hand(scope: str, expected: list[int]) -> None:
    assert np.flatnonzero(reference.masked_rows(IS_IMAGE, N_PROMPT, scope)).tolist() == expected


def hand_influence() -> F64:
    """(1, 7, 7): row 3 looks most at token 2, row 5 at token 4, row 6 at token 1."""
    influence = np.full((1, 7, 7), np.nan)
    influence[0, 2, 1] = 0.5
    influence[0, 3, [1, 2]] = 0.1, 0.2
    influence[0, 4, [1, 2]] = 0.1, 0.2
    influence[0, 5, [1, 2, 4]] = 0.1, 0.2, 0.3
    influence[0, 6, [1, 2, 4]] = 0.3, 0.2, 0.1
    return influence


@pytest.mark.parametrize(
    ("refresh", "expected"),
    [
        ("step", [(2, 1), (3, 2), (4, 2), (5, 4), (6, 1)]),
        ("prompt", [(1, 4), (2, 4), (3, 4), (5, 4), (6, 4)]),
    ],
)
def test_refresh_by_hand(
    refresh: Literal["prompt", "step"], expected: list[tuple[int, int]]
) -> None:
    policy = Policy(tokens=partial(reference.top_ratio, ratio=0.3), scope="all", refresh=refresh)
    blocked = reference.blocked_pairs(hand_influence(), IS_IMAGE, N_PROMPT, policy)
    assert [tuple(pair) for pair in np.argwhere(blocked[0]).tolist()] == expected


ALL_TOKENS = Policy(tokens=partial(reference.top_ratio, ratio=1.0))


def test_without_alpha_and_beta_guided_is_plain_greedy(plain: Plain) -> None:
    rows, is_image, logits = plain.prefill(ONE_IMAGE, 0)
    policy = replace(ALL_TOKENS, alpha=0.0, beta=0.0)
    for step in reference.guided(plain.ref, rows, is_image, 4, policy):
        assert step.token == int(logits[-1].argmax())
        logits = plain.decode_tokens([step.token])


def test_branches_without_masked_layers_are_equal(plain: Plain) -> None:
    rows, is_image, _ = plain.prefill(ONE_IMAGE, 0)
    policy = replace(ALL_TOKENS, layers=partial(reference.explicit_layers, layers=[]))
    for step in reference.guided(plain.ref, rows, is_image, 2, policy):
        np.testing.assert_array_equal(step.original, step.degraded)


def test_all_tokens_in_scope_decode_hide_the_image_from_the_last_rows(plain: Plain) -> None:
    ref, (rows, is_image, _) = plain.ref, plain.prefill(TWO_IMAGES, 0, 1)
    policy = replace(ALL_TOKENS, scope="decode", beta=0.0)
    first, second = reference.guided(ref, rows, is_image, 2, policy)
    assert first.token == int(np.argmax(2 * first.original - first.degraded))
    rows = np.concatenate([rows, ref.embed([first.token])])
    blocked = np.zeros((6, len(rows), len(rows)), np.bool_)
    blocked[:, -2:, :-1] = is_image
    got = ref.forward(rows, blocked).logits
    np.testing.assert_allclose(got[-2:], [first.degraded, second.degraded], atol=1e-9)


def test_influence_and_evidence_are_of_the_image_tokens_in_sight(plain: Plain) -> None:
    ref, (rows, is_image, _) = plain.ref, plain.prefill(TWO_IMAGES, 0, 1)
    free = ref.forward(rows)
    influence = reference.candidate_influence(ref, free, is_image)
    in_sight = ref.visible(len(rows)) & is_image & ~np.eye(len(rows), dtype=np.bool_)
    np.testing.assert_array_equal(np.isnan(influence), ~in_sight)
    evidence = reference.layer_evidence(free, influence, len(rows) - 1)
    np.testing.assert_allclose(evidence.mass, free.attention[:, -1, is_image].sum(axis=1))
    before, after = free.hidden[2, -1], free.hidden[3, -1]
    lengths = np.linalg.norm(before) * np.linalg.norm(after)
    np.testing.assert_allclose(evidence.cosine[2], before @ after / lengths)


def test_masking_in_scope_text_moves_the_logits(plain: Plain) -> None:
    rows, is_image, _ = plain.prefill(ONE_IMAGE, 0)
    for step in reference.guided(plain.ref, rows, is_image, 4, ALL_TOKENS):
        assert np.abs(step.original - step.degraded).max() > 1.0
