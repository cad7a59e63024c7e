"""What an engine does with one drafter: whether and how it speculates, rounds and calibration."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.config import SpeculativeConfig
from cluster.engine.draft_client import DraftClient
from cluster.engine.drafting import Drafting, FeatureReader
from cluster.engine.load import SpeculationLoad
from cluster.engine.planning import RecordObserver, RoundPlanner
from cluster.engine.probe import probe_members
from cluster.engine.sampler import SampleOutput
from cluster.engine.scheduler import ScheduledSequence, Scheduler
from cluster.engine.sequence import Sequence
from cluster.request import SpeculationStats
from cluster.speculation.calibration import Calibration
from cluster.speculation.cost_model import CostModel
from cluster.speculation.speculation_policy import OrderKind, PassPromise, SpeculationPolicy
from cluster.speculation.switch import SpeculationMode, SwitchReason

_DEMAND_PERIOD_S = 1.0


class Speculator:
    """Drafts by one drafter, and how much of them to verify; only the engine's thread calls it.

    Whether and how to draft is decided by ``SpeculationPolicy``; this sends the rounds, waits for
    them and keeps the books.

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
        self._policy = SpeculationPolicy(
            cost_model=cost_model,
            profile=self._planner.profile,
            predict_round=client.predicted_round_s,
            switching=config.switching,
            grouping=self._grouping(config),
            drafts_whole_blocks=config.scheduler == "full",
            num_stages=num_stages,
        )
        self._clock = clock
        self._probed: set[Sequence] | None = None  # while a probe is under way
        self._expected_accepted = 0.0
        self._demand_since = (clock(), 0.0)
        self._demand = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether some drafter can be asked."""
        return self._drafting.is_ready

    @property
    def mode(self) -> SpeculationMode:
        """How passes are made now."""
        return self._policy.mode

    @property
    def num_groups(self) -> int:
        """Groups of sequences that should take turns."""
        return self._policy.num_groups

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

    def use_policy(self, config: SpeculativeConfig) -> None:
        """Goes on as ``config`` says, but for the drafter, which stays; keeps what was learnt."""
        self._config = config
        self._drafting.use_policy(config)
        self._planner.use_scheduler(config.scheduler)
        self._policy.follow(
            switching=config.switching,
            grouping=self._grouping(config),
            drafts_whole_blocks=config.scheduler == "full",
        )

    def load(self) -> SpeculationLoad:
        """Mode, flips, and what drafters are asked for."""
        now = self._clock()
        policy, switch = self._policy, self._policy.switch
        times = self._client.times()
        since, compute_s = self._demand_since
        if now - since >= _DEMAND_PERIOD_S:
            self._demand = max(times.compute_s - compute_s, 0.0) / (now - since)
            self._demand_since = now, times.compute_s
        return SpeculationLoad(
            mode=str(self.mode),
            reason=switch.reason if self.is_ready else "no drafter is ready",
            reason_code=str(switch.reason_code if self.is_ready else SwitchReason.NO_DRAFTER),
            num_flips=switch.num_flips,
            seconds_in_state=switch.seconds_since_change(now),
            seconds_in_mode={str(m): s for m, s in switch.seconds_in_mode(now).items()},
            draft_seconds_per_second=self._demand,
            draft_queue_seconds=times.queue_s,
            draft_network_seconds=times.network_s,
            goodput=policy.goodput,
            goodput_plain=policy.goodput_plain,
            goodput_added_drafter=policy.goodput_added,
            goodput_removed_drafter=policy.goodput_removed,
        )

    def collect(self, group: int) -> float:
        """Takes the group's proposals; returns the seconds that were waited for them."""
        if not self._drafting.is_under_way(group):
            self._policy.drop_round(group)
            return 0.0
        start = self._clock()
        self._drafting.collect(group)
        waited_s = self._clock() - start
        self._policy.waited(waited_s)
        return waited_s

    def choose(self, group: int, scheduler: Scheduler) -> dict[Sequence, tuple[int, ...]]:
        """How much of each proposal to verify in the group's next pass."""
        self._expected_accepted = 0.0
        limits = scheduler.draft_limits(group)
        if not limits:
            return {}
        members = scheduler.group_members(group)
        num_requests, num_base_tokens = scheduler.base_load(group)
        self._policy.prepare(group)
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
        return self._policy.promise(
            group,
            num_requests=num_requests,
            num_tokens=num_tokens,
            num_context_tokens=num_context_tokens,
            expected_accepted=self._expected_accepted,
        )

    def delivered(self, promise: PassPromise, num_tokens: int, seconds: float) -> None:
        """What became of a pass that was promised: output tokens, and time since the last one."""
        self._policy.delivered(promise, num_tokens, seconds, self._clock())

    def observe(self, entry: ScheduledSequence, sample: SampleOutput) -> None:
        """Learns what became of a proposal; to be called while the sequence still has it."""
        self._planner.observe(entry, sample)

    def announce(self, group: int, sequences: list[Sequence], scheduler: Scheduler) -> None:
        """Decides how to go on, and starts the group's next round where that is by drafting."""
        block_size = self._client.block_size or self._config.num_speculative_tokens or 1
        order = self._policy.announce(
            scheduler.load(), self._clock(), is_ready=self.is_ready, max_draft_tokens=block_size
        )
        if order.kind is OrderKind.PROBE:
            self._probed = probe_members(sequences) if self._probed is None else self._probed
            sequences = [sequence for sequence in sequences if sequence in self._probed]
        else:
            self._end_probe()
        if order.kind is OrderKind.NOTHING:
            return
        size = self._drafting.announce(
            group, sequences, max_tokens=order.max_tokens, wait_s=order.wait_s
        )
        self._policy.sent(group, *size)

    def forget(self, sequence: Sequence) -> None:
        """Ends the sequence's draft session, wherever it is."""
        self._drafting.forget(sequence)

    def close(self) -> None:
        """Ends every connection to drafters."""
        self._drafting.close()

    def _grouping(self, config: SpeculativeConfig) -> str:
        """A device that also drafts can hide neither drafting nor verifying."""
        is_hidden = self._client.is_concurrent or config.grouping != "auto"
        return config.grouping if is_hidden else "off"

    def _end_probe(self) -> None:
        if self._probed is not None and self.mode is SpeculationMode.PLAIN:
            for sequence in self._probed:
                self._drafting.forget(sequence)
        self._probed = None
