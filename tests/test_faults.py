"""Whatever goes wrong is told in one clear line, and the next answer is right."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import signal
import sys
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import llama_cpp
import numpy as np
import psutil
import pytest
from faults import EARLY, FAULTS, PICTURE, UNDER_WAY, Fault
from guided import QUESTION, held, ids, is_empty, open_vlm
from llama_cpp import mtmd_cpp
from patience import in_time
from prompts import picture
from tiny_llava import TinyPair

from cmg_gguf import Guidance, GuidedVLM, PromptError, Reply, Request, Sampling
from cmg_gguf.answer.scheduler import Scheduler
from cmg_gguf.prompt.segments import ImageSegment
from cmg_gguf.stream import Run

N_MARATHON = 3 * len(FAULTS)


@pytest.fixture(scope="module")
def vlm(pair: TinyPair) -> Iterator[GuidedVLM]:
    with open_vlm(pair) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(vlm: GuidedVLM) -> list[int]:
    """The right answer, from before anything went wrong."""
    return answer(vlm)


def answer(vlm: GuidedVLM) -> list[int]:
    return ids(vlm.generate(QUESTION, [picture(1), picture(2)], max_tokens=20))


def named(fault: Fault) -> str:
    return fault.name


# --- one at a time -----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", EARLY, ids=named)
def test_a_fault_of_the_request_is_told_before_anything_is_computed(
    vlm: GuidedVLM, expected: list[int], fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        for name in ("decode", "decode_image"):
            patched.setattr(vlm.engine.lanes[0].original.context, name, _computed)
        patched.setattr(vlm.projector, "embedded", _computed)
        fault.happen(vlm)
    assert answer(vlm) == expected


def _computed(*arguments: object, **settings: object) -> None:
    pytest.fail("computed")


@pytest.mark.parametrize("fault", UNDER_WAY, ids=named)
def test_a_fault_under_way_leaves_the_model_empty_and_usable(
    vlm: GuidedVLM, expected: list[int], fault: Fault
) -> None:
    fault.happen(vlm)
    assert is_empty(vlm)
    assert answer(vlm) == expected


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (np.zeros((1, 1, 3), np.uint8), QUESTION),
        (np.full((1, 20_000, 3), 9, np.uint8), QUESTION),
        (np.full((20_000, 1, 3), 9, np.uint8), QUESTION),
        (np.zeros((2_000, 3_000, 3), np.uint8), QUESTION),
        (PICTURE, ""),
        (PICTURE, " "),
        (PICTURE, "\n\r\t"),
        (PICTURE, "a\0b\0"),
        (PICTURE, "\ud800 \udcff"),
        (PICTURE, "\u202e\u200b\ufeff"),
        (PICTURE, "</s><s><unk><0x00>"),
        (PICTURE, "{{ 1 / 0 }}{% raise %}"),
        (PICTURE, "\U0001f642" * 5),
        (PICTURE, "\x1b[31m"),
    ],
)
def test_what_is_only_odd_is_answered(
    vlm: GuidedVLM, expected: list[int], image: Any, text: str
) -> None:
    reply = vlm.generate(text, [image], max_tokens=3)
    assert len(reply.tokens) == 3
    assert reply.n_image_tokens == 16
    assert len(vlm.generate(text, max_tokens=3).tokens) == 3
    assert len(vlm.generate(text + "<__media__>a", [image], raw=True, max_tokens=3).tokens) == 3
    assert answer(vlm) == expected


def test_a_raw_prompt_may_be_empty_but_for_the_beginning(vlm: GuidedVLM) -> None:
    assert vlm.generate("", raw=True, max_tokens=2).n_prompt_tokens == 1


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "[] instead of [0]"),
        ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}", "[0, 0] instead of [0]"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ messages[9].content }}", "refuses"),
        ("{{ (1).__class__.__mro__ }}", "refuses"),
        ("{% for i in range(10**9) %}x{% endfor %}", "refuses"),
        ("{{ '' }}", "empty prompt"),
    ],
)
def test_a_template_that_cannot_show_the_image_says_so(
    pair: TinyPair, template: str, says: str
) -> None:
    with open_vlm(pair, chat_template=template) as odd, pytest.raises(PromptError) as info:
        odd.stream(QUESTION, [PICTURE])
    assert says in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("template", ["{{ nonsense", "{% for %}", "{{ 1 | no_such_filter }}"])
def test_a_template_that_is_no_jinja_is_refused_with_the_model(
    pair: TinyPair, template: str
) -> None:
    with pytest.raises(PromptError, match="not valid Jinja"):
        open_vlm(pair, chat_template=template)


def test_an_odd_template_is_taken_at_its_word(pair: TinyPair) -> None:
    with open_vlm(pair, chat_template="{{ messages[0].content }} <s>{{ '\0' }}!") as odd:
        assert len(odd.generate(QUESTION, [PICTURE], max_tokens=3).tokens) == 3


# --- at any moment -----------------------------------------------------------------------------


class Alarm(BaseException):
    """Raised by a timer of our own CPU time, wherever the program happens to be."""


class Clock:
    """Interrupts a call at moments that differ from call to call."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self._rng, self._armed = call, random.Random(0), False
        call()
        started = time.process_time()
        call()
        self._spent = time.process_time() - started

    def interrupted(self) -> bool:
        """Calls. Whether that was interrupted."""
        before = signal.signal(signal.SIGVTALRM, self._ring)
        self._armed = True
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, self._rng.uniform(1e-4, self._spent))
            self._call()
            self._armed = False
        except Alarm:
            return True
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        return False

    def _ring(self, number: int, frame: object) -> None:
        if self._armed:
            raise Alarm


