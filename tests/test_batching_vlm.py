"""Many requests of a `GuidedVLM` at once: each gets the answer that it gets alone."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import psutil
import pytest
from guided import QUESTION, ids, is_empty, open_vlm
from patience import PATIENCE, in_time
from prompts import picture
from tiny_llava import TinyConfig, TinyPair

from cmg_gguf import (
    AttentionMass,
    Contrast,
    CumulativeMass,
    Guidance,
    GuidedVLM,
    ImageError,
    LayerSet,
    ModelError,
    Request,
    Sampling,
    Stream,
    TopRatio,
)
from cmg_gguf.guidance import PLAIN
from cmg_gguf.llama.context import LlamaContext
from cmg_gguf.llama.model import Model
from cmg_gguf.stream import Run

OTHER = "How many people are there?"
LONG = "Please describe the photo, and say how many people, dogs and red cars there are in it."
MOST = 24
"""Tokens of the longest answers."""


# --- the same answers ----------------------------------------------------------------------------


def pool() -> list[Request]:
    """Requests of all kinds: guided, plain, contrasted, with no picture and with up to three."""
    strong = Guidance(alpha=2.0, tokens=TopRatio(1.0))
    guided = [
        Guidance(),
        strong,
        Guidance(scope="all", refresh="prompt"),
        Guidance(layers=AttentionMass(0.5), scope="decode"),
        Guidance(layers=LayerSet((1, 4)), tokens=CumulativeMass(0.5), beta=0.0),
        PLAIN,
    ]
    requests = [
        Request(question, [picture(seed)], guidance=guidance)
        for seed, question in enumerate((QUESTION, OTHER))
        for guidance in guided
    ]
    requests += [Request(LONG, [picture(2), picture(3)], guidance=g) for g in guided[:3]]
    requests += [Request(question) for question in (QUESTION, OTHER, LONG)]
    requests += [
        Request(QUESTION, [picture(0)], guidance=strong, contrast=contrast)
        for contrast in (Contrast(QUESTION), Contrast(QUESTION, [picture(1)]))
    ]
    sampled = Sampling(temperature=0.9, top_p=0.95, repeat_penalty=1.3, seed=7)
    requests.append(Request(QUESTION, [picture(0)], sampling=sampled, guidance=strong))
    requests.append(Request(OTHER, [picture(0), picture(1), picture(2)], guidance=strong))
    return [replace(request, max_tokens=MOST) for request in requests]


Expected: TypeAlias = list[tuple[Request, list[int]]]


@pytest.fixture(scope="module")
def expected(pair: TinyPair) -> Expected:
    """Each request of the pool, and what is said to it where it is alone."""
    with open_vlm(pair, n_parallel=1, prefix_cells=0, strategy="exact") as alone:
        return [(request, ids(alone.generate(request))) for request in pool()]


class Events:
    """How often an answer waited, gave way, and took the cells of a kept prompt."""

    def __init__(self, vlm: GuidedVLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n: Counter[str] = Counter()
        engine, admission = vlm.engine, Run.admission
        make_room = engine.make_room

        def admitted(run: Run) -> Any:
            says = admission(run)
            self.n[says] += 1
            return says

        def made_room(n_more: int = 0) -> bool:
            n_kept = engine.prefixes.n_prefixes
            there_is = make_room(n_more)
            assert engine.n_cells <= vlm.n_ctx or not there_is
            self.n["evicted"] += n_kept - engine.prefixes.n_prefixes
            self.n["gave way"] += not there_is
            return there_is

        monkeypatch.setattr(Run, "admission", admitted)
        monkeypatch.setattr(engine, "make_room", made_room)


def ask_as(way: int, vlm: GuidedVLM, requests: list[Request]) -> list[list[int]]:
    """What is said to each: asked through `generate_many`, from threads, or as streams."""
    said: dict[int, list[int]] = {}
    if way == 0:
        said = {o.index: ids(o.unwrap()) for o in vlm.generate_many(iter(requests))}
    elif way == 1:
        threads = [
            threading.Thread(target=lambda i=i, r=r: said.update({i: ids(vlm.generate(r))}))
            for i, r in enumerate(requests)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        streams = [vlm.stream(request) for request in requests]
        for i in reversed(range(len(streams))):
            told = [token.id for piece in streams[i] for token in piece.tokens]
            assert told == ids(streams[i].reply)
            said[i] = told
    return [said[i] for i in range(len(requests))]


SHAPES = [(2, 256, 256), (3, 256, 60), (5, 256, 128), (8, 256, 100), (8, 1024, 512)]
"""n_parallel, n_ctx, prefix_cells."""


@pytest.mark.slow
@pytest.mark.parametrize(("n_parallel", "n_ctx", "prefix_cells"), SHAPES)
def test_forty_random_schedules_say_what_each_request_alone_says(
    pair: TinyPair,
    expected: Expected,
    monkeypatch: pytest.MonkeyPatch,
    n_parallel: int,
    n_ctx: int,
    prefix_cells: int,
) -> None:
    masked = [(request, said) for request, said in expected if request.contrast is None]
    with open_vlm(pair, n_parallel=n_parallel, n_ctx=n_ctx, prefix_cells=prefix_cells) as vlm:
        events = Events(vlm, monkeypatch)
        assert differences(vlm, masked, 40, seed=n_parallel) == []
        assert is_empty(vlm)
        vlm.forget()
        assert vlm.engine.n_cells == 0
    assert min(events.n["go"], events.n["soon"]) > 0
    if n_ctx == 256:
        assert min(events.n["full"], events.n["evicted"]) > 0
        assert events.n["gave way"] > 0 or n_parallel == 2


@pytest.mark.parametrize("n_ctx", [256, 1024])
def test_so_do_schedules_with_contrasted_answers(
    pair: TinyPair, expected: Expected, n_ctx: int
) -> None:
    contrasted = [(request, said) for request, said in expected if request.contrast is not None]
    with open_vlm(pair, n_parallel=6, n_ctx=n_ctx, prefix_cells=100) as vlm:
        assert differences(vlm, contrasted * 5 + expected[::2], 20, seed=n_ctx) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["windows", "contexts", "exact"])
def test_so_do_other_pairs_and_ways(
    pair: TinyPair, gemma_pair: TinyPair, expected: Expected, kind: str
) -> None:
    files = gemma_pair if kind == "windows" else pair
    settings: dict[str, Any] = {"pairing": "contexts"} if kind == "contexts" else {}
    if kind == "exact":
        settings["strategy"] = "exact"
    asked = [(request, said) for request, said in expected if request.contrast is None]
    if kind == "windows":
        with open_vlm(files, n_parallel=1, prefix_cells=0, strategy="exact") as alone:
            asked = [(request, ids(alone.generate(request))) for request, _ in asked]
    with open_vlm(files, n_parallel=5, prefix_cells=128, **settings) as vlm:
        assert differences(vlm, asked, 12, seed=len(kind)) == []


def test_answers_without_a_limit_say_at_once_what_each_says_alone(pair: TinyPair) -> None:
    """Each of them fills the whole context."""
    requests = [
        Request(QUESTION, [picture(seed)], guidance=guidance)
        for seed in range(2)
        for guidance in (PLAIN, Guidance())
    ]
    with open_vlm(pair, n_parallel=1, prefix_cells=0, strategy="exact") as alone:
        expected = [ids(alone.generate(request)) for request in requests]
    assert max(len(said) for said in expected) > 90
    with open_vlm(pair, n_parallel=4) as vlm:
        said = {o.index: ids(o.unwrap()) for o in vlm.generate_many(requests)}
    assert [said[i] for i in range(4)] == expected


def test_answers_that_grow_beyond_their_share_give_way_and_end_alike(pair: TinyPair) -> None:
    """Room for all shares, and for no two whole answers."""
    requests = [
        Request(QUESTION, [picture(seed)], guidance=Guidance(beta=0.0), max_tokens=70)
        for seed in range(3)
    ]
    with open_vlm(pair, n_parallel=1, prefix_cells=0, strategy="exact") as alone:
        expected = [ids(alone.generate(request)) for request in requests]
    with open_vlm(pair, n_parallel=3) as vlm:
        said = {o.index: ids(o.unwrap()) for o in vlm.generate_many(requests)}
    assert [said[i] for i in range(3)] == expected


def differences(
    vlm: GuidedVLM, expected: Expected, n_schedules: int, seed: int
) -> list[tuple[object, ...]]:
    """What is said otherwise than alone in random schedules of 2 to 8 requests, beside streams that
    are abandoned."""
    rng = np.random.default_rng(seed)
    wrong: list[tuple[object, ...]] = []
    for i in range(n_schedules):
        chosen = rng.integers(0, len(expected), rng.integers(2, 9)).tolist()
        lengths = rng.integers(1, MOST + 1, len(chosen)).tolist()
        abandoned = [vlm.stream(expected[k][0]) for k in rng.integers(0, len(expected), 2)]
        asked = list(zip(chosen, lengths, strict=True))
        requests = [replace(expected[k][0], max_tokens=n) for k, n in asked]
        if i % 2:
            abandoned.pop().close()
        for (k, n), said in zip(asked, ask_as(i % 3, vlm, requests), strict=True):
            if said != expected[k][1][:n]:
                wrong.append((i, k, n, said, expected[k][1][:n]))
        del abandoned
    return wrong


# --- models that fork in one way only ------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["auto", "exact", "approximate"])
def test_experts_answer_many_at_once_as_they_do_alone(
    written: Callable[[TinyConfig], TinyPair], strategy: str
) -> None:
    """Experts let rows enter a fork in a decode of their own, and not behind others."""
    files = written(TinyConfig(n_expert=4))
    requests = [
        Request(QUESTION, [picture(seed)], guidance=guidance, max_tokens=8)
        for seed in range(4)
        for guidance in (Guidance(), PLAIN)
    ]
    with open_vlm(files, n_parallel=1, strategy="exact", prefix_cells=0) as alone:
        expected = [ids(alone.generate(request)) for request in requests]
    with open_vlm(files, n_ctx=1024, n_parallel=8, strategy=strategy) as vlm:
        said = {o.index: ids(o.unwrap()) for o in vlm.generate_many(requests)}
    if strategy == "approximate":  # another method, but for plain answers
        requests, expected = requests[1::2], expected[1::2]
        said = {i: said[2 * i + 1] for i in range(len(requests))}
    assert [said[i] for i in range(len(requests))] == expected


# --- how an answer goes on behind what it has said ------------------------------------------------


SAMPLED = Sampling(temperature=1.2, top_p=0.9, repeat_penalty=1.5, presence_penalty=0.3, seed=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling": SAMPLED},
        {"sampling": Sampling(temperature=1.0, mirostat_mode=2, seed=5)},
        {"sampling": Sampling(grammar='root ::= [a-z ]+ "." [0-9]+')},
        {"top_logprobs": 3, "n_scores": 12},
        {"guidance": PLAIN, "sampling": SAMPLED},
        {"contrast": Contrast(OTHER, [picture(5)], strength=lambda n: 1.0 + n / 8)},
        {"stop": ["zzz"]},
    ],
    ids=["sampled", "mirostat", "grammar", "scores", "plain", "contrast", "stop"],
)
def test_an_answer_that_gave_way_says_what_it_would_have_said(
    pair: TinyPair, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is dropped behind every third decode, and begins again beside another."""
    given = {"guidance": Guidance(alpha=2.0, beta=0.05), "max_tokens": 20, **settings}
    request = Request(QUESTION, [picture(0)], **given)
    with open_vlm(pair, n_parallel=1, strategy="exact", prefix_cells=0) as alone:
        expected = alone.generate(request)
    with open_vlm(pair, n_parallel=2, n_ctx=1024) as vlm:
        rounds = Counter[str]()

        def make_room(n_more: int = 0) -> bool:
            busy = len(vlm.engine.sessions) == 2
            rounds["busy"] += busy
            gives_way = busy and rounds["busy"] % 12 == 11
            rounds["gave way"] += gives_way
            return not gives_way

        monkeypatch.setattr(vlm.engine, "make_room", make_room)
        older = vlm.stream(OTHER, [picture(1)], guidance=PLAIN, max_tokens=300)
        next(older)
        reply = vlm.generate(request)
        older.close()
    assert rounds["gave way"] >= 2
    assert ids(reply) == ids(expected)
    assert reply.text == expected.text
    assert [t.plain for t in reply.tokens] == [t.plain for t in expected.tokens]
    for mine, other in zip(reply.tokens, expected.tokens, strict=True):
        assert (mine.top is None) == (other.top is None)
        if mine.logprob is not None:
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-3)
    np.testing.assert_allclose(reply.scores, expected.scores, atol=1e-3)


