"""Whether a replica speculates: decisions on promised goodput, corrected by what is delivered."""

from __future__ import annotations

import math
import random

import pytest

from cluster.speculation.switch import (
    SpeculationMode,
    SpeculationSwitch,
    SwitchReason,
    SwitchTiming,
)

PLAIN, SPECULATIVE, GROUPED = SpeculationMode
STEP_S = 0.01


class Machine:
    """A replica whose modes promise and deliver what is set, one pass every 10 ms."""

    def __init__(self, timing: SwitchTiming | None = None) -> None:
        self.switch = SpeculationSwitch(timing or SwitchTiming())
        self.now = 100.0
        self.promised = {PLAIN: 100.0, SPECULATIVE: 100.0}
        self.delivered: dict[SpeculationMode, float] = {}
        self.modes: list[SpeculationMode] = []
        self.num_probes = 0
        self.is_crowded = False

    def run(self, seconds: float) -> SpeculationMode:
        for _ in range(round(seconds / STEP_S)):
            self.now += STEP_S
            mode = self.switch.decide(self.promised, self.now, is_crowded=self.is_crowded)
            self.modes.append(mode)
            probes_plain = mode is not PLAIN and self.switch.is_probe_due(self.now)
            if self.switch.is_probe_due(self.now):
                self.num_probes += 1
                self.switch.probed(STEP_S, self.now)
            made = PLAIN if probes_plain else mode
            promised = self.promised[made]
            self.switch.observe(
                made,
                num_requests=100,
                tokens=self.delivered.get(made, promised) * STEP_S,
                seconds=STEP_S,
                promised_tokens=promised * STEP_S,
                promised_seconds=STEP_S,
                now=self.now,
            )
        return self.switch.mode


def test_it_takes_what_promises_more() -> None:
    machine = Machine()
    machine.promised = {PLAIN: 100.0, SPECULATIVE: 150.0, GROUPED: 120.0}
    assert machine.run(2) is SPECULATIVE
    machine.promised = {PLAIN: 100.0, SPECULATIVE: 80.0, GROUPED: 120.0}
    assert machine.run(2) is GROUPED
    assert machine.switch.num_flips == 0  # both speculate
    machine.promised = {PLAIN: 100.0, SPECULATIVE: 80.0, GROUPED: 60.0}
    assert machine.run(3) is PLAIN
    assert machine.switch.num_flips == 1


def test_less_than_the_margin_changes_nothing() -> None:
    machine = Machine()
    for promised in (102.0, 98.5, 101.5, 98.0):
        machine.promised = {PLAIN: 100.0, SPECULATIVE: promised}
        assert machine.run(3) is SPECULATIVE
    assert machine.switch.num_flips == 0


def test_while_requests_wait_a_draw_is_not_enough() -> None:
    machine = Machine()
    machine.promised = {PLAIN: 100.0, SPECULATIVE: 106.0}
    assert machine.run(2) is SPECULATIVE
    machine.is_crowded = True
    assert machine.run(2) is PLAIN
    assert machine.switch.reason.endswith("over plain decoding")
    machine.is_crowded = False
    assert machine.run(3) is SPECULATIVE
    machine.is_crowded = True
    machine.promised[SPECULATIVE] = 120.0  # what is no draw is taken all the same
    machine.run(3)
    assert machine.run(3) is SPECULATIVE
    assert machine.switch.num_flips <= 4


def test_a_switch_for_those_who_wait_says_so() -> None:
    machine = Machine()
    machine.promised = {PLAIN: 100.0, SPECULATIVE: 102.0}
    machine.run(1)
    machine.is_crowded = True
    while machine.switch.mode is SPECULATIVE:
        machine.run(STEP_S)
    assert machine.switch.reason == "plain promises -2% tokens/s, and requests wait"
    assert machine.switch.reason_code is SwitchReason.GOODPUT


