"""Who ends whom: streams, models and callbacks, in any order, leave nothing behind."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import llama_cpp
import psutil
import pytest
from benchmarks.plain_llama import open_llama
from guided import QUESTION, asked, ids, is_empty, open_vlm
from offload import N_GPU_LAYERS
from patience import PATIENCE, in_time
from prompts import picture
from tiny_llava import TinyPair

from cmg_gguf import (
    BackendError,
    CMGChatHandler,
    GuidedVLM,
    ImageError,
    ModelError,
    Sampling,
    Stream,
)
from cmg_gguf.answer.weighing import Weighing
from cmg_gguf.evidence import UNFITTED


@pytest.fixture(scope="module")
def vlm(pair: TinyPair) -> Iterator[GuidedVLM]:
    with open_vlm(pair) as opened:
        yield opened


@pytest.fixture
def without_gc() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def answer(vlm: GuidedVLM, seed: int = 0, **settings: Any) -> list[int]:
    return ids(vlm.generate(QUESTION, [picture(seed)], max_tokens=12, **settings))


def begun(vlm: GuidedVLM, seed: int = 0, n_pieces: int = 3) -> Stream:
    """A stream that takes its time."""

    def slow(tokens: Any, logits: Any) -> Any:
        time.sleep(0.005)
        return logits

    stream = vlm.stream(QUESTION, [picture(seed)], logits_processors=[slow])
    for _ in range(n_pieces):
        next(stream)
    return stream


def all_gone(watched: list[weakref.ref[Any]], *, collecting: bool = False) -> bool:
    """Whether none is left, as soon as the thread that made answers has ended."""
    for _ in range(500):
        if collecting:
            gc.collect()
        if all(watch() is None for watch in watched):
            return True
        time.sleep(0.01)
    return False


def chunk_stream(vlm: GuidedVLM) -> Iterator[dict[str, Any]]:
    return cast(Iterator[dict[str, Any]], vlm.create_chat_completion(asked(), stream=True))


# --- streams -----------------------------------------------------------------------------------


def test_an_answer_goes_on_whether_it_is_read_or_not(vlm: GuidedVLM) -> None:
    expected = answer(vlm)
    stream = vlm.stream(QUESTION, [picture(0)], max_tokens=12)
    for _ in range(500):
        with contextlib.suppress(BackendError):
            assert ids(stream.reply) == expected
            break
        time.sleep(0.01)
    assert stream.text == ""
    assert "".join(piece.text for piece in stream) == stream.text == stream.reply.text


def test_a_finished_answer_leaves_the_cache_empty(vlm: GuidedVLM) -> None:
    answer(vlm)
    assert is_empty(vlm)


def test_a_stream_that_is_not_read_holds_up_nobody(vlm: GuidedVLM) -> None:
    expected = [answer(vlm, seed) for seed in range(3)]
    streams = [vlm.stream(QUESTION, [picture(s)], max_tokens=12) for s in (0, 1, 2) for _ in "abcd"]
    assert answer(vlm, 1) == expected[1]
    for i, stream in enumerate(reversed(streams)):
        list(stream)
        assert ids(stream.reply) == expected[2 - i // 4]


def test_one_stream_ends_and_the_other_goes_on(vlm: GuidedVLM) -> None:
    expected = answer(vlm, 1)
    older = begun(vlm)
    newer = vlm.stream(QUESTION, [picture(1)], max_tokens=12)
    said = [token.id for token in next(newer).tokens]
    older.close()
    del older
    gc.collect()
    said += [token.id for piece in newer for token in piece.tokens]
    assert said == ids(newer.reply) == expected


def test_what_was_read_before_the_end_stays(vlm: GuidedVLM) -> None:
    stream = begun(vlm)
    said = stream.text
    stream.close()
    assert stream.text == said != ""
    with pytest.raises(BackendError, match="not finished"):
        _ = stream.reply


@pytest.mark.parametrize("n_pieces", [0, 1, 5])
def test_a_closed_stream_frees_its_cells_and_is_at_its_end(vlm: GuidedVLM, n_pieces: int) -> None:
    stream = begun(vlm, n_pieces=n_pieces)
    stream.close()
    stream.close()
    assert is_empty(vlm)
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.usefixtures("without_gc")
def test_a_dropped_stream_frees_its_cells_before_the_next_token(
    vlm: GuidedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes: list[object] = []
    decode = vlm.engine.decode

    def counted(rows: Any) -> Any:
        decodes.append(rows)
        return decode(rows)

    monkeypatch.setattr(vlm.engine, "decode", counted)
    stream = vlm.stream(QUESTION, [picture(0)])
    next(stream)
    del stream
    n_decodes = len(decodes)
    assert is_empty(vlm)
    assert len(decodes) <= n_decodes + 2


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("how", ["close", "drop"])
def test_so_does_a_chat_completion_that_is_not_read_to_its_end(vlm: GuidedVLM, how: str) -> None:
    stream: Any = chunk_stream(vlm)
    next(stream)
    next(stream)
    if how == "close":
        stream.close()
    else:
        del stream
    assert is_empty(vlm)


def test_an_answer_ends_where_what_was_kept_for_it_cannot_be_let_go(
    vlm: GuidedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file on a full disk. It is an answer all the same, and the error is told."""
    told: list[object] = []
    close = Weighing.close

    def full(weighing: Weighing) -> None:
        close(weighing)
        raise OSError("no space left")

    monkeypatch.setattr(Weighing, "close", full)
    monkeypatch.setattr(threading, "excepthook", lambda crash: told.append(crash.exc_value))
    said = in_time(lambda: answer(vlm, evidence=UNFITTED))
    assert isinstance(said, list)
    assert len(said) == 12
    (told_of,) = told
    assert isinstance(told_of, OSError)


