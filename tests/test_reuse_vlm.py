"""Questions about images that were seen before: the same answers, sooner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
from benchmarks.plain_llama import open_llama
from guided import N_IMAGE_TOKENS, QUESTION, asked, held, ids, is_empty, open_vlm, user
from numpy.typing import NDArray
from offload import N_GPU_LAYERS
from prompts import picture
from tiny_llava import TinyPair

from cmg_gguf import (
    BackendError,
    CMGChatHandler,
    Guidance,
    GuidedVLM,
    Reply,
    TopRatio,
    UnsupportedError,
)
from cmg_gguf.engine.steps import AUTO, EAGER, EXACT, Strategy
from cmg_gguf.guidance import PLAIN
from cmg_gguf.llama.embeddings import Embeddings

STRONG = Guidance(alpha=3.0, tokens=TopRatio(1.0))
OTHER = "How many people are there?"


@pytest.fixture(scope="module")
def opened(pair: TinyPair) -> Iterator[GuidedVLM]:
    with open_vlm(pair, n_ctx=512) as vlm:
        yield vlm


@pytest.fixture
def vlm(opened: GuidedVLM) -> GuidedVLM:
    opened.forget()
    return opened


@pytest.fixture(scope="module")
def fresh(pair: TinyPair) -> Iterator[GuidedVLM]:
    """One that keeps nothing."""
    with open_vlm(pair, n_ctx=512, prefix_cells=0, image_cache_bytes=0) as vlm:
        yield vlm


@pytest.fixture
def encoded(vlm: GuidedVLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The token counts of all images that are encoded from here on."""
    counts: list[int] = []
    embed = vlm.projector._embed

    def spy(image: Any) -> Any:
        counts.append(image.n_tokens)
        return embed(image)

    monkeypatch.setattr(vlm.projector, "_embed", spy)
    return counts


def ask(vlm: GuidedVLM, *arguments: Any, **settings: Any) -> Reply:
    return vlm.generate(*arguments, **{"guidance": STRONG, "max_tokens": 12, **settings})


# --- what is found -----------------------------------------------------------------------------


def test_a_second_question_computes_neither_image_nor_what_stands_before_it(
    vlm: GuidedVLM, fresh: GuidedVLM, encoded: list[int]
) -> None:
    first, second = (ask(vlm, question, [picture(0)]) for question in (QUESTION, OTHER))
    assert first.n_reused_tokens == 0
    assert second.n_reused_tokens > N_IMAGE_TOKENS
    assert encoded == [N_IMAGE_TOKENS]
    assert ids(second) == ids(ask(fresh, OTHER, [picture(0)]))


def test_a_plain_answer_then_a_guided_one_share_the_image(
    vlm: GuidedVLM, fresh: GuidedVLM, encoded: list[int]
) -> None:
    plain = ask(vlm, QUESTION, [picture(0)], guidance=PLAIN)
    guided = ask(vlm, QUESTION, [picture(0)])
    assert guided.n_reused_tokens > N_IMAGE_TOKENS
    assert encoded == [N_IMAGE_TOKENS]
    assert ids(plain) != ids(guided) == ids(ask(fresh, QUESTION, [picture(0)]))


def test_a_conversation_computes_only_what_is_new(vlm: GuidedVLM, fresh: GuidedVLM) -> None:
    messages, n_before = [user(picture(0), QUESTION)], 0
    for i in range(4):
        reply = ask(vlm, messages)
        assert ids(reply) == ids(ask(fresh, messages))
        assert reply.n_reused_tokens >= n_before
        n_before = reply.n_prompt_tokens - 2  # the answer need not be cut into the same tokens
        messages += [{"role": "assistant", "content": reply.text}, user(f"{i}. {OTHER}")]


@pytest.mark.parametrize("where", [(0, 0, 0), (55, 55, 2), (20, 31, 1)])
def test_one_pixel_more_or_less_is_another_image(
    vlm: GuidedVLM, fresh: GuidedVLM, encoded: list[int], where: tuple[int, int, int]
) -> None:
    changed = picture(0)
    changed[where] ^= 1
    replies = [ask(vlm, QUESTION, [pixels]) for pixels in (picture(0), changed, picture(0))]
    n_before_image = replies[1].n_reused_tokens
    assert n_before_image < replies[0].n_prompt_tokens - N_IMAGE_TOKENS
    assert encoded == [N_IMAGE_TOKENS] * 2
    assert ids(replies[1]) == ids(ask(fresh, QUESTION, [changed]))
    assert replies[2].n_reused_tokens > N_IMAGE_TOKENS


