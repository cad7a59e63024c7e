"""The decisions behind each pass, without an engine."""

from __future__ import annotations

import math

from cluster.speculation.cost_model import CostModel
from cluster.speculation.speculation_plan import PassLoad
from cluster.speculation.speculation_policy import OrderKind, RoundOrder, SpeculationPolicy
from cluster.speculation.survival_profile import SurvivalProfile
from cluster.speculation.switch import SpeculationMode

FLAT = {1: 0.01, 64: 0.01, 128: 0.02, 256: 0.04}
BLOCK = 4


class Machine:
    """A policy, and the time."""

    def __init__(
        self,
        round_s: float,
        *,
        switching: str = "auto",
        grouping: str = "off",
        curve: dict[int, float] = FLAT,
    ) -> None:
        self.policy = SpeculationPolicy(
            cost_model=CostModel(curve),
            profile=SurvivalProfile(),
            predict_round=lambda sessions, tokens, *, added_drafters=0: round_s,
            switching=switching,
            grouping=grouping,
        )
        self.now = 0.0

    def announce(self, num_requests: int, *, is_ready: bool = True) -> RoundOrder:
        self.now += 0.05
        load = PassLoad(
            num_requests=num_requests,
            num_drafting=num_requests,
            num_base_tokens=num_requests,
            num_context_tokens=0,
        )
        return self.policy.announce(load, self.now, is_ready=is_ready, max_draft_tokens=BLOCK)


def test_a_cheap_round_is_ordered_and_an_endless_one_is_not() -> None:
    cheap, dear = Machine(0.001), Machine(1.0)
    for _ in range(40):
        order = cheap.announce(2)
        refused = dear.announce(2)
    assert order.kind is OrderKind.ROUND
    assert order.max_tokens is not None
    assert 1 <= order.max_tokens <= BLOCK
    assert 0.02 <= order.wait_s < math.inf
    assert refused.kind is OrderKind.NOTHING
    assert dear.policy.mode is SpeculationMode.PLAIN


def test_without_a_drafter_nothing_is_ordered() -> None:
    machine = Machine(0.001, switching="always")
    assert machine.announce(2, is_ready=False).kind is OrderKind.NOTHING
    assert machine.announce(2).kind is OrderKind.ROUND


def test_a_probe_is_three_rounds_and_then_a_pause() -> None:
    machine = Machine(1.0)
    kinds = []
    for _ in range(200):
        order = machine.announce(2)
        kinds.append(order.kind)
        machine.policy.sent(0, 2 if order.kind is OrderKind.PROBE else 0, BLOCK)
    first = kinds.index(OrderKind.PROBE)
    assert kinds[first : first + 3] == [OrderKind.PROBE] * 3
    assert OrderKind.PROBE not in kinds[first + 3 : first + 90]


def test_a_promise_is_of_the_round_that_was_sent() -> None:
    machine = Machine(0.001)
    machine.announce(2)
    machine.policy.sent(0, 2, BLOCK)
    machine.policy.prepare(0)
    promise = machine.policy.promise(
        0, num_requests=2, num_tokens=6, num_context_tokens=0, expected_accepted=3.0
    )
    assert promise.mode is SpeculationMode.SPECULATIVE
    assert promise.tokens == 5.0
    assert math.isclose(promise.seconds, 0.011)
    plain = machine.policy.promise(
        0, num_requests=2, num_tokens=2, num_context_tokens=0, expected_accepted=0.0
    )
    assert plain.mode is SpeculationMode.PLAIN
    assert math.isclose(plain.seconds, 0.01)
    assert promise.is_typical
    assert plain.is_typical


def test_guesses_of_another_time_say_nothing_of_plain_passes() -> None:
    machine = Machine(0.001)
    machine.announce(2)
    left = machine.policy.promise(
        1, num_requests=2, num_tokens=6, num_context_tokens=0, expected_accepted=3.0
    )
    assert not left.is_typical
    for _ in range(50):
        machine.policy.delivered(left, 5, 0.04, machine.now)
    correction = machine.policy.switch.correction(SpeculationMode.PLAIN, machine.now)
    assert correction == 1.0


def _run_with_host_work(host_s: float) -> Machine:
    """Eight sequences whose passes take 10 ms, half of them 7.5, and rounds as long as that."""
    machine = Machine(
        0.0075, switching="always", grouping="auto", curve={1: 0.005, 20: 0.0075, 40: 0.01}
    )
    for number in range(400):
        machine.announce(8)
        group = number % machine.policy.num_groups
        num_requests = 8 // machine.policy.num_groups
        machine.policy.sent(group, num_requests, BLOCK)
        machine.policy.prepare(group)
        promise = machine.policy.promise(
            group,
            num_requests=num_requests,
            num_tokens=5 * num_requests,
            num_context_tokens=0,
            expected_accepted=2 * num_requests,
        )
        took_s = promise.seconds - promise.host_seconds + host_s
        machine.policy.delivered(promise, 3 * num_requests, took_s, machine.now)
    return machine


def test_host_work_counts_for_each_pass() -> None:
    free, busy = _run_with_host_work(0.0), _run_with_host_work(0.004)
    # For all eight: 15 ms in two groups, 17.5 in one; with host work 23 and 21.5.
    assert free.policy.mode is SpeculationMode.GROUPED
    assert busy.policy.mode is SpeculationMode.SPECULATIVE