def test_threads_get_their_own_answers_and_errors(vlm: GuidedVLM) -> None:
    """Eight threads ask 25 times each, and every fifth time something that fails."""
    n_threads, n_asked = 8, 25
    expected = {seed: answer(vlm, seed) for seed in range(4)}
    process = psutil.Process()
    right: Counter[str] = Counter()
    wrong: list[object] = []

    def ask(thread: int) -> None:
        for i in range(n_asked):
            seed = (thread + i) % 4
            try:
                if i % 5 < 4:
                    got = answer(vlm, seed)
                    right["answers"] += got == expected[seed]
                elif (thread + i) % 2:
                    vlm.generate("", [b"no picture"])
                else:
                    vlm.generate(QUESTION, [picture(seed)], logits_processors=[broken])
            except ImageError:
                right["pictures"] += 1
            except ZeroDivisionError:
                right["processors"] += 1
            except Exception as exc:
                wrong.append(exc)

    def run() -> None:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(n_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run()
    right.clear()
    before = process.memory_info().rss
    run()
    assert wrong == []
    assert right == {"answers": 160, "pictures": 20, "processors": 20}
    assert process.memory_info().rss - before < 8 * 2**20
    assert is_empty(vlm)
    assert answer(vlm, 2) == expected[2]


def broken(tokens: Any, logits: Any) -> Any:
    raise ZeroDivisionError


def test_progress_is_told_before_an_answer_that_says_nothing_ends(vlm: GuidedVLM) -> None:
    vlm.forget()
    told: list[str] = []

    def slow(phase: str, done: int, total: int) -> None:
        time.sleep(0.02)
        told.append(phase)

    nothing = Sampling(grammar='root ::= ""')
    assert list(vlm.stream(QUESTION, [picture(0)], sampling=nothing, progress=slow)) == []
    assert told[0] == "encode"
    assert told[-1] == "prefill"


def test_behind_the_end_that_was_heard_an_answer_that_said_nothing_is_at_its_end(
    vlm: GuidedVLM,
) -> None:
    """Its progress was told, and nobody has looked."""
    over = threading.Event()

    def heard(is_over: bool) -> None:
        if is_over:
            over.set()

    nothing = Sampling(grammar='root ::= ""')
    stream = vlm.stream(QUESTION, [picture(0)], sampling=nothing, heard=heard)
    assert over.wait(PATIENCE)
    assert [stream.ready(), stream.ready()] == [None, None]
    over.clear()
    stream = vlm.stream(QUESTION, [picture(0)], logits_processors=[broken], heard=heard)
    assert over.wait(PATIENCE)
    with pytest.raises(ZeroDivisionError):
        stream.ready()
    assert stream.ready() is None


@pytest.mark.parametrize("phase", ["encode", "prefill"])
def test_a_progress_callback_may_wait_for_another_thread_that_asks(
    vlm: GuidedVLM, phase: str
) -> None:
    expected, others = {seed: answer(vlm, seed) for seed in (0, 1)}, []
    vlm.forget()

    def progress(at: str, done: int, total: int) -> None:
        if at == phase and done == total:
            thread = threading.Thread(target=lambda: others.append(answer(vlm, 1)))
            thread.start()
            thread.join()

    assert answer(vlm, 0, progress=progress) == expected[0]
    assert others == [expected[1]]


# --- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda vlm: vlm.generate(QUESTION),
        lambda vlm: vlm.stream(QUESTION, [picture(0)]),
        lambda vlm: vlm.create_chat_completion(asked()),
        lambda vlm: vlm.heat(QUESTION, [picture(0)], answer="Yes."),
        lambda vlm: vlm.tokenize(QUESTION, [picture(0)]),
        lambda vlm: vlm.forget(),
        lambda vlm: vlm.model.tokenize("Yes."),
        lambda vlm: vlm.model.token_bytes(300),
        lambda vlm: vlm.model.describe(),
        lambda vlm: vlm.model.is_end(2),
        lambda vlm: vlm.projector.tokenize(QUESTION, []),
        lambda vlm: vlm.projector.pieces_of(32, 32),
        lambda vlm: vlm.projector.views(40, 40),
    ],
)
def test_a_closed_model_says_so(pair: TinyPair, use: Callable[[GuidedVLM], object]) -> None:
    vlm = open_vlm(pair)
    answer(vlm)
    vlm.close()
    vlm.close()
    with pytest.raises(ModelError, match=r"closed; (make a new one|open)"):
        use(vlm)


