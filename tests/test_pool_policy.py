"""How many drafters there should be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.speculation.pool_policy import DraftDemand, PoolPolicy, PoolTiming

_TIMING = PoolTiming(min_gain=0.05, up_s=1.0, down_s=10.0, to_zero_s=20.0, settle_s=2.0)


def _demand(
    *, now: float = 100.0, plain: float = 60.0, added: float, removed: float, is_off: bool = False
) -> DraftDemand:
    return DraftDemand(
        num_requests=8,
        is_off=is_off,
        draft_seconds_per_second=0.0 if is_off else 0.5,
        goodput=now,
        goodput_plain=plain,
        goodput_added=added,
        goodput_removed=removed,
    )


CONTENT = _demand(added=101.0, removed=80.0)
SHORT = _demand(added=110.0, removed=80.0)
AMPLE = _demand(added=100.0, removed=99.5)
OFF = _demand(now=50.0, added=51.0, removed=49.0, is_off=True)
IDLE = DraftDemand(is_off=False)


class Pool:
    """A pool that follows its policy, with drafters that take time to start."""

    def __init__(self, current: int, *, lowest: int = 0, highest: int = 8) -> None:
        self.policy = PoolPolicy(lowest, highest, _TIMING)
        self.current = self.ready = current
        self.now = 50.0
        self.start_s = 3.0
        self._ready_at = 0.0

    def run(self, demands: list[DraftDemand], seconds: float) -> list[int]:
        """What was wanted, tenth of a second by tenth of a second."""
        wanted = []
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            if self.now >= self._ready_at:
                self.ready = self.current
            former = self.current
            self.current = self.policy.decide(
                demands, current=self.current, ready=self.ready, now=self.now
            )
            if self.current < former:
                self.ready = self.current
            elif self.current > former:
                self._ready_at = self.now + self.start_s
            wanted.append(self.current)
        return wanted


def test_a_drafter_that_is_promised_enough_of_comes_within_seconds() -> None:
    pool = Pool(1)
    assert pool.run([CONTENT], 30)[-1] == 1
    wanted = pool.run([SHORT], 3.0)
    assert wanted[5] == 1
    assert wanted[-1] == 2
    assert "+10.0%" in pool.policy.reason


def test_one_starts_at_a_time_and_the_next_waits_for_what_it_brings() -> None:
    pool = Pool(1)
    wanted = pool.run([SHORT], 30)
    changes = [i / 10 for i in range(1, len(wanted)) if wanted[i] != wanted[i - 1]]
    assert changes[0] >= 1.0
    # 3 s to start, 2 s to settle, 1 s of promises.
    assert changes[1] - changes[0] >= 5.9


def test_a_promise_that_does_not_last_changes_nothing() -> None:
    pool = Pool(1)
    pool.run([CONTENT], 5)
    for _ in range(10):
        assert pool.run([SHORT], 0.8)[-1] == 1
        assert pool.run([CONTENT], 0.2)[-1] == 1


def test_the_margin_is_for_a_hundredth_more_drafters_whatever_their_number() -> None:
    # A twentieth more drafters for a hundredth more tokens: an elasticity of 0.2.
    pool = Pool(20, highest=100)
    assert pool.run([_demand(added=101.0, removed=99.0)], 5)[-1] == 25
    pool = Pool(1)
    assert pool.run([_demand(added=101.0, removed=80.0)], 5)[-1] == 1


def test_drafters_that_bring_nothing_go_slowly_and_one_stays() -> None:
    pool = Pool(3)
    wanted = pool.run([AMPLE], 9)
    assert wanted[-1] == 3
    assert pool.run([AMPLE], 40)[-1] == 1
    assert pool.run([AMPLE], 100)[-1] == 1


def test_a_pool_at_rest_neither_grows_nor_shrinks() -> None:
    pool = Pool(2)
    between = _demand(added=101.5, removed=95.0)
    assert set(pool.run([between], 200)) == {2}


def test_off_everywhere_brings_the_pool_to_zero_after_its_time() -> None:
    pool = Pool(3)
    pool.run([CONTENT], 5)
    wanted = pool.run([OFF, OFF], 25)
    assert 0 not in wanted[:195]
    assert wanted[-1] == 0
    assert "off everywhere" in pool.policy.reason


def test_one_replica_that_speculates_keeps_a_drafter() -> None:
    pool = Pool(2)
    assert pool.run([OFF, CONTENT, OFF], 60)[-1] >= 1


def test_a_cluster_that_went_idle_while_it_was_off_goes_to_zero() -> None:
    pool = Pool(1)
    idle_off = DraftDemand(num_requests=0, is_off=True)
    assert pool.run([idle_off, IDLE], 25)[-1] == 0


def test_an_idle_cluster_keeps_one_drafter() -> None:
    pool = Pool(3)
    assert pool.run([IDLE, IDLE], 100)[-1] == 1
    assert pool.run([], 100)[-1] == 1


def test_from_zero_when_it_pays_again() -> None:
    pool = Pool(0)
    assert pool.run([OFF], 30)[-1] == 0
    assert pool.run([IDLE], 30)[-1] == 0
    pays = _demand(now=66.0, added=66.0, removed=66.0, is_off=True)
    wanted = pool.run([pays], 2)
    assert wanted[-1] == 1


def test_gains_of_replicas_are_weighed_by_what_they_do() -> None:
    pool = Pool(1)
    small = _demand(now=10.0, plain=5.0, added=13.0, removed=5.0)
    assert pool.run([small, _demand(now=990.0, added=990.0, removed=700.0)], 5)[-1] == 1


def test_bounds_hold_whatever_is_promised() -> None:
    assert Pool(3, highest=3).run([SHORT], 30)[-1] == 3
    assert Pool(1, lowest=1).run([OFF], 60)[-1] == 1
    assert Pool(0, lowest=2).run([IDLE], 0.2)[-1] == 2
    with pytest.raises(ValueError, match="bounds"):
        PoolPolicy(3, 2)


@given(
    st.lists(
        st.lists(st.sampled_from([CONTENT, SHORT, AMPLE, OFF, IDLE]), max_size=3),
        min_size=1,
        max_size=12,
    )
)
def test_decisions_stay_in_bounds_and_changes_are_apart(phases: list[list[DraftDemand]]) -> None:
    pool = Pool(1, lowest=0, highest=4)
    wanted = [1]
    for phase in phases:
        wanted += pool.run(phase, 2.0)
    assert all(0 <= count <= 4 for count in wanted)
    changes = [i for i in range(1, len(wanted)) if wanted[i] != wanted[i - 1]]
    # Each needs its dwell: no two within a second.
    assert all(after - before >= 10 for before, after in itertools.pairwise(changes))