def test_a_load_that_jumps_with_each_step_is_averaged() -> None:
    machine = Machine()
    for _ in range(200):
        machine.promised = {PLAIN: 50.0, SPECULATIVE: 80.0}
        machine.run(STEP_S)
        machine.promised = {PLAIN: 200.0, SPECULATIVE: 150.0}
        machine.run(STEP_S)
    assert set(machine.modes) == {SPECULATIVE}


def test_flips_back_and_forth_become_slow() -> None:
    machine = Machine()
    for index in range(60):
        better = index % 2 == 0
        machine.promised = {PLAIN: 100.0, SPECULATIVE: 150.0 if better else 60.0}
        machine.run(1.0)
    assert machine.switch.num_flips <= 60 / SwitchTiming().max_dwell_s + 5


def test_after_a_calm_time_it_reacts_at_once_again() -> None:
    machine = Machine()
    for _ in range(6):
        for goodput in (50.0, 150.0):
            machine.promised[SPECULATIVE] = goodput
            machine.run(2.0)
    machine.run(SwitchTiming().calm_s + 1)
    assert machine.switch.mode is SPECULATIVE
    machine.promised[SPECULATIVE] = 50.0
    assert machine.run(1.2) is PLAIN


def test_a_mode_that_disappoints_is_left_and_costs_little() -> None:
    """The cost model sees a gain of a fifth where there is a loss of a tenth."""
    machine = Machine()
    machine.promised = {PLAIN: 100.0, SPECULATIVE: 120.0}
    machine.delivered = {SPECULATIVE: 90.0}
    machine.run(20)
    assert machine.switch.mode is PLAIN
    machine.modes.clear()
    machine.run(600)
    share = sum(mode is not PLAIN for mode in machine.modes) / len(machine.modes)
    assert share * 0.1 < 0.005  # of the throughput
    machine.delivered = {}  # whatever it was, it is over
    machine.run(120)
    assert machine.switch.mode is SPECULATIVE


def test_the_luck_of_a_single_request_is_no_evidence() -> None:
    """On a slow device a few passes are seconds; what each of them brings is chance."""
    switch, luck, now = SpeculationSwitch(), random.Random(1), 0.0
    for _ in range(2000):
        now += 0.15
        switch.decide({PLAIN: 10.0, SPECULATIVE: 11.5}, now)
        switch.observe(
            switch.mode,
            num_requests=1,
            tokens=luck.choice((1, 1, 2, 2, 3, 5)),
            seconds=0.15,
            promised_tokens=14 / 6,
            promised_seconds=0.15,
            now=now,
        )
    assert switch.mode is SPECULATIVE
    assert switch.num_flips == 0


def test_plain_passes_that_are_better_than_promised_are_found() -> None:
    """Beside a drafter at work passes are slower, and so all that is predicted of plain ones."""
    machine = Machine()
    machine.promised = {PLAIN: 90.0, SPECULATIVE: 100.0}
    machine.delivered = {PLAIN: 130.0}
    # A probe is a single pass here, where the engine makes eight.
    machine.run(200)
    assert machine.switch.mode is PLAIN


def test_probes_take_their_share_at_most() -> None:
    machine = Machine()
    machine.promised = {PLAIN: 100.0, SPECULATIVE: 50.0}
    machine.run(3)
    assert machine.switch.mode is PLAIN
    machine.num_probes = 0
    machine.run(100)
    assert 5 <= machine.num_probes <= 20  # every five seconds, as a probe of 10 ms may
    machine.switch.probed(0.5, machine.now)
    machine.num_probes = 0
    machine.run(99)
    assert machine.num_probes == 0  # 0.5 s is the share of 100 s


def test_a_great_gain_is_not_interrupted_by_probes() -> None:
    machine = Machine()
    machine.promised = {PLAIN: 100.0, SPECULATIVE: 200.0}
    machine.run(60)
    assert machine.num_probes == 0