def test_what_needs_the_vocabulary_says_so_behind_the_end_of_its_model(pair: TinyPair) -> None:
    vlm = open_vlm(pair)
    settings: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_tokens": 9}
    chunks = iter(vlm.create_chat_completion(asked(), stream=True, **settings))
    assert vlm.generate(QUESTION, max_tokens=1, repeatable=True).tokens
    vlm.close()
    assert next(chunks)
    with pytest.raises(ModelError, match="closed"):
        next(chunks)


def test_a_context_manager_closes_its_model(pair: TinyPair) -> None:
    with open_vlm(pair) as vlm:
        answer(vlm)
    with pytest.raises(ModelError, match="closed"):
        answer(vlm)


@pytest.mark.parametrize("n_pieces", [0, 3])
def test_closing_the_model_ends_its_streams(pair: TinyPair, n_pieces: int) -> None:
    vlm = open_vlm(pair)
    stream = begun(vlm, n_pieces=n_pieces)
    vlm.close()
    with pytest.raises(ModelError, match="closed"):
        next(stream)
    stream.close()


@pytest.mark.parametrize("where", ["encode", "prefill", "processor"])
def test_a_callback_may_close_the_model_under_the_answer(pair: TinyPair, where: str) -> None:
    vlm = open_vlm(pair)

    def progress(phase: str, done: int, total: int) -> None:
        if phase == where:
            vlm.close()

    def processor(tokens: Any, logits: Any) -> Any:
        if where == "processor" and len(tokens) == 2:
            vlm.close()
        return logits

    with pytest.raises(ModelError, match="closed"):
        vlm.generate(QUESTION, [picture(0)], progress=progress, logits_processors=[processor])


