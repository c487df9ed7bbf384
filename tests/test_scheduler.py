"""Whose turn it is: the scheduler alone, with answers and an engine that do nothing."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
from patience import PATIENCE, in_time
from works import ENCODE, Stage, Want, Work, driving

from cmg_gguf.answer.outbox import End, Outbox
from cmg_gguf.answer.work import Admission
from cmg_gguf.errors import BackendError, ModelError


@pytest.fixture
def stage() -> Iterator[Stage]:
    with driving() as opened:
        yield opened


class ToldError(Exception):
    pass


class WorseError(BaseException):
    """What is no `Exception`."""


# --- who begins --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_parallel", [1, 2, 5])
def test_answers_begin_in_order_and_no_more_than_n_parallel_are_under_way(n_parallel: int) -> None:
    rng = np.random.default_rng(n_parallel)
    with driving(n_parallel) as stage:
        seen: list[int] = []

        def count() -> None:
            seen.append(len(stage.active))

        works = [
            Work(stage, f"{i}", [count, *(1 for _ in range(rng.integers(1, 9)))]) for i in range(40)
        ]
        stage.play(*works)
    assert stage.of("began") == [f"{i}" for i in range(40)]
    assert max(seen) == n_parallel
    assert all(work.outcome is None for work in works)


def test_all_that_take_a_step_share_a_decode(stage: Stage) -> None:
    stage.play(*(Work(stage, name, [1, 2, 1]) for name in "abc"))
    assert [sorted(names) for names in stage.decodes] == [["a", "b", "c"]] * 3


def test_one_that_is_full_holds_up_those_behind_it(stage: Stage) -> None:
    first = Work(stage, "a", [1] * 5)

    def fits() -> Admission:
        return "go" if first.is_over.is_set() else "full"

    stage.play(first, Work(stage, "b", [1], admission=fits), Work(stage, "c", [1]))
    assert stage.of("began") == ["a", "b", "c"]
    assert stage.of("ended")[0] == "a"


def test_one_that_waits_for_anothers_picture_holds_up_nobody(stage: Stage) -> None:
    first = Work(stage, "a", [1] * 5)

    def seen() -> Admission:
        return "go" if first.n_done >= 3 else "soon"

    stage.play(first, Work(stage, "b", [1], admission=seen), Work(stage, "c", [1]))
    assert stage.of("began") == ["a", "c", "b"]
    assert stage.of("ended")[0] == "c"


@pytest.mark.parametrize("says", ["full", "soon"])
def test_an_answer_begins_where_it_is_alone_whatever_it_says(
    stage: Stage, says: Literal["full", "soon"]
) -> None:
    works = [Work(stage, name, [1, 1], admission=lambda: says) for name in "abc"]
    stage.play(*works)
    assert stage.of("began") == stage.of("ended") == ["a", "b", "c"]


def test_the_thread_ends_some_time_behind_the_work_and_comes_back(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmg_gguf.answer.worker.IDLE_SECONDS", 0.02)
    for _ in range(3):
        stage.play(Work(stage, "a", [1]))
        deadline = time.monotonic() + PATIENCE
        while n_threads() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert n_threads() == 0


def n_threads() -> int:
    return sum(thread.name == "cmg-engine" for thread in threading.enumerate())


def test_answers_of_many_threads_are_all_made(stage: Stage) -> None:
    works = [Work(stage, f"{i}", [1] * (i % 3)) for i in range(400)]

    def ask(mine: list[Work]) -> None:
        for work in mine:
            stage.scheduler.submit(work)
            if work.name.endswith("7"):
                work.is_over.wait(PATIENCE)

    threads = [threading.Thread(target=ask, args=(works[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stage.wait(*works)
    assert Counter(stage.of("began")) == Counter(work.name for work in works)


# --- who gives way -----------------------------------------------------------------------------


def test_the_newest_gives_way_and_begins_again_before_those_that_wait(stage: Stage) -> None:
    """There is room for two of four; a third is noticed when it has begun."""
    stage.engine.has_room = lambda: len(stage.active) <= 2
    works = [Work(stage, name, [1] * 4) for name in "abcd"]
    stage.play(*works)
    assert all(work.outcome is None for work in works)
    assert [work.n_done for work in works] == [4] * 4
    assert stage.of("closed")[:2] == ["d", "c"]
    assert "a" not in stage.of("closed")
    assert "b" not in stage.of("closed")
    assert stage.of("ended") == list("abcd")


def test_one_answer_never_gives_way(stage: Stage) -> None:
    stage.engine.has_room = lambda: False
    works = [Work(stage, name, [1] * 3, admission=lambda: "full") for name in "ab"]
    stage.play(*works)
    assert stage.of("closed") == []
    assert stage.decodes == [("a",)] * 3 + [("b",)] * 3


# --- how long a running answer waits -----------------------------------------------------------


def waits_of(stage: Stage, runner: str, n_rows: dict[str, int]) -> list[tuple[int, int]]:
    """(encodings, rows of decodes that it had no part in) between two decodes of the runner."""
    waits, encodings, rows = [], 0, 0
    for kind, *names in stage.log:
        if kind == "encode":
            encodings += 1
        elif kind == "decode" and runner in names:
            waits.append((encodings, rows))
            encodings = rows = 0
        elif kind == "decode":
            rows += sum(n_rows[name] for name in names)
    return waits[1:]


def test_a_running_answer_waits_for_one_micro_batch_and_one_encoding_at_most() -> None:
    """Others bring prompts of whole micro-batches, and images."""
    with driving(n_parallel=8, n_ubatch=8) as stage:
        runner = Work(stage, "runner", [1] * 60)
        all_kinds: list[Want] = [*[ENCODE] * 4, *[-8] * 4, *[8] * 6, *[1] * 3]
        wants: list[list[Want]] = [all_kinds, [8] * 20, [-8] * 20]
        others = [Work(stage, f"{i}", wants[i % 3]) for i in range(12)]
        stage.play(runner, *others)
        waits = waits_of(stage, "runner", {f"{i}": 8 for i in range(12)})
    assert max(encodings for encodings, _ in waits) == 1
    assert max(rows for _, rows in waits) <= 8
    assert all(work.outcome is None for work in (runner, *others))


@pytest.mark.parametrize("apart", [False, True], ids=["shared", "apart"])
@pytest.mark.parametrize("n_rows", [3, 5, 7])
def test_so_it_does_where_prompts_end_in_less_than_a_micro_batch(n_rows: int, apart: bool) -> None:
    """apart: none of them shares a decode with the runner's, as forks at other layers do."""
    with driving(n_parallel=8, n_ubatch=8) as stage:
        stage.engine.apart = apart
        runner = Work(stage, "runner", [1] * 40)
        wants: list[list[Want]] = [[n_rows] * 30, [-n_rows] * 30]
        others = [Work(stage, f"{i}", wants[i % 2]) for i in range(6)]
        stage.play(runner, *others)
        waits = waits_of(stage, "runner", {f"{i}": n_rows for i in range(6)})
    assert max(rows for _, rows in waits) <= 8