def test_an_interrupt_at_any_moment_leaves_the_model_usable(
    vlm: GuidedVLM, expected: list[int]
) -> None:
    clock, rng, n_interrupted = Clock(lambda: answer(vlm)), random.Random(0), 0
    for _ in range(1000):
        n_interrupted += clock.interrupted()
        guidance = rng.choice([Guidance(), Guidance(alpha=0.0, beta=0.0)])
        vlm.generate(QUESTION, [PICTURE], guidance=guidance, max_tokens=3)
        assert answer(vlm) == expected
        if n_interrupted == 20:
            break
    assert n_interrupted == 20
    vlm.forget()
    context: Any = vlm.engine.lanes[0].original.context
    assert is_empty(vlm)
    assert not any(held(context, seq) for seq in range(context.n_seq_max))


def test_an_interrupt_is_not_lost_where_streams_and_models_are_dropped(pair: TinyPair) -> None:
    """Python prints what is raised in code that it calls for what is dropped: an error of pytest's
    here."""

    def opened_and_dropped() -> None:
        vlm = open_vlm(pair)
        stream = vlm.stream(QUESTION, [PICTURE], max_tokens=20)
        next(stream)
        del stream
        vlm.generate(QUESTION, [PICTURE], max_tokens=3)
        del vlm
        gc.collect()

    clock = Clock(opened_and_dropped)
    assert sum(clock.interrupted() for _ in range(100)) > 50


class Interrupted(BaseException):
    """Raised behind a call of llama.cpp's."""


@contextmanager
def interrupting(n: int, names: Container[str] | None = None) -> Iterator[None]:
    """Behind the n-th call in the block that goes through llama_cpp's modules. names: of the
    functions whose calls count; None = all."""
    counted = itertools.count()

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            came = call(*arguments)
            if next(counted) == n:
                raise Interrupted
            return came

        return called

    with pytest.MonkeyPatch.context() as patched:
        for module in (llama_cpp, mtmd_cpp):
            for name, call in vars(module).copy().items():
                if not hasattr(call, "argtypes") or name.endswith("_free"):
                    continue
                if names is None or name in names:
                    patched.setattr(module, name, watched(call))
        yield


@pytest.mark.parametrize("files", ["pair", "gemma_pair"])
def test_an_interrupt_behind_any_call_of_llama_cpp_changes_no_later_answer(
    files: str, request: pytest.FixtureRequest
) -> None:
    """Also where it is shown a picture of a size of which heat knows no boxes yet."""
    n_calls = 0
    with open_vlm(request.getfixturevalue(files)) as vlm:
        expected = answer(vlm)
        for n_calls in range(1000):
            seen = np.full((30, 30 + n_calls, 3), 9, np.uint8)
            vlm.forget()
            try:
                with interrupting(n_calls):
                    vlm.generate(QUESTION, [seen], heat=True, max_tokens=2)
                    break
            except Interrupted:
                vlm.forget()
                assert answer(vlm) == expected
    assert 100 < n_calls < 1000


def test_an_interrupt_leaves_no_later_row_without_its_order(vlm: GuidedVLM) -> None:
    """As where a model lets an image's tokens see later ones."""
    said = ids(vlm.generate(QUESTION, max_tokens=5))
    context: Any = vlm.engine.lanes[0].original.context
    image = vlm.projector.encode(vlm.tokenize(QUESTION, [PICTURE])).segments[1]
    assert isinstance(image, ImageSegment)
    for n in range(2):
        with interrupting(n, ["llama_set_causal_attn"]), pytest.raises(Interrupted):
            context.decode_image(replace(image, non_causal=True), 0, 0, None)
        context.truncate(0, 0)
        vlm.forget()
        assert ids(vlm.generate(QUESTION, max_tokens=5)) == said