@pytest.mark.parametrize("where", ["encode", "prefill", "processor"])
def test_a_callback_may_ask_the_model_something_else(vlm: GuidedVLM, where: str) -> None:
    expected, others = answer(vlm, 1), []

    def progress(phase: str, done: int, total: int) -> None:
        if phase == where:
            others.append(answer(vlm, 1))

    def processor(tokens: Any, logits: Any) -> Any:
        if where == "processor" and len(tokens) == 2:
            others.append(answer(vlm, 1))
        return logits

    vlm.forget()
    own = answer(vlm, 0)
    vlm.forget()
    assert answer(vlm, 0, progress=progress, logits_processors=[processor]) == own
    assert len(others) >= 1
    assert all(other == expected for other in others)
    assert is_empty(vlm)
    assert answer(vlm, 1) == expected


def test_a_callback_may_close_the_model_under_another_thread_that_forgets(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = open_vlm(pair)
    lock, waits = vlm.engine.lock, threading.Event()
    forgetting = threading.Thread(target=lambda: in_time(vlm.forget), daemon=True)

    class Watched:
        """The engine's lock: tells who is about to wait for it."""

        def __enter__(self) -> None:
            if not lock.acquire(blocking=False):
                waits.set()
                lock.acquire()

        def __exit__(self, *exc: object) -> None:
            lock.release()

    def processor(tokens: Any, logits: Any) -> Any:
        if len(tokens) == 2:
            forgetting.start()
            assert waits.wait(PATIENCE)
            vlm.close()
        return logits

    monkeypatch.setattr(vlm.engine, "lock", Watched())
    asked_for = in_time(lambda: vlm.generate(QUESTION, [picture(0)], logits_processors=[processor]))
    assert isinstance(asked_for, ModelError)
    forgetting.join(PATIENCE)
    assert not forgetting.is_alive()


@pytest.mark.usefixtures("without_gc")
def test_a_dropped_model_is_freed_at_once(pair: TinyPair) -> None:
    vlm = open_vlm(pair)
    answer(vlm)
    watched = [weakref.ref(o) for o in (vlm, vlm.model, vlm.projector, *vlm._pair.contexts)]
    del vlm
    assert all_gone(watched)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_the_load_progress_raises_ends_loading_and_arrives(
    pair: TinyPair, error: type[BaseException]
) -> None:
    def fail(phase: str, done: int, total: int) -> None:
        raise error("told to")

    with pytest.raises(error, match="told to"):
        open_vlm(pair, progress=fail)


def test_loading_reports_up_to_a_hundred_percent(pair: TinyPair) -> None:
    reports: list[tuple[str, int, int]] = []
    open_vlm(pair, progress=lambda *report: reports.append(report)).close()
    assert {phase for phase, _, _ in reports} == {"load"}
    done = [share for _, share, _ in reports]
    assert done == sorted(done)
    assert (done[-1], reports[-1][2]) == (100, 100)


def test_an_answer_reports_image_tokens_and_rows(vlm: GuidedVLM) -> None:
    reports: list[tuple[str, int, int]] = []
    vlm.forget()
    vlm.generate(
        QUESTION,
        [picture(0), picture(1)],
        max_tokens=1,
        progress=lambda *report: reports.append(report),
    )
    assert [report for report in reports if report[0] == "encode"] == [
        ("encode", 16, 32),
        ("encode", 32, 32),
    ]
    rows = [report[1:] for report in reports if report[0] == "prefill"]
    assert [done for done, _ in rows] == sorted(done for done, _ in rows)
    assert rows[-1][0] == rows[-1][1] == {total for _, total in rows}.pop()


# --- models of a Llama -------------------------------------------------------------------------


def open_on(pair: TinyPair, **settings: Any) -> llama_cpp.Llama:
    return open_llama(
        pair.llm, n_ctx=256, n_threads=1, n_gpu_layers=N_GPU_LAYERS, verbose=False, **settings
    )


def test_closing_a_llama_closes_the_guided_model_made_of_it(pair: TinyPair) -> None:
    llm = open_on(pair)
    vlm = GuidedVLM.from_llama(llm, pair.mmproj, use_gpu=False)
    stream = begun(vlm)
    llm.close()
    with pytest.raises(ModelError, match="closed"):
        next(stream)
    with pytest.raises(ModelError, match="closed"):
        answer(vlm)


def test_a_guided_model_keeps_its_llama_alive(pair: TinyPair) -> None:
    vlm = GuidedVLM.from_llama(open_on(pair), pair.mmproj, use_gpu=False)
    gc.collect()
    assert len(answer(vlm)) == 12


def test_a_llama_with_a_handler_can_be_forgotten(pair: TinyPair) -> None:
    llm = open_on(pair, chat_handler=CMGChatHandler(pair.mmproj, use_gpu=False))
    llm.create_chat_completion(asked(), max_tokens=2)
    handler = cast(CMGChatHandler, llm.chat_handler)
    watched = [weakref.ref(llm), weakref.ref(handler.vlm(llm)), weakref.ref(handler)]
    del llm, handler
    assert all_gone(watched, collecting=True)


def test_a_handler_that_is_kept_lets_its_llama_go_and_is_not_kept_by_it(pair: TinyPair) -> None:
    handler, other = (CMGChatHandler(pair.mmproj, use_gpu=False) for _ in range(2))
    llm = open_on(pair)
    assert other.vlm(llm) is not handler.vlm(llm)
    without_handler: list[weakref.ref[Any]] = [weakref.ref(handler.vlm(llm)), weakref.ref(handler)]
    del handler
    assert all_gone(without_handler, collecting=True)
    without_llama: list[weakref.ref[Any]] = [weakref.ref(other.vlm(llm)), weakref.ref(llm)]
    del llm
    assert all_gone(without_llama, collecting=True)
    assert len(other._vlms) == 0


@pytest.mark.parametrize("how", ["from_llama", "handler", "kept handler"])
def test_what_is_made_from_the_weights_of_a_llama_is_freed_before_them(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    kept = None if how == "from_llama" else CMGChatHandler(pair.mmproj, use_gpu=False)
    llm = open_on(pair, chat_handler=kept)
    vlm = kept.vlm(llm) if kept else GuidedVLM.from_llama(llm, pair.mmproj, use_gpu=False)
    contexts: Any = [lane.original.context for lane in vlm.engine.lanes]
    made = [part._owned for part in (vlm.projector, *contexts)]
    freed = []
    free = llama_cpp.llama_cpp.llama_model_free

    def freeing(model: Any) -> None:
        freed.append([bool(one) for one in made])
        free(model)

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_free", freeing)
    if how != "kept handler":
        kept = None
    del llm, vlm, contexts
    gc.collect()
    assert freed == [[False] * len(made)]


def test_threads_that_ask_a_llama_first_have_one_model_made_of_it(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_llama(*given: Any, **options: Any) -> GuidedVLM:
        made.append(threading.current_thread())
        if len(made) == 1:  # another asks meanwhile: it comes in here, or waits
            other.start()
            other.join(0.2)
        return original(*given, **options)

    original, made = GuidedVLM.from_llama, list[threading.Thread]()
    monkeypatch.setattr(GuidedVLM, "from_llama", from_llama)
    handler, got = CMGChatHandler(pair.mmproj, use_gpu=False), list[GuidedVLM]()
    llm = open_on(pair)
    other = threading.Thread(target=lambda: got.append(handler.vlm(llm)))
    got.append(handler.vlm(llm))
    other.join(PATIENCE)
    assert got[0] is got[1]
    assert len(made) == 1
    llm.close()


def test_a_handler_serves_several_llamas_and_forgets_those_that_are_gone(pair: TinyPair) -> None:
    handler = CMGChatHandler(pair.mmproj, use_gpu=False)
    first, second = (open_on(pair, chat_handler=handler) for _ in range(2))
    assert handler.vlm(first) is handler.vlm(first) is not handler.vlm(second)
    assert first.create_chat_completion(asked(), max_tokens=2)
    first.close()
    with pytest.raises(ModelError, match="closed"):
        first.create_chat_completion(asked(), max_tokens=2)
    assert second.create_chat_completion(asked(), max_tokens=2)
    second.close()