def test_nobody_starves() -> None:
    """One wants whole micro-batches; three take steps; two want images encoded without end."""
    with driving(n_parallel=6, n_ubatch=8) as stage:
        prompt = Work(stage, "prompt", [8] * 10 + [-8] * 10)
        short = [Work(stage, f"{i}", [2] * 100) for i in range(3)]
        encoders = [Work(stage, f"e{i}", [ENCODE] * 50) for i in range(2)]
        stage.play(*short, prompt, *encoders)
    decodes = [names for names in stage.decodes if "prompt" in names or "0" in names]
    ahead = next(i for i in range(len(decodes)) if decodes[: i + 1].count(("prompt",)) == 20)
    assert ahead <= 45
    order = stage.of("encode")
    assert all(order[i] != order[i + 1] for i in range(90))


# --- who ends ----------------------------------------------------------------------------------


def test_an_answer_that_nobody_wants_never_begins(stage: Stage) -> None:
    with driving(n_parallel=1) as stage:
        waiting = Work(stage, "b", [1])

        def cancel() -> None:
            waiting.cancelled = True

        stage.play(Work(stage, "a", [1, cancel, 1, 1]), waiting, Work(stage, "c", [1]))
    assert stage.of("began") == ["a", "c"]
    assert waiting.outcome is None
    assert stage.of("ended") == ["b", "a", "c"]


def test_an_answer_that_is_dropped_at_any_moment_ends() -> None:
    class Dropped(Work):
        """Given up by another thread once it was looked at `n_looks` times."""

        n_looks = 0

        @property
        def cancelled(self) -> bool:
            self.n_looks -= 1
            return self.n_looks < 0

        @cancelled.setter
        def cancelled(self, cancelled: bool) -> None:
            assert not cancelled

    for n_looks in range(8):
        with driving(n_parallel=1) as stage:
            waiting = Dropped(stage, "b", [1])
            waiting.n_looks = n_looks
            stage.play(Work(stage, "a", [1] * 10), waiting)
        assert sorted(stage.of("ended")) == ["a", "b"]


