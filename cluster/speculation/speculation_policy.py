"""When and how a replica drafts, pass by pass: every decision of it, and none of the doing.

The engine (``cluster.engine.speculator``) and the simulator of fleets run this same object: one
sends rounds and waits for them, the other imagines them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.speculation.cost_model import CostModel
from cluster.speculation.speculation_plan import (
    PassLoad,
    SpeculationPlan,
    plain_goodput,
    plan_speculation,
)
from cluster.speculation.survival_profile import SurvivalProfile
from cluster.speculation.switch import SpeculationMode, SpeculationSwitch, SwitchReason

# Now and then a whole block is drafted, so that it stays known what its end would be worth.
_WHOLE_BLOCK_EVERY = 64
# A round is waited for at least so many times as long as it should take.
_PATIENCE = 4.0
_SHORTEST_WAIT_S = 0.02
# Passes without drafting that are made in a row to see what these deliver.
_PLAIN_PROBE_PASSES = 8
# A probe of drafting while nothing else is drafted.
_PROBE_ROUNDS = 3
_LONGEST_PROBE_S = 1.0
# A plan holds so long while as many requests run: it rests on averages.
_PLAN_PERIOD_S = 0.02
# How often it is looked at what one drafter more, or one fewer, would bring.
_VALUE_PERIOD_S = 0.5


class RoundPredictor(Protocol):
    """Seconds of a round from sending it to its last answer; as ``DraftClient`` has it."""

    def __call__(
        self, num_sessions: float, num_tokens: int, *, added_drafters: int = 0
    ) -> float: ...


class Planner(Protocol):
    """``plan_speculation``."""

    def __call__(
        self,
        load: PassLoad,
        *,
        profile: SurvivalProfile,
        cost_model: CostModel,
        draft_seconds: Callable[[float, int], float],
        max_draft_tokens: int,
        num_groups: int,
    ) -> SpeculationPlan: ...


class OrderKind(enum.Enum):
    """What is drafted behind a pass."""

    NOTHING = "nothing"
    PROBE = "probe"  # for a few sequences, to see what it would bring
    ROUND = "round"


@dataclass(frozen=True, kw_only=True)
class RoundOrder:
    """What to draft for the group whose pass has ended.

    Attributes:
        max_tokens: for each sequence; unset: as many as the drafter has.
        wait_s: longest time that the round is worth waiting for.
    """

    kind: OrderKind
    max_tokens: int | None = None
    wait_s: float = math.inf


@dataclass(frozen=True, kw_only=True)
class PassPromise:
    """What a pass should deliver.

    Attributes:
        mode: how it is made; PLAIN where nothing was drafted for it.
        num_requests: that sample in it.
        tokens: output tokens expected.
        seconds: since the pass before it, drafting included as far as it shows.
        host_seconds: thereof the host's between passes.
        is_typical: whether it says something of its mode. A pass does not with guesses of a few
            sequences while nothing else is drafted, or with guesses left from before the groups
            changed.
    """

    mode: SpeculationMode
    num_requests: int
    tokens: float
    seconds: float
    host_seconds: float = 0.0
    is_typical: bool = True


@dataclass
class _Probe:
    """A few rounds of a few sequences, while nothing else is drafted."""

    started: float
    num_rounds: int = 0
    waited_s: float = 0.0

    def is_over(self, now: float) -> bool:
        """Whether it has seen enough, or will see nothing."""
        return self.num_rounds >= _PROBE_ROUNDS or now - self.started > _LONGEST_PROBE_S


class SpeculationPolicy:
    """Compares plain passes, speculative ones and two groups in turn, for the load of now.

    Everything it decides on is known before the round at hand is drafted, so that nothing it
    decides can favour a token by what it is (DESIGN, rule 3).

    Calls in order, for each group: ``announce`` behind a pass; ``sent`` with the size of the round
    that became of it; ``prepare`` before the budget of the next pass is chosen; ``promise`` when it
    is launched; ``delivered`` when it has ended.

    Args:
        cost_model: of the replica; whoever owns it keeps it current.
        profile: survival in earlier rounds; whoever plans budgets keeps it current.
        predict_round: what rounds take.
        switching: "auto", or "always" to speculate whatever it promises.
        grouping: "auto", "off" or "always".
        drafts_whole_blocks: whole blocks are drafted whatever is planned.
        num_stages: pipeline stages; with several, as many groups take turns anyway.
        values_drafters: whether ``goodput_added`` and ``goodput_removed`` are looked at: for a pool
            whose size can change.
        plan: ``plan_speculation``, or what remembers plans that it has made.

    Attributes:
        switch: between the modes.
        goodput: tokens per second that speculating promises at the load of the last decision;
            ``goodput_plain``: plain passes; ``goodput_added`` and ``goodput_removed``: speculating
            with a drafter more and with one fewer, looked at twice a second.
    """

    def __init__(
        self,
        *,
        cost_model: CostModel,
        profile: SurvivalProfile,
        predict_round: RoundPredictor,
        switching: str = "auto",
        grouping: str = "auto",
        drafts_whole_blocks: bool = False,
        num_stages: int = 1,
        values_drafters: bool = True,
        plan: Planner = plan_speculation,
    ) -> None:
        self._plan_speculation = plan
        self._cost_model = cost_model
        self._profile = profile
        self._predict_round = predict_round
        self._num_stages = num_stages
        self._values_drafters = values_drafters
        self.switch = SpeculationSwitch()
        self.goodput = self.goodput_plain = 0.0
        self.goodput_added = self.goodput_removed = 0.0
        self._round_s: dict[int, float] = {}  # by group
        self._num_rounds = 0
        self._probe: _Probe | None = None
        self._num_plain_probes_left = 0
        self._plan_of_load: tuple[PassLoad, SpeculationPlan] | None = None
        self._planned = self._valued = -math.inf
        self.follow(switching=switching, grouping=grouping, drafts_whole_blocks=drafts_whole_blocks)

    @property
    def mode(self) -> SpeculationMode:
        """How passes are made now."""
        return self.switch.mode

    @property
    def num_groups(self) -> int:
        """Groups of sequences that should take turns."""
        return 2 if self.mode is SpeculationMode.GROUPED else self._num_stages

    def follow(self, *, switching: str, grouping: str, drafts_whole_blocks: bool) -> None:
        """Goes on with other settings, as the constructor takes them; keeps what was learnt."""
        self._is_switching = switching == "auto"
        self._grouping = grouping
        self._drafts_whole_blocks = drafts_whole_blocks
        self._plan_of_load = None

    def announce(
        self, load: PassLoad, now: float, *, is_ready: bool, max_draft_tokens: int
    ) -> RoundOrder:
        """Decides how to go on behind a pass.

        Args:
            load: of now, all groups together.
            now: monotonic seconds.
            is_ready: whether some drafter can be asked.
            max_draft_tokens: most that it drafts in a round, at least 1.
        """
        if not is_ready:
            self.switch.force_plain("no drafter is ready", now, SwitchReason.NO_DRAFTER)
        plan = self._decide(load, now, is_ready, max_draft_tokens)
        if self.mode is SpeculationMode.PLAIN:
            return self._probe_drafting(now, is_ready)
        self._end_probe(now)
        if self._num_plain_probes_left > 0:
            self._num_plain_probes_left -= 1
            if self._num_plain_probes_left == 0 and plan is not None:
                lost = max(1.0 - self.goodput_plain / plan.goodput, 0.0)
                self.switch.probed(lost * plan.pass_seconds * _PLAIN_PROBE_PASSES, now)
            return RoundOrder(kind=OrderKind.NOTHING)
        if self._is_switching and self.switch.is_probe_due(now):
            self._num_plain_probes_left = _PLAIN_PROBE_PASSES
            return RoundOrder(kind=OrderKind.NOTHING)
        self._num_rounds += 1
        is_whole = self._drafts_whole_blocks or self._num_rounds % _WHOLE_BLOCK_EVERY == 0
        return RoundOrder(
            kind=OrderKind.ROUND,
            max_tokens=None if is_whole or plan is None else plan.num_draft_tokens,
            wait_s=self._longest_wait_s(load, plan),
        )

    def sent(self, group: int, num_sessions: int, num_tokens: int) -> None:
        """The ordered round is under way, with so many sequences (0: there is none)."""
        if num_sessions > 0:
            self._round_s[group] = self._predict_round(num_sessions, num_tokens)
            if self._probe is not None:
                self._probe.num_rounds += 1

    def waited(self, seconds: float) -> None:
        """So long was waited for a round's answer."""
        if self._probe is not None:
            self._probe.waited_s += seconds

    def drop_round(self, group: int) -> None:
        """The group's next pass has no round."""
        self._round_s.pop(group, None)

    def prepare(self, group: int) -> None:
        """Tells the cost model what was drafted for the group's next pass."""
        self._cost_model.draft_seconds = self._round_s.get(group, 0.0)
        self._cost_model.num_groups = self.num_groups

    def promise(
        self,
        group: int,
        *,
        num_requests: int,
        num_tokens: int,
        num_context_tokens: int,
        expected_accepted: float,
    ) -> PassPromise:
        """What is expected of the group's pass that is about to be launched.

        Args:
            num_requests: that sample in it.
            num_tokens: in its batch, guesses included.
            num_context_tokens: cached tokens of its sequences.
            expected_accepted: of the guesses.
        """
        round_s = self._round_s.pop(group, None)
        mode = SpeculationMode.PLAIN if round_s is None else self.mode
        model = self._cost_model
        if round_s is None or mode is SpeculationMode.PLAIN:
            host_s, seconds = 0.0, model.verify_seconds(num_tokens, num_context_tokens)
        else:
            host_s = model.host_seconds
            seconds = float(
                model.pass_seconds(
                    num_tokens,
                    num_context_tokens,
                    draft_seconds=round_s,
                    num_groups=self.num_groups,
                )
            )
        return PassPromise(
            mode=mode,
            num_requests=num_requests,
            tokens=num_requests + expected_accepted,
            seconds=seconds,
            host_seconds=host_s,
            is_typical=mode is not SpeculationMode.PLAIN or expected_accepted == 0,
        )

    def delivered(
        self,
        promise: PassPromise,
        num_tokens: float,
        seconds: float,
        now: float,
        *,
        num_passes: int = 1,
    ) -> None:
        """What became of a promised pass.

        Args:
            num_tokens: output tokens.
            seconds: since the pass before it.
            num_passes: like this one, in a row, of all of which the other numbers are.
        """
        if not promise.is_typical or promise.tokens == 0:
            return
        self.switch.observe(
            promise.mode,
            num_requests=promise.num_requests * num_passes,
            tokens=num_tokens,
            seconds=seconds,
            promised_tokens=promise.tokens * num_passes,
            promised_seconds=promise.seconds * num_passes,
            now=now,
        )
        if promise.mode is not SpeculationMode.PLAIN:
            host_s = seconds / num_passes - (promise.seconds - promise.host_seconds)
            self._cost_model.observe_host(host_s, promise.seconds)

    def _longest_wait_s(self, load: PassLoad, plan: SpeculationPlan | None) -> float:
        """Twice the time in which plain passes would make what the round should bring."""
        if plan is None or not self._is_switching:
            return math.inf
        num_tokens = load.num_requests / self.num_groups + plan.num_accepted
        verify_s = max(num_tokens / plan.goodput - plan.draft_seconds, 0.0)
        break_even_s = num_tokens / self.goodput_plain - verify_s
        shortest_s = max(_PATIENCE * plan.draft_seconds, _SHORTEST_WAIT_S)
        return max(2 * break_even_s, shortest_s)

    def _decide(
        self, load: PassLoad, now: float, is_ready: bool, max_draft_tokens: int
    ) -> SpeculationPlan | None:
        """Chooses the mode; returns the plan of the best way to speculate.

        Nothing is decided, and the result ``None``, while there is nobody to draft for.
        """
        if load.num_drafting == 0:
            return None
        if self._plan_of_load is not None and now - self._planned < _PLAN_PERIOD_S:
            former_load, plan = self._plan_of_load
            if former_load.num_requests == load.num_requests:
                return plan
        modes = self._possible_modes(load)
        plans = {mode: self._plan(load, mode, max_draft_tokens) for mode in modes}
        plain = plain_goodput(load, self._cost_model)
        promised = {mode: plan.goodput for mode, plan in plans.items()}
        promised[SpeculationMode.PLAIN] = plain
        if is_ready:
            self.switch.decide(
                promised,
                now,
                is_plain_allowed=self._is_switching,
                is_crowded=load.is_crowded,
            )
        best = self.mode
        if best not in plans:
            best = max(plans, key=lambda mode: plans[mode].goodput)
        plan = plans[best]
        self._planned, self._plan_of_load = now, (load, plan)
        correction = self.switch.correction(best, now)
        self.goodput = plan.goodput * correction
        self.goodput_plain = plain * self.switch.correction(SpeculationMode.PLAIN, now)
        if self._values_drafters and now - self._valued >= _VALUE_PERIOD_S:
            self._valued = now
            more = self._plan(load, best, max_draft_tokens, added_drafters=1)
            fewer = self._plan(load, best, max_draft_tokens, added_drafters=-1)
            self.goodput_added = more.goodput * correction
            self.goodput_removed = fewer.goodput * correction
        return plan

    def _possible_modes(self, load: PassLoad) -> list[SpeculationMode]:
        can_group = self._num_stages == 1 and load.num_requests > 1 and self._grouping != "off"
        if can_group and self._grouping == "always":
            return [SpeculationMode.GROUPED]
        if can_group:
            return [SpeculationMode.SPECULATIVE, SpeculationMode.GROUPED]
        return [SpeculationMode.SPECULATIVE]

    def _plan(
        self,
        load: PassLoad,
        mode: SpeculationMode,
        max_draft_tokens: int,
        *,
        added_drafters: int = 0,
    ) -> SpeculationPlan:
        return self._plan_speculation(
            load,
            profile=self._profile,
            cost_model=self._cost_model,
            draft_seconds=lambda sessions, tokens: self._predict_round(
                sessions, tokens, added_drafters=added_drafters
            ),
            max_draft_tokens=max_draft_tokens,
            num_groups=2 if mode is SpeculationMode.GROUPED else self._num_stages,
        )

    def _probe_drafting(self, now: float, is_ready: bool) -> RoundOrder:
        """While nothing is drafted: now and then drafts for a few, to know what it would bring."""
        if self._probe is not None and self._probe.is_over(now):
            self._end_probe(now)
        if self._probe is None:
            if not is_ready or not self.switch.is_probe_due(now):
                return RoundOrder(kind=OrderKind.NOTHING)
            self._probe = _Probe(now)
        return RoundOrder(kind=OrderKind.PROBE)

    def _end_probe(self, now: float) -> None:
        if self._probe is not None:
            self.switch.probed(self._probe.waited_s, now)
            self._probe = None