def test_without_drafters_it_is_plain_and_comes_back_at_once() -> None:
    machine = Machine()
    machine.promised = {PLAIN: 100.0, SPECULATIVE: 200.0}
    machine.run(5)
    machine.switch.force_plain("no drafter is ready", machine.now, SwitchReason.NO_DRAFTER)
    assert machine.switch.mode is PLAIN
    assert machine.switch.reason == "no drafter is ready"
    assert machine.run(0.05) is SPECULATIVE


def test_a_mode_that_is_not_possible_any_more_is_left() -> None:
    machine = Machine()
    machine.promised = {PLAIN: 100.0, SPECULATIVE: 110.0, GROUPED: 200.0}
    assert machine.run(3) is GROUPED
    del machine.promised[GROUPED]
    assert machine.run(STEP_S) is SPECULATIVE


def test_plain_can_be_forbidden() -> None:
    switch = SpeculationSwitch()
    for step in range(500):
        promised = {PLAIN: 100.0, SPECULATIVE: 10.0, GROUPED: 9.0}
        switch.decide(promised, step * STEP_S, is_plain_allowed=False)
    assert switch.mode is SPECULATIVE


def test_what_one_way_of_drafting_does_not_deliver_is_not_expected_of_the_other() -> None:
    machine = Machine()
    machine.promised = {PLAIN: 100.0, SPECULATIVE: 200.0, GROUPED: 190.0}
    machine.delivered = {SPECULATIVE: 180.0, GROUPED: 170.0}
    machine.run(2)
    machine.promised[GROUPED] = 204.0
    machine.run(20)
    assert machine.switch.correction(GROUPED, machine.now) == pytest.approx(0.9, abs=0.02)
    assert set(machine.modes) == {SPECULATIVE}  # it never looked better by the margin
    machine.promised[GROUPED] = 240.0
    machine.run(2)
    assert GROUPED in machine.modes  # what promises more by itself is tried
    assert machine.switch.correction(GROUPED, machine.now) < 0.8


def test_the_first_decision_takes_the_best_at_once_and_is_no_flip() -> None:
    switch = SpeculationSwitch()
    assert switch.decide({PLAIN: 100.0, SPECULATIVE: 80.0, GROUPED: 60.0}, 5.0) is PLAIN
    assert switch.num_flips == 0
    assert switch.seconds_since_change(5.0) == 0.0
    promised = {PLAIN: 100.0, SPECULATIVE: 180.0, GROUPED: 60.0}
    assert switch.decide(promised, 5.1) is PLAIN  # from now on a mode holds for a while
    assert switch.decide(promised, 6.0) is SPECULATIVE
    assert switch.num_flips == 1


def test_time_in_each_mode_adds_up() -> None:
    machine = Machine()
    machine.run(4)
    machine.promised[SPECULATIVE] = 10.0
    machine.run(6)
    seconds = machine.switch.seconds_in_mode(machine.now)
    assert sum(seconds.values()) == pytest.approx(10 - STEP_S)
    assert seconds[SPECULATIVE] > 4
    assert seconds[PLAIN] > 4


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_impossible_times_teach_nothing(seconds: float) -> None:
    switch = SpeculationSwitch()
    switch.observe(
        PLAIN,
        num_requests=1,
        tokens=1,
        seconds=seconds,
        promised_tokens=1,
        promised_seconds=1,
        now=0.0,
    )
    assert switch.correction(PLAIN, 0.0) == 1.0


def test_a_hiccup_does_not_count_for_more_than_a_pass_twice_as_long() -> None:
    switch = SpeculationSwitch()
    for step in range(200):
        seconds = 2.0 if step == 100 else STEP_S
        switch.observe(
            PLAIN,
            num_requests=100,
            tokens=1,
            seconds=seconds,
            promised_tokens=1,
            promised_seconds=STEP_S,
            now=step * STEP_S,
        )
    assert switch.correction(PLAIN, 200 * STEP_S) == pytest.approx(1.0, abs=0.01)
