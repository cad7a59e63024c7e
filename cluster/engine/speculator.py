"""What an engine does with one drafter: whether and how it speculates, rounds and calibration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.config import SpeculativeConfig
from cluster.engine.draft_client import DraftClient
from cluster.engine.drafting import Drafting, FeatureReader, RoundSize
from cluster.engine.load import SpeculationLoad
from cluster.engine.planning import RecordObserver, RoundPlanner
from cluster.engine.probe import DraftProbe
from cluster.engine.sampler import SampleOutput
from cluster.engine.scheduler import ScheduledSequence, Scheduler
from cluster.engine.sequence import Sequence
from cluster.request import SpeculationStats
from cluster.speculation.calibration import Calibration
from cluster.speculation.cost_model import CostModel
from cluster.speculation.speculation_plan import (
    PassLoad,
    SpeculationPlan,
    plain_goodput,
    plan_speculation,
)
from cluster.speculation.switch import SpeculationMode, SpeculationSwitch

# Now and then a whole block is drafted, so that it stays known what its end would be worth.
_WHOLE_BLOCK_EVERY = 64
# A round is waited for at least so many times as long as it should take.
_PATIENCE = 4.0
_SHORTEST_WAIT_S = 0.02
# Passes without drafting that are made in a row to see what these deliver.
_PLAIN_PROBE_PASSES = 8
# A plan holds so long while as many requests run: it rests on averages.
_PLAN_PERIOD_S = 0.02
# How often it is looked at what one drafter more, or one fewer, would bring.
_VALUE_PERIOD_S = 0.5
_DEMAND_PERIOD_S = 1.0


@dataclass(frozen=True)
class _Round:
    """A group's round: its size, and how long it should take."""

    size: RoundSize
    seconds: float


