"""Which way of a step the engine takes by its own clock. No model: the clock is written down."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cmg_gguf.engine.steps import Filling, Pace

N_STEPS = 2000


class Clock:
    """Steps whose costs are known: what `Pace` is told, and what its choice costs."""

    def __init__(self, together: float, alone: float, row: float, share: float) -> None:
        """Seconds of a step of both branches, of the original alone, of a row that catches up;
        share: of the steps that ask for l_d."""
        self.together, self.alone, self.row, self.share = together, alone, row, share
        self.pace, self.rng = Pace(), random.Random(0)
        self.asked, self.waiting = False, 0
        self.ways: list[bool] = []

    def run(self, n: int, noise: Callable[[], float] = lambda: 1.0) -> float:
        """Seconds of n steps."""
        spent = 0.0
        for _ in range(n):
            self.pace.step(asked=self.asked)
            together = self.pace.takes_together
            self.ways.append(together)
            seconds = (self.together if together else self.alone) * noise()
            if together:
                seconds += self.row * self.waiting * noise()
                self.waiting = 0
            if together:
                self.pace.together_took(seconds)
            else:
                self.pace.alone_took(seconds)
                self.waiting += 1
            self.asked = self.rng.random() < self.share
            if self.asked and self.waiting:
                caught_up = self.row * self.waiting * noise()
                self.pace.catch_up_took(self.waiting, caught_up)
                seconds += caught_up
                self.waiting = 0
            spent += seconds
        return spent


@pytest.mark.parametrize("share", [0.05, 0.15, 0.35, 0.6, 0.95])
@pytest.mark.parametrize(("together", "row"), [(1.4, 0.5), (1.2, 0.5), (1.9, 0.6), (1.1, 0.9)])
@pytest.mark.parametrize("seed", range(3))
def test_it_costs_at_most_three_percent_more_than_the_cheaper_way(
    together: float, row: float, share: float, seed: int
) -> None:
    clock = Clock(together, 1.0, row, share)
    rng = random.Random(seed)
    spent = clock.run(N_STEPS, lambda: rng.uniform(0.95, 1.3))
    # Every row that waits is decoded in the end; 1.125: what the noise adds on average.
    cheapest = min(together, 1.0 + row) * N_STEPS * 1.125
    assert spent <= 1.03 * cheapest


def test_both_ways_are_tried_and_then_the_cheaper_is_taken() -> None:
    for together, row, expected in ((1.3, 0.9, True), (1.9, 0.2, False)):
        clock = Clock(together, 1.0, row, 0.4)
        clock.run(200)
        assert {True, False} == set(clock.ways[:60])
        assert set(clock.ways[100:200]) == {expected}


def test_the_dearer_way_is_tried_again_now_and_then() -> None:
    clock = Clock(1.3, 1.0, 0.9, 0.4)
    clock.run(3 * Pace.TRIED_AGAIN)
    again = [not way for way in clock.ways[Pace.TRIED_AGAIN :]]
    assert 0 < sum(again) <= 2 * (Pace.N_TRIED + 20)


def test_a_machine_that_changes_is_followed() -> None:
    clock = Clock(1.3, 1.0, 0.9, 0.4)
    clock.run(400)
    assert clock.ways[-1]
    clock.together = 2.5
    clock.run(60)
    assert not any(clock.ways[-20:])
    clock.together = 1.1
    clock.run(2 * Pace.TRIED_AGAIN)
    assert sum(clock.ways[-100:]) >= 90


def test_few_steps_that_ask_make_waiting_worth_it() -> None:
    """Rows in a batch are cheaper than one after another: the fewer steps ask, the larger it is."""
    for share, expected in ((0.05, False), (0.95, True)):
        clock = Clock(1.45, 1.0, 0.0, share)
        clock.row = 0.5
        pace = clock.pace
        for n in range(1, 40):  # what a batch of n rows takes
            pace.catch_up_took(n, 0.5 + 0.15 * (n - 1))
        for _ in range(Pace.N_TRIED):
            pace.together_took(1.45)
            pace.alone_took(1.0)
        for i in range(120):
            pace.step(asked=i % 20 == 0 if share < 0.5 else True)
        assert pace.takes_together is expected


def test_a_decode_is_filled_up_where_that_has_been_cheaper() -> None:
    seconds = {1: 1.0, 2: 1.5, 3: 2.4, 4: 1.8, 5: 2.6, 6: 3.0, 7: 3.6, 8: 3.2}
    filling = Filling()
    for _ in range(8):
        for n in seconds:
            n_rows = n + filling.n_padding(n, n)
            assert n_rows in (n, 4, 8)
            filling.took(n_rows, n_rows, seconds[n_rows])
    assert [n + filling.n_padding(n, n) for n in seconds] == [1, 2, 4, 4, 5, 6, 8, 8]


def test_rows_that_enter_a_fork_are_filled_up_by_their_own_kind() -> None:
    filling = Filling()
    for _ in range(8):
        n_rows = 6 + filling.n_padding(3, 6)
        filling.took(3, n_rows, {6: 3.0, 8: 2.0}[n_rows])
    assert filling.n_padding(3, 6) == 2
    assert filling.n_padding(6, 6) == 0  # not known yet


def test_in_company_both_branches_go_together_and_nothing_is_timed() -> None:
    clock = Clock(1.9, 1.0, 0.2, 0.4)
    clock.run(100)
    assert not clock.pace.takes_together
    clock.pace.company = True
    clock.run(50)
    assert all(clock.ways[-50:])
    clock.pace.company = False
    clock.run(50)
    assert not any(clock.ways[-40:])


def test_one_slow_step_decides_nothing() -> None:
    clock = Clock(1.2, 1.0, 0.9, 0.4)
    clock.run(100)
    for _ in range(3):
        clock.pace.together_took(50.0)
    clock.run(20)
    assert all(clock.ways[-20:])