def test_the_same_pixels_in_another_shape_are_another_image(vlm: GuidedVLM) -> None:
    wide = np.zeros((28, 112, 3), np.uint8)
    for pixels in (wide, wide.reshape(56, 56, 3), wide.reshape(112, 28, 3)):
        assert ask(vlm, QUESTION, [pixels]).n_reused_tokens < N_IMAGE_TOKENS


def test_the_image_behind_another_instruction_is_computed_anew(
    vlm: GuidedVLM, fresh: GuidedVLM, encoded: list[int]
) -> None:
    systems = ["A curious human.", "A curious child."]
    chats = [[{"role": "system", "content": s}, user(picture(0), QUESTION)] for s in systems]
    replies = [ask(vlm, messages) for messages in chats]
    assert 0 < replies[1].n_reused_tokens < 6
    assert encoded == [N_IMAGE_TOKENS]  # its embedding is the same wherever it stands
    assert ids(replies[1]) == ids(ask(fresh, chats[1]))


def test_two_images_by_turns_are_both_kept(
    vlm: GuidedVLM, fresh: GuidedVLM, encoded: list[int]
) -> None:
    for i in range(6):
        reply = ask(vlm, f"{i}. {QUESTION}", [picture(i % 2)])
        assert (reply.n_reused_tokens > N_IMAGE_TOKENS) == (i > 1)
        assert ids(reply) == ids(ask(fresh, f"{i}. {QUESTION}", [picture(i % 2)]))
    assert len(encoded) == 2


def test_an_image_whose_cells_are_gone_is_not_encoded_again(
    vlm: GuidedVLM, encoded: list[int]
) -> None:
    first = ask(vlm, QUESTION, [picture(0), picture(0)])
    vlm.engine.prefixes.forget()
    second = ask(vlm, QUESTION, [picture(0), picture(0)])
    assert second.n_reused_tokens == 0
    assert encoded == [N_IMAGE_TOKENS]
    assert ids(first) == ids(second)


def test_many_requests_to_one_model_are_answered_as_by_one_that_keeps_nothing(
    vlm: GuidedVLM, fresh: GuidedVLM
) -> None:
    rng, n_reused = np.random.default_rng(3), 0
    guidances = [STRONG, Guidance(tokens=TopRatio(1.0), scope="all", refresh="prompt"), PLAIN]

    def turn() -> dict[str, Any]:
        parts: list[str | NDArray[np.uint8]] = [picture(int(rng.integers(3)))] * int(
            rng.integers(3)
        )
        return user(*parts, [QUESTION, OTHER][int(rng.integers(2))])

    for _ in range(80):
        messages = [turn()]
        for _ in range(int(rng.integers(0, 3))):
            messages += [{"role": "assistant", "content": "No."}, turn()]
        guidance = guidances[int(rng.integers(3))]
        stream = vlm.stream(messages, guidance=guidance, max_tokens=10)
        for i, _ in enumerate(stream):
            if i == 3 and rng.random() < 0.3:
                stream.close()
        if stream._run.reply is not None:
            n_reused += stream.reply.n_reused_tokens
            assert ids(stream.reply) == ids(
                fresh.generate(messages, guidance=guidance, max_tokens=10)
            )
    assert n_reused > 300


# --- what is not kept --------------------------------------------------------------------------


class ToldError(Exception):
    pass


@pytest.mark.parametrize("phase", ["encode", "prefill"])
def test_a_request_that_is_stopped_before_its_answer_leaves_nothing_wrong_behind(
    vlm: GuidedVLM, phase: str
) -> None:
    def stop(at: str, done: int, total: int) -> None:
        if at == phase and done == total:
            raise ToldError

    with pytest.raises(ToldError):
        ask(vlm, QUESTION, [picture(0)], progress=stop)
    assert is_empty(vlm)
    # The prompt is kept if it was decoded before the callback had its say.
    answer = ids(ask(vlm, QUESTION, [picture(0)]))
    vlm.forget()
    assert answer == ids(ask(vlm, QUESTION, [picture(0)]))


