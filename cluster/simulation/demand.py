"""What a simulated replica tells the pool's policy."""

from __future__ import annotations

from cluster.simulation.drafting import Drafting
from cluster.speculation.pool_policy import DraftDemand
from cluster.speculation.switch import SpeculationMode

_PERIOD_S = 1.0


class DraftDemandMeter:
    """The demand of a replica, whose use of drafters is averaged over a second at least."""

    def __init__(self, drafting: Drafting) -> None:
        self._drafting = drafting
        self._since_s = self._compute_s = 0.0
        self._used = 0.0

    def report(self, num_requests: int, now: float) -> DraftDemand:
        """As a replica with so many running requests exports it."""
        links, policy = self._drafting.links, self._drafting.policy
        if now - self._since_s >= _PERIOD_S:
            self._used = (links.compute_s - self._compute_s) / (now - self._since_s)
            self._since_s, self._compute_s = now, links.compute_s
        return DraftDemand(
            num_requests=num_requests,
            is_off=policy.mode is SpeculationMode.PLAIN,
            draft_seconds_per_second=self._used,
            draft_queue_seconds=links.queue_s(),
            goodput=policy.goodput,
            goodput_plain=policy.goodput_plain,
            goodput_added=policy.goodput_added,
            goodput_removed=policy.goodput_removed,
        )
