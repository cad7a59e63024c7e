"""The breaker of a drafter, as a state machine."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.speculation.breaker import (
    FORGIVEN_AFTER_S,
    LONGEST_OPEN_S,
    SHORTEST_OPEN_S,
    Breaker,
    BreakerState,
)


class NoJitter(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker(rng=NoJitter())
    assert [breaker.fail(now) for _ in range(3)] == [False, False, True]
    assert breaker.state is BreakerState.OPEN
    return breaker


def test_three_failures_in_a_row_open_and_a_probe_in_time_closes() -> None:
    breaker = opened(100.0)
    assert breaker.wait_s(100.0) == SHORTEST_OPEN_S
    assert not breaker.begin_probe(100.0 + SHORTEST_OPEN_S - 0.01)
    assert breaker.begin_probe(100.0 + SHORTEST_OPEN_S)
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.begin_probe(200.0)  # one probe at a time
    breaker.end_probe(101.0, succeeded=True)
    assert breaker.state is BreakerState.CLOSED
    assert [breaker.fail(102.0) for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize(("late_in", "opens"), [(1, True), (2, True), (5, False), (20, False)])
def test_one_late_round_in_a_few_opens(late_in: int, opens: bool) -> None:
    breaker = Breaker()
    for index in range(400):
        if index % late_in == 0:
            breaker.fail(float(index))
        else:
            breaker.succeed()
    assert (breaker.state is BreakerState.OPEN) is opens


def test_openings_double_up_to_a_limit_and_are_forgiven() -> None:
    breaker = opened()
    now, waits = 0.0, []
    for _ in range(12):
        waits.append(breaker.wait_s(now))
        now += waits[-1]
        assert breaker.begin_probe(now)
        breaker.end_probe(now, succeeded=False)
    assert waits[:4] == [0.25, 0.5, 1.0, 2.0]
    assert waits[-1] == LONGEST_OPEN_S
    now += LONGEST_OPEN_S
    assert breaker.begin_probe(now)
    breaker.end_probe(now, succeeded=True)
    breaker.open(now + 1.0)  # soon again: as long as before
    assert breaker.wait_s(now + 1.0) == LONGEST_OPEN_S
    now += LONGEST_OPEN_S + 1.0
    assert breaker.begin_probe(now)
    breaker.end_probe(now, succeeded=True)
    now += FORGIVEN_AFTER_S + 1.0
    breaker.open(now)
    assert breaker.wait_s(now) == SHORTEST_OPEN_S


def test_a_longer_first_opening_stays_for_those_behind_it() -> None:
    breaker = Breaker(rng=NoJitter())
    breaker.open(0.0, at_least_s=2.0)
    assert breaker.wait_s(0.0) == 2.0
    assert breaker.begin_probe(2.0)
    breaker.end_probe(2.0, succeeded=False)
    assert breaker.wait_s(2.0) == 4.0


def test_a_probe_that_nobody_began_has_no_end() -> None:
    for breaker in (Breaker(), opened()):
        with pytest.raises(RuntimeError, match="no probe"):
            breaker.end_probe(0.0, succeeded=True)


def test_replicas_come_back_at_different_times() -> None:
    waits = set()
    for seed in range(20):
        breaker = Breaker(rng=random.Random(seed))
        breaker.open(0.0)
        waits.add(breaker.wait_s(0.0))
    assert len(waits) == 20
    assert all(SHORTEST_OPEN_S / 2 <= wait <= SHORTEST_OPEN_S for wait in waits)


@given(st.lists(st.tuples(st.sampled_from("fspeoEO"), st.floats(0.0, 100.0)), max_size=200))
def test_whatever_happens_it_closes_only_behind_a_probe(events: list[tuple[str, float]]) -> None:
    breaker, now = Breaker(rng=random.Random(1)), 0.0
    for event, passed in events:
        before, now = breaker.state, now + passed
        if event == "f":
            breaker.fail(now)
        elif event == "s":
            breaker.succeed()
        elif event == "o":
            breaker.open(now)
        elif event == "p":
            assert breaker.begin_probe(now) is (
                before is BreakerState.OPEN and breaker.state is BreakerState.HALF_OPEN
            )
        elif before is BreakerState.HALF_OPEN:
            breaker.end_probe(now, succeeded=event == "E")
        if before is not BreakerState.CLOSED and breaker.state is BreakerState.CLOSED:
            assert before is BreakerState.HALF_OPEN
            assert event == "E"
        assert 0.0 <= breaker.wait_s(now) <= LONGEST_OPEN_S