def test_an_answer_that_breaks_off_is_kept_up_to_there(vlm: GuidedVLM, fresh: GuidedVLM) -> None:
    stream = vlm.stream([user(picture(0), QUESTION)], guidance=STRONG)
    for _ in range(5):
        next(stream)
    stream.close()
    messages = [user(picture(0), QUESTION), {"role": "assistant", "content": stream.text}]
    messages.append(user(OTHER))
    reply = ask(vlm, messages)
    assert reply.n_reused_tokens > N_IMAGE_TOKENS + 10
    assert ids(reply) == ids(ask(fresh, messages))


def test_what_an_open_stream_holds_serves_another_request(vlm: GuidedVLM) -> None:
    alone = ids(ask(vlm, QUESTION, [picture(0)]))
    vlm.forget()
    stream = vlm.stream(QUESTION, [picture(0)], guidance=STRONG, max_tokens=len(alone))
    next(stream)
    assert ask(vlm, OTHER, [picture(0)]).n_reused_tokens > N_IMAGE_TOKENS
    list(stream)
    assert ids(stream.reply) == alone


def test_an_error_in_a_step_keeps_nothing_of_its_answer(
    vlm: GuidedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = vlm.stream(QUESTION, [picture(0)])
    next(stream)
    monkeypatch.setattr(vlm.engine.lanes[0].original.context.patch.__class__, "end", _fail)
    with pytest.raises(BackendError, match="told to fail"):
        list(stream)
    assert vlm.engine.prefixes.n_prefixes == 0
    assert is_empty(vlm)


def _fail(patch: object) -> None:
    raise RuntimeError("told to fail")


def test_to_forget_is_to_hold_nothing(vlm: GuidedVLM) -> None:
    for seed in range(3):
        ask(vlm, QUESTION, [picture(seed)])
    stream = vlm.stream(QUESTION, [picture(3)])
    next(stream)
    assert vlm.engine.prefixes.n_prefixes >= 3
    assert vlm.projector.embeddings.n_bytes > 0
    vlm.forget()
    stream.close()
    vlm.forget()
    context: Any = vlm.engine.lanes[0].original.context
    assert not any(held(context, seq) for seq in range(context.n_seq_max))
    assert vlm.engine.prefixes.n_prefixes == vlm.projector.embeddings.n_bytes == 0
    assert ask(vlm, QUESTION, [picture(0)]).n_reused_tokens == 0


def test_a_salt_is_forgotten_alone(vlm: GuidedVLM) -> None:
    def reused(salt: str | None, question: str = OTHER) -> bool:
        return ask(vlm, question, [picture(0)], salt=salt).n_reused_tokens > N_IMAGE_TOKENS

    for salt in ("a", "b", None):
        assert not reused(salt, QUESTION)
    vlm.engine.forget("a")
    assert [reused("b"), reused(None), reused("a")] == [True, True, False]
    vlm.engine.forget("a of b")
    assert [reused("a"), reused("b"), reused(None)] == [True, True, True]


# --- settings ----------------------------------------------------------------------------------


def test_prefix_cells_bound_what_is_kept(pair: TinyPair) -> None:
    for prefix_cells, expected in ((None, 128), (60, 60), (256, 256)):
        with open_vlm(pair, prefix_cells=prefix_cells) as vlm:
            for seed in range(8):
                ask(vlm, QUESTION, [picture(seed)])
            assert expected / 2 < vlm.engine.prefixes.n_cells <= expected


@pytest.mark.parametrize("strategy", [EAGER, EXACT, AUTO], ids=["eager", "exact", "auto"])
def test_a_cache_full_of_kept_prompts_serves_the_first_guided_question(
    pair: TinyPair, strategy: Strategy
) -> None:
    """Graphs are surveyed then, which takes two cells."""
    with open_vlm(pair, prefix_cells=256) as vlm:
        vlm.engine.strategy = strategy
        ask(vlm, QUESTION, [picture(0)], guidance=PLAIN, max_tokens=None)
        assert vlm.engine.prefixes.n_cells == vlm.n_ctx == 256
        reply = ask(vlm, OTHER, [picture(0)], max_tokens=3)
        assert len(reply.tokens) == 3
        assert reply.n_reused_tokens > N_IMAGE_TOKENS or strategy.fork
        assert ask(vlm, OTHER, [picture(0)], max_tokens=3).tokens == reply.tokens


def test_without_prefix_cells_nothing_is_kept_nor_made_room_for(fresh: GuidedVLM) -> None:
    for _ in range(2):
        assert ask(fresh, QUESTION, [picture(0)]).n_reused_tokens == 0
    assert cast(Any, fresh.engine.lanes[0].original.context).n_seq_max == 2 * 4 + 1
    assert fresh.projector.embeddings.n_bytes == 0


@pytest.mark.parametrize("prefix_cells", [-1, 257])
def test_prefix_cells_out_of_range_are_refused(pair: TinyPair, prefix_cells: int) -> None:
    with pytest.raises(UnsupportedError, match=f"prefix_cells={prefix_cells} .* 0 to 256"):
        open_vlm(pair, prefix_cells=prefix_cells)


def test_models_with_windows_and_two_contexts_keep_prompts_too(
    gemma_pair: TinyPair, pair: TinyPair
) -> None:
    for files, settings in ((gemma_pair, {}), (pair, {"pairing": "contexts"})):
        with (
            open_vlm(files, **settings) as vlm,
            open_vlm(files, **settings, prefix_cells=0) as fresh,
        ):
            replies = [ask(vlm, question, [picture(0)]) for question in (QUESTION, OTHER)]
            assert replies[1].n_reused_tokens > N_IMAGE_TOKENS
            assert ids(replies[1]) == ids(ask(fresh, OTHER, [picture(0)]))


def test_a_completion_counts_cached_tokens_as_openai_does(vlm: GuidedVLM) -> None:
    usages = []
    for stream in (False, True):
        answer: Any = vlm.create_chat_completion(asked(), max_tokens=3, stream=stream)
        usages.append(list(answer)[-1]["usage"] if stream else answer["usage"])
    assert usages[0]["prompt_tokens_details"] == {"cached_tokens": 0}
    n = usages[1]["prompt_tokens"] - 1
    assert usages[1]["prompt_tokens_details"] == {"cached_tokens": n}


def test_a_handler_keeps_prompts_and_can_be_told_not_to(pair: TinyPair) -> None:
    for prefix_cells in (None, 0):
        handler = CMGChatHandler(pair.mmproj, prefix_cells=prefix_cells, use_gpu=False)
        llm = open_llama(
            pair.llm, n_ctx=256, n_gpu_layers=N_GPU_LAYERS, verbose=False, chat_handler=handler
        )
        for _ in range(2):
            reply: Any = llm.create_chat_completion(asked(), max_tokens=2)
        cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert (cached > N_IMAGE_TOKENS) == (prefix_cells is None)
        llm.close()


# --- encoded images ----------------------------------------------------------------------------


def rows(n: int) -> NDArray[np.float32]:
    return np.full((n, 4), n, np.float32)


def test_embeddings_are_kept_up_to_their_bytes_the_latest_used() -> None:
    kept = Embeddings(max_bytes=6 * 16)
    for n in (1, 2, 3):
        kept.put(n, rows(n))
    assert kept.get(1) is not None
    kept.put(4, rows(2))
    assert [kept.get(key) is not None for key in (1, 2, 3, 4)] == [True, False, True, True]
    assert kept.n_bytes == 6 * 16
    kept.put(5, rows(7))
    assert kept.get(5) is None
    kept.put(1, rows(2))
    assert kept.n_bytes <= 6 * 16
    kept.clear()
    assert (kept.get(1), kept.n_bytes) == (None, 0)


def test_embeddings_without_a_key_are_not_kept_and_kept_ones_cannot_be_changed() -> None:
    kept = Embeddings(max_bytes=1000)
    kept.put(None, rows(1))
    assert kept.get(None) is None
    kept.put("a", rows(1))
    got = kept.get("a")
    assert got is not None
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 0