class Speculator:
    """Drafts by one drafter, and how much of them to verify; only the engine's thread calls it.

    Before each round it compares, for the load of now, what plain passes, speculative ones and two
    groups in turn should deliver (``SpeculationSwitch``), and how many tokens to draft. All of that
    rests on earlier rounds, so none of it can favour a token by what it is (DESIGN, rule 3).

    An engine that goes over to another drafter gets another speculator, so nothing that was learnt
    of one is ever applied to the next.

    Args:
        config: method, caps, deadlines, and what of the above is fixed.
        client: the drafters.
        calibration: of the drafter's confidences.
        cost_model: of the engine.
        read_features: as for ``Drafting``.
        max_model_len: no guess goes beyond it.
        stats: the engine's totals, in which late and stale proposals are counted.
        num_stages: pipeline stages; with several, as many groups take turns anyway.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        client: DraftClient,
        *,
        calibration: Calibration,
        cost_model: CostModel,
        read_features: FeatureReader,
        max_model_len: int,
        stats: SpeculationStats,
        num_stages: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._client = client
        self._drafting = Drafting(client, config, read_features, max_model_len, stats)
        self._planner = RoundPlanner(config, cost_model, calibration)
        self._cost_model = cost_model
        self._num_stages = num_stages
        self._clock = clock
        self._switch = SpeculationSwitch()
        self._rounds: dict[int, _Round] = {}
        self._probe: DraftProbe | None = None
        self._num_plain_probes_left = 0
        self._num_rounds = 0
        self._expected_accepted = 0.0
        self._plain_goodput = self._goodput = 0.0
        self._added_goodput = self._removed_goodput = 0.0
        self._plan_of_load: tuple[PassLoad, SpeculationPlan] | None = None
        self._planned = self._valued = -math.inf
        self._demand_since = (clock(), 0.0)
        self._demand = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether some drafter can be asked."""
        return self._drafting.is_ready

    @property
    def mode(self) -> SpeculationMode:
        """How passes are made now."""
        return self._switch.mode

    @property
    def num_groups(self) -> int:
        """Groups of sequences that should take turns."""
        return 2 if self.mode is SpeculationMode.GROUPED else self._num_stages

    @property
    def timeout_s(self) -> float:
        """Longest time that a round is waited for."""
        return self._drafting.timeout_s

    @property
    def calibration_error(self) -> float | None:
        """As of ``RoundPlanner``."""
        return self._planner.calibration_error

    @property
    def calibration_drift(self) -> float:
        """As of ``RoundPlanner``."""
        return self._planner.calibration_drift

    def set_observer(self, observer: RecordObserver) -> None:
        """Has a record of every verified proposal passed to ``observer`` (evaluation)."""
        self._planner.set_observer(observer)

    def load(self) -> SpeculationLoad:
        """Mode, flips, and what drafters are asked for."""
        now = self._clock()
        times = self._client.times()
        since, compute_s = self._demand_since
        if now - since >= _DEMAND_PERIOD_S:
            self._demand = max(times.compute_s - compute_s, 0.0) / (now - since)
            self._demand_since = now, times.compute_s
        return SpeculationLoad(
            mode=str(self.mode),
            reason=self._switch.reason if self.is_ready else "no drafter is ready",
            num_flips=self._switch.num_flips,
            seconds_in_state=self._switch.seconds_since_change(now),
            seconds_in_mode={str(m): s for m, s in self._switch.seconds_in_mode(now).items()},
            draft_seconds_per_second=self._demand,
            draft_queue_seconds=times.queue_s,
            draft_network_seconds=times.network_s,
            goodput=self._goodput,
            goodput_plain=self._plain_goodput,
            goodput_added_drafter=self._added_goodput,
            goodput_removed_drafter=self._removed_goodput,
        )

    def collect(self, group: int) -> float:
        """Takes the group's proposals; returns the seconds that were waited for them."""
        if not self._drafting.is_under_way(group):
            self._rounds.pop(group, None)
            return 0.0
        start = self._clock()
        self._drafting.collect(group)
        waited_s = self._clock() - start
        if self._probe is not None:
            self._probe.waited(waited_s)
        return waited_s

    def choose(self, group: int, scheduler: Scheduler) -> dict[Sequence, tuple[int, ...]]:
        """How much of each proposal to verify in the group's next pass."""
        self._expected_accepted = 0.0
        limits = scheduler.draft_limits(group)
        if not limits:
            return {}
        members = scheduler.group_members(group)
        num_requests, num_base_tokens = scheduler.base_load(group)
        done = self._rounds.get(group)
        self._cost_model.draft_seconds = 0.0 if done is None else done.seconds
        self._cost_model.num_groups = self.num_groups
        choice = self._planner.choose(
            limits,
            num_requests=num_requests,
            num_base_tokens=num_base_tokens,
            num_context_tokens=sum(s.num_computed_tokens for s in members),
        )
        self._expected_accepted = choice.expected_accepted
        return choice.draft_token_ids

    def promise(
        self, group: int, num_requests: int, num_tokens: int, num_context_tokens: int
    ) -> PassPromise:
        """What is expected of the group's pass that is about to be launched."""
        done = self._rounds.pop(group, None)
        mode = SpeculationMode.PLAIN
        draft_s = 0.0
        if done is not None and self.mode is not SpeculationMode.PLAIN:
            mode, draft_s = self.mode, done.seconds
        seconds = self._cost_model.pass_seconds(
            num_tokens, num_context_tokens, draft_seconds=draft_s, num_groups=self.num_groups
        )
        return PassPromise(
            mode=mode,
            tokens=num_requests + self._expected_accepted,
            seconds=float(seconds),
            is_probe=done is not None and self.mode is SpeculationMode.PLAIN,
        )

    def delivered(self, promise: PassPromise, num_tokens: int, seconds: float) -> None:
        """What became of a pass that was promised: output tokens, and time since the last one."""
        if promise.is_probe or promise.tokens == 0:
            return
        self._switch.observe(
            promise.mode,
            tokens=num_tokens,
            seconds=seconds,
            promised_tokens=promise.tokens,
            promised_seconds=promise.seconds,
            now=self._clock(),
        )

    def observe(self, entry: ScheduledSequence, sample: SampleOutput) -> None:
        """Learns what became of a proposal; to be called while the sequence still has it."""
        self._planner.observe(entry, sample)

    def announce(self, group: int, sequences: list[Sequence], scheduler: Scheduler) -> None:
        """Decides how to go on, and starts the group's next round where that is by drafting."""
        now = self._clock()
        load = scheduler.load()
        if not self.is_ready:
            self._switch.force_plain("no drafter is ready", now)
        plan = self._decide(load, now)
        if self.mode is SpeculationMode.PLAIN:
            self._probe_drafting(group, sequences, now)
            return
        self._end_probe(now)
        if self._num_plain_probes_left > 0:
            self._num_plain_probes_left -= 1
            if self._num_plain_probes_left == 0 and plan is not None:
                lost = max(1.0 - self._plain_goodput / plan.goodput, 0.0)
                self._switch.probed(lost * plan.pass_seconds * _PLAIN_PROBE_PASSES, now)
            return
        if self._config.switching == "auto" and self._switch.is_probe_due(now):
            self._num_plain_probes_left = _PLAIN_PROBE_PASSES
            return
        self._start_round(group, sequences, load, plan)

    def forget(self, sequence: Sequence) -> None:
        """Ends the sequence's draft session, wherever it is."""
        self._drafting.forget(sequence)

    def close(self) -> None:
        """Ends every connection to drafters."""
        self._drafting.close()

    def _start_round(
        self, group: int, sequences: list[Sequence], load: PassLoad, plan: SpeculationPlan | None
    ) -> None:
        self._num_rounds += 1
        is_whole = self._config.scheduler == "full" or self._num_rounds % _WHOLE_BLOCK_EVERY == 0
        size = self._drafting.announce(
            group,
            sequences,
            max_tokens=None if is_whole or plan is None else plan.num_draft_tokens,
            wait_s=self._longest_wait_s(load, plan),
        )
        if size.num_sessions > 0:
            self._rounds[group] = _Round(size, self._client.predicted_round_s(*size))

    def _longest_wait_s(self, load: PassLoad, plan: SpeculationPlan | None) -> float:
        """Twice the time in which plain passes would make what the round should bring."""
        if plan is None or self._config.switching == "always":
            return math.inf
        num_tokens = load.num_requests / self.num_groups + plan.num_accepted
        verify_s = max(plan.pass_seconds - plan.draft_seconds, 0.0)
        break_even_s = num_tokens / self._plain_goodput - verify_s
        shortest_s = max(_PATIENCE * plan.draft_seconds, _SHORTEST_WAIT_S)
        return max(2 * break_even_s, shortest_s)

    def _decide(self, load: PassLoad, now: float) -> SpeculationPlan | None:
        """Chooses the mode; returns the plan of the best way to speculate.

        Nothing is decided, and the result ``None``, while there is nobody to draft for.
        """
        if load.num_drafting == 0:
            return None
        if self._plan_of_load is not None and now - self._planned < _PLAN_PERIOD_S:
            former_load, plan = self._plan_of_load
            if former_load.num_requests == load.num_requests:
                return plan
        plans = {mode: self._plan(load, mode) for mode in self._possible_modes(load)}
        plain = plain_goodput(load, self._cost_model)
        promised = {mode: plan.goodput for mode, plan in plans.items()}
        promised[SpeculationMode.PLAIN] = plain
        if self.is_ready:
            is_plain_allowed = self._config.switching == "auto"
            self._switch.decide(promised, now, is_plain_allowed=is_plain_allowed)
        best = self.mode
        if best not in plans:
            best = max(plans, key=lambda mode: plans[mode].goodput)
        plan = plans[best]
        self._planned, self._plan_of_load = now, (load, plan)
        correction = self._switch.correction(best, now)
        self._goodput = plan.goodput * correction
        self._plain_goodput = plain * self._switch.correction(SpeculationMode.PLAIN, now)
        if now - self._valued >= _VALUE_PERIOD_S:
            self._valued = now
            more = self._plan(load, best, added_drafters=1)
            fewer = self._plan(load, best, added_drafters=-1)
            self._added_goodput = more.goodput * correction
            self._removed_goodput = fewer.goodput * correction
        return plan

    def _possible_modes(self, load: PassLoad) -> list[SpeculationMode]:
        grouping = self._config.grouping
        can_group = self._num_stages == 1 and load.num_requests > 1 and grouping != "off"
        if can_group and grouping == "always":
            return [SpeculationMode.GROUPED]
        if can_group:
            return [SpeculationMode.SPECULATIVE, SpeculationMode.GROUPED]
        return [SpeculationMode.SPECULATIVE]

    def _plan(
        self, load: PassLoad, mode: SpeculationMode, *, added_drafters: int = 0
    ) -> SpeculationPlan:
        block_size = self._client.block_size or self._config.num_speculative_tokens or 1
        return plan_speculation(
            load,
            profile=self._planner.profile,
            cost_model=self._cost_model,
            draft_seconds=lambda sessions, tokens: self._client.predicted_round_s(
                sessions, tokens, added_drafters=added_drafters
            ),
            max_draft_tokens=block_size,
            num_groups=2 if mode is SpeculationMode.GROUPED else self._num_stages,
        )

    def _probe_drafting(self, group: int, sequences: list[Sequence], now: float) -> None:
        """While nothing is drafted: now and then drafts for a few, to know what it would bring."""
        if self._probe is not None and self._probe.is_over(now):
            self._end_probe(now)
        if self._probe is None:
            if not self.is_ready or not self._switch.is_probe_due(now):
                return
            self._probe = DraftProbe.of(sequences, now)
        members = self._probe.members(sequences)
        size = self._drafting.announce(group, members)
        if size.num_sessions > 0:
            self._probe.num_rounds += 1
            self._rounds[group] = _Round(size, self._client.predicted_round_s(*size))

    def _end_probe(self, now: float) -> None:
        if self._probe is None:
            return
        if self.mode is SpeculationMode.PLAIN:
            for sequence in self._probe.sequences:
                self._drafting.forget(sequence)
        self._switch.probed(self._probe.waited_s, now)
        self._probe = None


@dataclass(frozen=True, kw_only=True)
class PassPromise:
    """What a pass should deliver.

    Attributes:
        mode: how it is made; PLAIN where nothing was drafted for it.
        tokens: output tokens expected.
        seconds: since the pass before it, drafting included as far as it shows.
        is_probe: guesses of a few sequences are in it though nothing else is drafted.
    """

    mode: SpeculationMode
    tokens: float
    seconds: float
    is_probe: bool = False