def test_an_answer_that_nobody_wants_any_more_ends_before_its_next_step(stage: Stage) -> None:
    dropped = Work(stage, "b", [1] * 100)

    def cancel() -> None:
        dropped.cancelled = True

    stage.play(Work(stage, "a", [1, 1, cancel, 1, 1]), dropped)
    assert dropped.outcome is None
    assert 2 <= sum("b" in names for names in stage.decodes) <= 3
    assert stage.of("closed") == ["b"]


@pytest.mark.parametrize("error", [ToldError(), WorseError()])
def test_an_error_in_rows_reaches_their_answer_alone(stage: Stage, error: BaseException) -> None:
    stage.engine.errors["b"] = error
    works = [Work(stage, name, [1] * 3) for name in "abc"]
    stage.play(*works)
    assert [work.outcome for work in works] == [None, error, None]


def test_an_error_in_an_answers_own_code_reaches_it_alone(stage: Stage) -> None:
    def fail() -> None:
        raise ToldError

    works = [Work(stage, name, [1, 1, fail] if name == "b" else [1] * 4) for name in "abc"]
    stage.play(*works)
    assert [type(work.outcome) for work in works] == [type(None), ToldError, type(None)]


def test_a_decode_that_raises_ends_those_that_were_in_it(stage: Stage) -> None:
    stage.engine.apart = True
    stage.engine.raises["decode"] = ToldError()
    works = [Work(stage, name, [1] * 3) for name in "abc"]
    stage.play(*works)
    assert sorted(type(work.outcome).__name__ for work in works) == [
        "NoneType",
        "NoneType",
        "ToldError",
    ]


def failing(stage: Stage, where: str, error: BaseException) -> Work:
    """An answer in which something fails that is not its rows."""

    def fail() -> Any:
        raise error

    if where == "encoding":
        return Work(stage, "bad", [1, ENCODE, 1], encode=fail)
    if where == "admission":
        return Work(stage, "bad", [1], admission=fail)
    if where == "close":
        work = Work(
            stage, "bad", [1, lambda: setattr(work, "cancelled", True), 1, 1], at_close=error
        )
        return work
    return Work(stage, "bad", [1, lambda: stage.engine.raises.update({where: error}), 1])


EVERYWHERE = ["encoding", "admission", "close", "make_room", "together"]


@pytest.mark.parametrize("error", [ToldError, WorseError])
@pytest.mark.parametrize("where", EVERYWHERE)
def test_whatever_fails_nobody_waits_for_ever_and_others_are_answered_behind_it(
    stage: Stage, where: str, error: type[BaseException]
) -> None:
    others = [Work(stage, name, [1] * 6) for name in "ab"]
    bad = failing(stage, where, error())
    stage.submit(others[0], bad, others[1])
    stage.wait(bad, *others)
    later = Work(stage, "later", [1])
    stage.scheduler.submit(later)
    stage.wait(later)
    assert later.outcome is None


@pytest.mark.parametrize("error", [ToldError, WorseError])
@pytest.mark.parametrize("where", ["encoding", "admission", "close"])
def test_what_fails_in_one_answer_is_no_others_error(
    stage: Stage, where: str, error: type[BaseException]
) -> None:
    others = [Work(stage, name, [1] * 6) for name in "ab"]
    bad = failing(stage, where, error())
    stage.submit(others[0], bad, others[1])
    stage.wait(*others)
    assert [work.outcome for work in others] == [None, None]


@pytest.mark.parametrize("where", ["make_room", "together"])
def test_closing_that_fails_beside_a_failed_round_leaves_nobody_waiting(
    stage: Stage, where: str
) -> None:
    """Two errors at once: of the engine, and of an answer that is ended for it."""
    wants: list[Want] = [1, lambda: stage.engine.raises.update({where: ToldError()}), 1, 1]
    works = [Work(stage, name, wants, at_close=ToldError()) for name in "abc"]
    stage.play(*works)
    later = Work(stage, "later", [1])
    stage.scheduler.submit(later)
    stage.wait(later)
    assert later.outcome is None


def deaf(stage: Stage, name: str, wants: list[Want]) -> Work:
    """An answer that fails where it is told that it has ended."""
    work = Work(stage, name, wants)
    end = work.ended

    def ended(error: BaseException | None) -> None:
        end(error)
        raise WorseError(name)

    work.ended = ended  # type: ignore[method-assign]
    return work