class Interrupts:
    """Raises KeyboardInterrupt where a function begins that matters to who waits for an answer,
    as Python does: where the n-th does."""

    FILES = (
        *(f"cmg_gguf/{name}.py" for name in ("vlm", "stream", "many")),
        *(f"cmg_gguf/answer/{name}.py" for name in ("changes", "scheduler", "outbox", "worker")),
        "/threading.py",
        "/contextlib.py",
    )

    def __init__(self, n: int) -> None:
        self.left = n

    def __enter__(self) -> None:
        sys.setprofile(self._count)

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.endswith(self.FILES):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt


def interrupted(call: Callable[[], object], n: int) -> bool:
    """Calls. Whether the n-th function that begins was interrupted."""
    with contextlib.suppress(KeyboardInterrupt), Interrupts(n):
        call()
        return False
    return True


def generated(vlm: GuidedVLM) -> object:
    return vlm.generate(QUESTION, [PICTURE], max_tokens=3)


def streamed(vlm: GuidedVLM) -> object:
    stream = vlm.stream(QUESTION, [PICTURE])
    next(stream)
    stream.close()
    return stream


def several(vlm: GuidedVLM) -> object:
    return list(vlm.generate_many([Request(QUESTION, [PICTURE], max_tokens=2)] * 2))


@pytest.mark.parametrize("use", [generated, streamed, several])
def test_an_interrupt_where_any_function_begins_leaves_no_lock_and_no_unread_answer(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, use: Callable[[GuidedVLM], object]
) -> None:
    asked: list[Run] = []
    submit = Scheduler.submit

    def noted(scheduler: Scheduler, run: Any) -> None:
        asked.append(run)
        submit(scheduler, run)

    vlm = open_vlm(pair)  # whose closing would hang too, where it fails
    expected = ids(vlm.generate(QUESTION, [PICTURE], max_tokens=3))
    monkeypatch.setattr(Scheduler, "submit", noted)
    for n in itertools.count(1):
        asked.clear()
        came = in_time(lambda n=n: interrupted(lambda: use(vlm), n))  # type: ignore[misc]
        if came is False:
            break
        assert came is True
        assert all(run.reply or run.cancelled for run in asked)
        later = in_time(lambda: vlm.generate(QUESTION, [PICTURE], max_tokens=3))
        assert isinstance(later, Reply)
        assert ids(later) == expected
    assert n > 20
    assert in_time(vlm.close) is None


def test_one_just_behind_asking_ends_the_answer_even_where_its_traceback_is_kept(
    vlm: GuidedVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Run] = []
    submit = Scheduler.submit

    def interrupted(scheduler: Scheduler, run: Any) -> None:
        submit(scheduler, run)
        asked.append(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(Scheduler, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        vlm.stream(QUESTION, [PICTURE])
    assert [run.cancelled for run in asked] == [True]
    assert is_empty(vlm)
    assert kept.tb is not None


# --- in a row ----------------------------------------------------------------------------------


def test_a_hundred_faults_in_a_row_change_no_answer(vlm: GuidedVLM, expected: list[int]) -> None:
    assert N_MARATHON >= 100
    faults = list(FAULTS) * 3
    random.Random(7).shuffle(faults)
    for i, fault in enumerate(faults):
        fault.happen(vlm)
        if i % 20 == 0:
            assert answer(vlm) == expected
    assert answer(vlm) == expected
    assert is_empty(vlm)


MAX_GROWTH_MB = 4.0


def test_abandoned_and_failed_requests_leave_no_memory_behind(vlm: GuidedVLM) -> None:
    sampling = Sampling(temperature=1.0, repeat_penalty=1.1, grammar='root ::= [a-z ]+ "."')

    def abandon(n: int) -> None:
        for i in range(n):
            stream = vlm.stream(QUESTION, [picture(i)], sampling=sampling)
            next(stream)
            if i % 2:
                stream.close()
            for fault in (UNDER_WAY[i % len(UNDER_WAY)], EARLY[i % len(EARLY)]):
                fault.happen(vlm)
        gc.collect()

    process = psutil.Process()
    abandon(50)
    before = process.memory_info().rss
    abandon(100)
    grown = (process.memory_info().rss - before) / 2**20
    assert grown < MAX_GROWTH_MB