# --- how long a running answer waits --------------------------------------------------------------


@pytest.mark.parametrize("n_long", [1, 2])
def test_long_prompts_hold_up_another_answer_by_one_micro_batch_and_one_encoding_at_a_time(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, n_long: int
) -> None:
    """2,900 rows, of pictures and of texts that fill no micro-batch."""
    log: list[tuple[str, int]] = []
    with open_vlm(pair, n_ctx=4096, n_ubatch=64, n_parallel=4, prefix_cells=0) as vlm:
        decode, embed = vlm.engine.decode, vlm.projector._embed

        def decoded(batches: Any) -> Any:
            seqs = {s for b in batches for s in ([b.branch.seq] if b.is_image else b.seqs.tolist())}
            log.append(("runner" if 0 in seqs else "other", sum(b.n_rows for b in batches)))
            return decode(batches)

        def embedded(chunk: Any) -> Any:
            log.append(("encode", 0))
            return embed(chunk)

        monkeypatch.setattr(vlm.engine, "decode", decoded)
        monkeypatch.setattr(vlm.projector, "_embed", embedded)
        runner = vlm.stream(QUESTION, [picture(0)], guidance=Guidance(beta=0.0), max_tokens=700)
        next(runner)
        log.clear()
        requests = [long_request(53 // n_long, first_seed=100 * i) for i in range(n_long)]
        replies = [outcome.unwrap() for outcome in vlm.generate_many(requests)]
        runner.close()
    assert sum(reply.n_prompt_tokens for reply in replies) > 2900
    waits, wait = [], Counter[str]()
    for who, n_rows in log:
        if who == "runner":
            waits.append(wait)
            wait = Counter()
        else:
            wait[who] += 1
            wait["rows"] += n_rows
    assert sum(wait["rows"] for wait in waits) > 2500
    assert max(wait["encode"] for wait in waits) == 1
    assert max(wait["rows"] for wait in waits) <= 64
    assert max(wait["other"] for wait in waits) == 1


def long_request(n_pictures: int, first_seed: int) -> Request:
    """Pictures, each with a text of forty tokens."""
    content: list[Any] = []
    for seed in range(first_seed, first_seed + n_pictures):
        content.append({"type": "image", "image": picture(seed)})
        content.append({"type": "text", "text": "What is there in this photo? " * 5})
    messages = [{"role": "user", "content": content}]
    return Request(messages, guidance=Guidance(scope="decode"), max_tokens=2)


# --- nobody learns from another -------------------------------------------------------------------


def test_requests_of_another_salt_find_neither_prompt_nor_picture(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    with open_vlm(pair, n_ctx=1024, n_parallel=2) as vlm:
        embed = vlm.projector._embed

        def spy(chunk: Any) -> Any:
            encoded.append(chunk.n_tokens)
            return embed(chunk)

        monkeypatch.setattr(vlm.projector, "_embed", spy)
        salts = [None, "a", "b", "", "None", "a of b"]
        said = set()
        for times in (1, 2):
            for i, salt in enumerate(salts):
                n_before = len(encoded)
                reply = vlm.generate(QUESTION, [picture(0)], salt=salt, max_tokens=6)
                said.add(tuple(ids(reply)))
                assert (reply.n_reused_tokens > 0) == (times == 2), (salt, times)
                assert len(encoded) - n_before == (times == 1), (salt, times)
                assert times == 2 or len(encoded) == i + 1
        # At once, too: neither waits for the other's picture.
        vlm.forget()
        encoded.clear()
        requests = [
            Request(question, [picture(0)], salt=salt, max_tokens=6)
            for question in (QUESTION, OTHER)
            for salt in ("a", "b")
        ]
        replies = {o.index: o.unwrap() for o in vlm.generate_many(requests)}
        assert len(encoded) == 2
        assert [replies[i].n_reused_tokens > 0 for i in range(4)] == [False, False, True, True]
    assert len(said) == 1


def test_a_salted_prompt_that_begins_with_a_picture_too_long_to_keep_is_not_kept(
    written: Callable[[TinyConfig], TinyPair],
) -> None:
    files = written(TinyConfig(tokenizer="gpt2"))
    with open_vlm(files, prefix_cells=8, n_parallel=2) as vlm:
        for salt in ("a", "a", "b", None):
            request = Request(
                "<__media__> What is there?", [picture(0)], raw=True, salt=salt, max_tokens=4
            )
            assert vlm.generate(request).n_reused_tokens == 0
            assert vlm.engine.prefixes.n_cells <= 8
        assert is_empty(vlm)


# --- who closes, forgets and fails ----------------------------------------------------------------


@pytest.fixture
def used_when_freed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a model behind its end."""
    used: list[str] = []

    def watched(name: str) -> None:
        method = getattr(Model, name)

        def called(model: Model, token: int) -> Any:
            if not model._owned:
                used.append(name)
                return b"" if name == "token_bytes" else True
            return method(model, token)

        monkeypatch.setattr(Model, name, called)

    for name in ("is_end", "token_bytes"):
        watched(name)
    return used


@pytest.mark.parametrize("closes", range(3))
def test_a_callback_that_closes_the_model_ends_the_answers_of_the_same_decode(
    pair: TinyPair, closes: int, used_when_freed: list[str]
) -> None:
    """Three plain answers share each decode; one closes the model under the others."""
    vlm = open_vlm(pair, n_ctx=1024, n_parallel=4)

    def close(tokens: Any, logits: Any) -> Any:
        all_asked.wait(PATIENCE)
        if len(tokens) == 6:
            vlm.close()
        return logits

    all_asked = threading.Event()
    streams = [
        vlm.stream(
            QUESTION,
            guidance=PLAIN,
            max_tokens=200,
            logits_processors=[close] if i == closes else [],
        )
        for i in range(3)
    ]
    all_asked.set()
    for came in [in_time(partial(list, stream)) for stream in streams]:
        assert isinstance(came, ModelError), came
    assert used_when_freed == []


def test_a_strength_that_closes_the_model_ends_its_answer(
    pair: TinyPair, used_when_freed: list[str]
) -> None:
    vlm = open_vlm(pair)

    def strength(n: int) -> float:
        if n == 3:
            vlm.close()
        return 1.0

    contrast = Contrast(QUESTION, strength=strength)
    came = in_time(lambda: vlm.generate(QUESTION, [picture(0)], contrast=contrast, max_tokens=9))
    assert isinstance(came, ModelError)
    assert used_when_freed == []


def test_closing_does_not_wait_for_an_answer_that_another_asks_for(pair: TinyPair) -> None:
    vlm = open_vlm(pair, n_ctx=4096, n_parallel=3)
    began, inner_tokens = threading.Event(), []

    def noting(tokens: Any, logits: Any) -> Any:
        inner_tokens.append(len(tokens))
        began.set()
        time.sleep(0.01)
        return logits

    def asking(tokens: Any, logits: Any) -> Any:
        if len(tokens) == 2:
            vlm.generate(OTHER, guidance=PLAIN, max_tokens=1500, logits_processors=[noting])
        return logits

    stream = vlm.stream(QUESTION, guidance=PLAIN, max_tokens=9, logits_processors=[asking])
    assert began.wait(PATIENCE)
    vlm.close()
    assert len(inner_tokens) < 20
    assert isinstance(in_time(lambda: list(stream)), ModelError)


def test_an_answer_may_read_a_stream_of_the_same_decode(pair: TinyPair) -> None:
    with open_vlm(pair, n_ctx=1024, n_parallel=4) as vlm:
        expected = [ids(vlm.generate(q, guidance=PLAIN, max_tokens=12)) for q in (QUESTION, OTHER)]
        others: list[Stream] = []

        def reading(tokens: Any, logits: Any) -> Any:
            if len(tokens) == 2:
                list(others[0])
            return logits

        def patient(tokens: Any, logits: Any) -> Any:
            if len(tokens) == 0:
                began.wait(PATIENCE)
            return logits

        began = threading.Event()
        first = vlm.stream(QUESTION, guidance=PLAIN, max_tokens=1, logits_processors=[patient])
        asking = vlm.stream(QUESTION, guidance=PLAIN, max_tokens=12, logits_processors=[reading])
        others.append(vlm.stream(OTHER, guidance=PLAIN, max_tokens=12))
        began.set()
        came = in_time(lambda: list(asking))
        assert not isinstance(came, BaseException), came
        assert [ids(asking.reply), ids(others[0].reply)] == expected
        list(first)


def test_no_two_threads_are_in_a_context_at_once(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's memory is no thread's own: `forget` is called while answers are made."""
    inside: list[str] = []
    met: set[tuple[str, str]] = set()

    def guarded(name: str) -> None:
        method = getattr(LlamaContext, name)

        def called(*arguments: Any, **settings: Any) -> Any:
            met.update((other, name) for other in tuple(inside) if not other.startswith(me()))
            inside.append(f"{me()}: {name}")
            try:
                time.sleep(0.0005)
                return method(*arguments, **settings)
            finally:
                inside.remove(f"{me()}: {name}")

        monkeypatch.setattr(LlamaContext, name, called)

    def me() -> str:
        return f"{threading.get_ident()}"

    for name in ("decode", "decode_image", "share", "share_more", "truncate", "is_whole"):
        guarded(name)
    with open_vlm(pair, n_ctx=512, n_parallel=3) as vlm:
        stop = threading.Event()

        def forget() -> None:
            while not stop.is_set():
                vlm.forget()

        thread = threading.Thread(target=forget)
        thread.start()
        requests = [Request(QUESTION, [picture(i % 3)], max_tokens=6) for i in range(24)]
        try:
            said = {o.index: ids(o.unwrap()) for o in vlm.generate_many(requests)}
        finally:
            stop.set()
            thread.join()
    assert all(said[i] == said[i % 3] for i in said)
    assert met == set()


EXITING = """
import sys
from cmg_gguf import Guidance, GuidedVLM, Request

def asked():
    return vlm.generate_many(Request("What is there?", max_tokens=40) for _ in range(99))

vlm = GuidedVLM(*sys.argv[1:3], n_ctx=2048, n_threads=1, n_gpu_layers=0, n_parallel=4)
streams = [vlm.stream("What is there?", max_tokens=900) for _ in range(6)]
next(streams[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "end", ["pass", "many = asked(); next(many)", "del vlm", "raise SystemExit(0)"]
)
def test_a_program_may_end_while_answers_are_made(pair: TinyPair, end: str) -> None:
    command = [sys.executable, "-c", EXITING + end, str(pair.llm), str(pair.mmproj)]
    folder = pair.llm.parent  # of no package
    done = subprocess.run(command, capture_output=True, timeout=300, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_session_of_the_callers_own_leaves_room_for_answers(pair: TinyPair) -> None:
    """It takes a lane: answers wait for those that are left."""
    with open_vlm(pair, n_ctx=1024, n_parallel=2) as vlm:
        prompt = vlm.projector.encode(vlm.tokenize(QUESTION, [picture(0)]))
        session = vlm.engine.open(prompt, Guidance())
        vlm.engine.prefill(session, prompt)
        requests = [Request(QUESTION, max_tokens=3) for _ in range(4)]
        said = [ids(outcome.unwrap()) for outcome in vlm.generate_many(requests)]
        vlm.engine.step(session, 300)
        vlm.engine.end(session)
    assert len({tuple(tokens) for tokens in said}) == 1


# --- many requests --------------------------------------------------------------------------------


def test_one_bad_request_is_an_outcome_and_stops_nothing(pair: TinyPair) -> None:
    def divide(tokens: Any, logits: Any) -> Any:
        raise ZeroDivisionError

    def wrong_shape(tokens: Any, logits: Any) -> Any:
        return logits[:3]

    good = Request(QUESTION, [picture(0)], max_tokens=4)
    bad = [
        Request(QUESTION, [b"no picture"]),
        Request("there " * 500),
        replace(good, logits_processors=[wrong_shape]),
        Request(QUESTION, sampling=Sampling(grammar="root = (")),
        Request(QUESTION, sampling=Sampling(logit_bias={10**6: 1.0})),
        replace(good, logits_processors=[divide]),
    ]
    requests = [request for one in bad for request in (good, one)] + [good]
    with open_vlm(pair, n_parallel=3) as vlm:
        outcomes = {outcome.index: outcome for outcome in vlm.generate_many(requests)}
        assert sorted(outcomes) == list(range(len(requests)))
        assert [i for i, o in sorted(outcomes.items()) if o.reply is None] == [1, 3, 5, 7, 9, 11]
        assert len({tuple(ids(outcomes[i].unwrap())) for i in range(0, 13, 2)}) == 1
        assert is_empty(vlm)


def test_requests_without_end_are_taken_as_they_can_be_worked_on(pair: TinyPair) -> None:
    taken = itertools.count()
    with open_vlm(pair, n_parallel=3) as vlm:
        outcomes = vlm.generate_many(
            Request(QUESTION, [picture(i % 3)], max_tokens=2 + i % 3) for i in taken
        )
        first = [next(outcomes) for _ in range(20)]
        assert next(taken) <= 20 + 3 + 2
        outcomes.close()  # type: ignore[attr-defined]
        assert is_empty(vlm)
    assert len({outcome.index for outcome in first}) == 20
    said = {o.index % 3: ids(o.unwrap()) for o in first}
    assert all(ids(o.unwrap()) == said[o.index % 3] for o in first)


def test_the_model_closed_under_many_requests_says_so(pair: TinyPair) -> None:
    vlm = open_vlm(pair, n_parallel=3)
    outcomes = vlm.generate_many(Request(QUESTION, max_tokens=50) for _ in range(99))
    next(outcomes)
    vlm.close()
    assert isinstance(in_time(lambda: list(outcomes)), ModelError)


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_eight_threads_ask_streams_faults_and_closings_and_each_gets_its_own(
    pair: TinyPair,
) -> None:
    n_threads, n_asked = 8, 25
    vlm = open_vlm(pair, n_ctx=512, n_parallel=4)
    requests = [request for request in pool() if request.contrast is None][::3]
    with open_vlm(pair, n_parallel=1, prefix_cells=0, strategy="exact") as alone:
        expected = [ids(alone.generate(request)) for request in requests]
    right, wrong = list[str](), list[object]()

    def broken(tokens: Any, logits: Any) -> Any:
        if len(tokens) == 3:
            raise ZeroDivisionError
        return logits

    def one(thread: int, i: int) -> None:
        k = (3 * thread + i) % len(requests)
        kind = ("whole", "stream", "dropped", "closed", "processor", "picture")[(thread + i) % 6]
        try:
            if kind == "whole":
                if ids(vlm.generate(requests[k])) == expected[k]:
                    right.append(kind)
            elif kind == "processor":
                vlm.generate(replace(requests[k], logits_processors=[broken]))
            elif kind == "picture":
                vlm.stream(QUESTION, [b"no picture"])
            else:
                stream = vlm.stream(requests[k])
                for _ in range(999 if kind == "stream" else i % 4):
                    next(stream, None)
                if kind == "closed":
                    stream.close()
                if kind != "stream" or ids(stream.reply) == expected[k]:
                    right.append(kind)
        except ImageError:
            right.extend([kind] * (kind == "picture"))
        except ZeroDivisionError:
            right.extend([kind] * (kind == "processor"))
        except BaseException as exc:
            wrong.append((kind, exc))

    def ask(thread: int) -> None:
        for i in range(n_asked):
            one(thread, i)

    def run() -> None:
        threads = [
            threading.Thread(target=ask, args=(thread,), daemon=True) for thread in range(n_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    run()
    process = psutil.Process()
    before = process.memory_info().rss
    run()
    assert wrong == []
    assert len(right) == 2 * n_threads * n_asked, Counter(right)
    assert process.memory_info().rss - before < 8 * 2**20
    assert is_empty(vlm)
    vlm.close()


@pytest.mark.slow
def test_a_model_that_is_closed_under_eight_threads_answers_or_fails_each(pair: TinyPair) -> None:
    for pause in (0.0, 0.02, 0.1):
        vlm = open_vlm(pair, n_ctx=512, n_parallel=4)
        said, wrong = list[tuple[int, list[int]]](), list[object]()

        def ask(thread: int, vlm: GuidedVLM = vlm, said: Any = said, wrong: Any = wrong) -> None:
            for i in range(25):
                seed = (thread + i) % 3
                try:
                    if i % 3:
                        reply = vlm.generate(QUESTION, [picture(seed)], max_tokens=12)
                    else:
                        stream = vlm.stream(QUESTION, [picture(seed)], max_tokens=12)
                        list(stream)
                        reply = stream.reply
                    said.append((seed, ids(reply)))
                except ModelError:
                    pass
                except BaseException as exc:
                    wrong.append(exc)

        threads = [threading.Thread(target=ask, args=(t,), daemon=True) for t in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(pause)
        closers = [threading.Thread(target=vlm.close, daemon=True) for _ in range(2)]
        for thread in closers:
            thread.start()
        for thread in threads + closers:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert wrong == []
        assert len({(seed, tuple(tokens)) for seed, tokens in said}) <= 3