@pytest.mark.parametrize("how", ["done", "own", "round", "dropped", "closed"])
def test_what_fails_where_ends_are_told_is_told_itself_and_reaches_nobody(
    stage: Stage, how: str
) -> None:
    """Of several answers at once; the thread goes on."""

    def at_last() -> None:
        if how == "own":
            raise ToldError
        for work in works:
            work.cancelled = how == "dropped"
        if how == "round":
            stage.engine.raises["together"] = ToldError()

    other = Work(stage, "c", [1] * 9)
    works = [deaf(stage, name, [1, at_last, 1]) for name in "ab"]
    if how == "closed":
        works = [deaf(stage, name, [1] * 10**6) for name in "ab"]
        stage.submit(*works)
        while len(stage.decodes) < 20:
            time.sleep(0.001)
        assert in_time(stage.scheduler.close) is None
    else:
        stage.submit(*works, other)
        stage.wait(other)
        assert isinstance(other.outcome, ToldError if how == "round" else type(None))
        stage.play(later := Work(stage, "later", [1]))
        assert later.outcome is None
    stage.wait(*works)
    assert {str(crash) for crash in stage.crashes} == {"a", "b"}
    assert all(isinstance(crash, WorseError) for crash in stage.crashes)
    stage.crashes.clear()


def test_an_answer_for_which_no_thread_can_be_started_is_not_taken(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    refused, later = Work(stage, "a", [1]), Work(stage, "b", [1])
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", full)
        with pytest.raises(RuntimeError, match="can't start"):
            stage.scheduler.submit(refused)
    stage.play(later)
    assert stage.of("began") == ["b"]
    assert not refused.is_over.is_set()


# --- who closes --------------------------------------------------------------------------------


def endless(stage: Stage, name: str, pause: float = 0.0) -> Work:
    return Work(stage, name, [lambda: time.sleep(pause), 1] * 10**6)


def test_closing_ends_all_with_an_error_that_says_so(stage: Stage) -> None:
    works = [endless(stage, f"{i}") for i in range(9)]
    stage.submit(*works)
    while len(stage.decodes) < 20:
        time.sleep(0.001)
    assert in_time(stage.scheduler.close) is None
    stage.wait(*works)
    assert {type(work.outcome) for work in works} == {ModelError}
    n_decodes = len(stage.decodes)
    with pytest.raises(ModelError, match="closed; make a new one"):
        stage.scheduler.submit(Work(stage, "late", [1]))
    assert in_time(stage.scheduler.close) is None
    assert len(stage.decodes) == n_decodes


def test_several_threads_may_close_at_once(stage: Stage) -> None:
    """Whichever comes back, nothing is computed any more: what they close may be freed."""
    works = [endless(stage, f"{i}") for i in range(4)]
    freed: list[float] = []
    late: list[str] = []

    def closed_slowly(work: Work) -> None:
        end = work.ended

        def ended(error: BaseException | None) -> None:
            time.sleep(0.02)
            if freed:
                late.append(work.name)
            end(error)

        work.ended = ended  # type: ignore[method-assign]

    for work in works:
        closed_slowly(work)
    stage.submit(*works)
    while len(stage.decodes) < 20:
        time.sleep(0.001)

    def close(pause: float) -> None:
        time.sleep(pause)
        stage.scheduler.close()
        freed.append(time.monotonic())

    threads = [
        threading.Thread(target=close, args=(pause,), daemon=True)
        for pause in (0, 0.01, 0.03, 0.05)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(freed) == 4
    stage.wait(*works)
    assert late == []


def test_an_answer_may_close_under_itself(stage: Stage) -> None:
    """Nothing of the others is computed behind that, not even of those in the same decode: what
    they need may be freed."""
    others = [endless(stage, "b"), Work(stage, "c", [1] * 10**6)]
    n_done: list[int] = []

    def close() -> None:
        stage.scheduler.close()
        n_done.extend(work.n_done for work in others)
        stage.scheduler.check()

    closing = Work(stage, "a", [1, 1, close, 1])
    stage.play(others[0], closing, others[1])
    assert {type(work.outcome) for work in (closing, *others)} == {ModelError}
    assert [work.n_done for work in others] == n_done


def test_closing_waits_for_who_holds_it_open(stage: Stage) -> None:
    closer = threading.Thread(target=stage.scheduler.close, daemon=True)

    def close_meanwhile() -> str:
        closer.start()
        closer.join(0.05)
        assert closer.is_alive()
        with pytest.raises(ModelError):
            stage.scheduler.while_open(lambda: None)
        return "done"

    assert stage.scheduler.while_open(close_meanwhile) == "done"
    closer.join(PATIENCE)
    assert not closer.is_alive()


def test_ends_are_told_where_others_may_ask(stage: Stage) -> None:
    """As where who is told takes a lock that another holds who asks."""
    came: list[object] = []
    with driving(n_parallel=1) as stage:
        works = [endless(stage, name) for name in "ab"]

        def ask(end: Any, error: BaseException | None) -> None:
            came.append(in_time(lambda: stage.scheduler.submit(Work(stage, "late", [1]))))
            end(error)

        for work in works:
            work.ended = partial(ask, work.ended)  # type: ignore[method-assign]
        stage.submit(*works)
        while len(stage.decodes) < 20:
            time.sleep(0.001)
        assert in_time(stage.scheduler.close) is None
        stage.wait(*works)
    assert [type(one) for one in came] == [ModelError, ModelError]


@pytest.mark.parametrize("n_times", range(5))
def test_closing_between_asking_and_the_first_round_hangs_nobody(n_times: int) -> None:
    for _ in range(40):
        with driving() as stage:
            works = [endless(stage, name) for name in "ab"]
            for work in works:
                stage.scheduler.submit(work)
            assert in_time(stage.scheduler.close) is None
            stage.wait(*works)


# --- answers that ask for answers --------------------------------------------------------------


def test_an_answer_may_wait_for_another_that_it_asks_for(stage: Stage) -> None:
    inner = Work(stage, "inner", [8, ENCODE, 1, 1])
    beside = Work(stage, "beside", [1] * 3)

    def ask() -> None:
        stage.scheduler.submit(inner)
        assert stage.scheduler.is_mine
        assert stage.scheduler.drive(inner.is_over.is_set)

    outer = Work(stage, "outer", [1, ask, 1])
    stage.play(outer, beside)
    assert [work.outcome for work in (outer, inner, beside)] == [None] * 3
    ended = stage.of("ended")
    assert ended.index("inner") < ended.index("outer")


def test_answers_may_ask_as_deep_as_there_are_places() -> None:
    with driving(n_parallel=4) as stage:

        def asking(depth: int) -> Work:
            def ask() -> None:
                inner = asking(depth + 1)
                stage.scheduler.submit(inner)
                try:
                    stage.scheduler.drive(inner.is_over.is_set)
                finally:
                    inner.cancelled = True
                if inner.outcome is not None:
                    raise inner.outcome

            return Work(stage, f"{depth}", [1, ask] if depth < 10 else [1])

        outer = asking(0)
        stage.play(outer)
        assert isinstance(outer.outcome, BackendError)
        assert "n_parallel" in str(outer.outcome)
        assert stage.of("began") == ["0", "1", "2", "3"]


def test_nobody_else_drives(stage: Stage) -> None:
    assert not stage.scheduler.is_mine
    assert not stage.scheduler.drive(lambda: False)


def test_closing_does_not_wait_for_what_an_answer_asks_for_to_end_by_itself(stage: Stage) -> None:
    inner = Work(stage, "inner", [1] * 10**6)

    def ask() -> None:
        stage.scheduler.submit(inner)
        stage.scheduler.drive(inner.is_over.is_set)
        raise inner.outcome or AssertionError

    outer = Work(stage, "outer", [1, ask, 1])
    stage.submit(outer)
    while len(stage.decodes) < 20:
        time.sleep(0.001)
    assert in_time(stage.scheduler.close) is None
    stage.wait(outer, inner)
    assert isinstance(outer.outcome, ModelError)


# --- readers -----------------------------------------------------------------------------------


def test_who_is_not_read_is_made_to_its_end_and_read_later(stage: Stage) -> None:
    outbox: Outbox[int] = Outbox(stage.scheduler.drive)
    work = Work(stage, "a", [lambda i=i: outbox.put(i) for i in range(1000)])  # type: ignore[misc]
    stage.play(work, Work(stage, "b", [1]))
    outbox.end(ToldError())
    assert [outbox.get() for _ in range(1000)] == list(range(1000))
    ends = [outbox.get() for _ in range(3)]
    assert all(isinstance(end, End) for end in ends)
    assert isinstance(ends[0].error, ToldError)  # type: ignore[union-attr]
    assert ends[1:] == [End(), End()]


def test_an_answer_may_read_what_another_says_as_it_comes(stage: Stage) -> None:
    outbox: Outbox[int] = Outbox(stage.scheduler.drive)
    said: list[object] = []
    talker = Work(stage, "talker", [1, lambda: outbox.put(1), 1, lambda: outbox.put(2), 1])

    def read() -> None:
        said.extend(outbox.get() for _ in range(2))

    stage.play(Work(stage, "reader", [1, read, 1]), talker)
    assert said == [1, 2]
