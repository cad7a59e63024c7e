"""What an engine does with one drafter: its sessions and rounds, its budgets and calibration."""

from __future__ import annotations

import time

from cluster.config import SpeculativeConfig
from cluster.engine.draft_client import DraftClient
from cluster.engine.drafting import Drafting, FeatureReader
from cluster.engine.planning import RecordObserver, RoundPlanner
from cluster.engine.sampler import SampleOutput
from cluster.engine.scheduler import ScheduledSequence, Scheduler
from cluster.engine.sequence import Sequence
from cluster.request import SpeculationStats
from cluster.speculation.calibration import Calibration
from cluster.speculation.cost_model import CostModel


class Speculator:
    """Drafts by one drafter, and how much of them to verify; only the engine's thread calls it.

    An engine that goes over to another drafter gets another speculator, so nothing that was learnt
    of one is ever applied to the next.

    Args:
        config: method, caps and deadlines.
        client: the drafters.
        calibration: of the drafter's confidences.
        cost_model: of the engine; learns the visible time of drafting.
        read_features: as for ``Drafting``.
        max_model_len: no guess goes beyond it.
        stats: the engine's totals, in which late and stale proposals are counted.
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
    ) -> None:
        self._drafting = Drafting(client, config, read_features, max_model_len, stats)
        self._planner = RoundPlanner(config, cost_model, calibration)
        self._cost_model = cost_model

    @property
    def is_ready(self) -> bool:
        """Whether some drafter can be asked."""
        return self._drafting.is_ready

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

    def collect(self, group: int) -> float:
        """Takes the group's proposals; returns the seconds that were waited for them."""
        if not self._drafting.is_under_way(group):
            return 0.0
        start = time.monotonic()
        self._drafting.collect(group)
        waited_s = time.monotonic() - start
        self._cost_model.observe_draft(waited_s)
        return waited_s

    def choose(self, group: int, scheduler: Scheduler) -> dict[Sequence, tuple[int, ...]]:
        """How much of each proposal to verify in the group's next pass."""
        limits = scheduler.draft_limits(group)
        if not limits:
            return {}
        members = scheduler.group_members(group)
        num_requests, num_base_tokens = scheduler.base_load(group)
        return self._planner.choose(
            limits,
            num_requests=num_requests,
            num_base_tokens=num_base_tokens,
            num_context_tokens=sum(s.num_computed_tokens for s in members),
        )

    def observe(self, entry: ScheduledSequence, sample: SampleOutput) -> None:
        """Learns what became of a proposal; to be called while the sequence still has it."""
        self._planner.observe(entry, sample)

    def announce(self, group: int, sequences: list[Sequence]) -> None:
        """Sends what a finished pass has committed, and starts the group's next round."""
        self._drafting.announce(group, sequences)

    def forget(self, sequence: Sequence) -> None:
        """Ends the sequence's draft session, wherever it is."""
        self._drafting.forget(sequence)

    def close(self) -> None:
        """Ends every connection to drafters."""
        self._drafting.close()
