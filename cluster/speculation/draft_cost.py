"""What a round of drafting takes, here and now: the drafter's pass, its queue and the network."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.speculation.draft_curve import DraftCurve

# Between two rounds a queue is forgotten with this time constant, in seconds: a drafter that was
# busy when it was last asked may long be idle.
_QUEUE_MEMORY_S = 5.0
# One round may tell at most that the pass took this many times longer, or shorter, than predicted.
_MAX_SURPRISE = math.log(4.0)


class DraftCost:
    """Predicts one drafter's rounds, and learns from each.

    Guarantees: what is predicted is positive and never falls with more sessions or tokens. The
    curve's shape stays the drafter's own; what is learnt is its scale (which covers other replicas'
    sessions in the same pass), the queue and the network.

    Args:
        curve: of the drafter's passes; unset: a pass of any size takes as long as the last ones.
        smoothing: weight of a new round, in (0, 1].
    """

    def __init__(self, curve: DraftCurve | None = None, *, smoothing: float = 0.1) -> None:
        self._curve = curve or DraftCurve.of_sessions({1: 1e-3})
        self._smoothing = smoothing
        self._scale = 1.0
        self._network_s = 0.0
        self._queue_s = 0.0
        self._last_round = -math.inf

    @property
    def network_s(self) -> float:
        """Average time between replica and drafter, there and back."""
        return self._network_s

    def queue_s(self, now: float) -> float:
        """Time that a round is expected to wait on the drafter (``now``: monotonic seconds)."""
        idle_s = max(now - self._last_round, 0.0)
        return self._queue_s * math.exp(-idle_s / _QUEUE_MEMORY_S)

    def compute_s(self, num_sessions: float, num_tokens: float) -> float:
        """Time of the drafter's pass for so many sessions, and tokens for each."""
        return self._scale * float(self._curve.seconds(num_sessions, num_tokens))

    def round_trip_s(self, num_sessions: float, num_tokens: float, now: float) -> float:
        """Time from sending a round to its answer."""
        return self._network_s + self.queue_s(now) + self.compute_s(num_sessions, num_tokens)

    def observe(
        self,
        num_sessions: int,
        num_tokens: int,
        *,
        compute_s: float,
        queue_s: float,
        network_s: float,
        now: float,
    ) -> None:
        """Learns from an answered round, as the drafter and the replica's clock timed it."""
        if min(compute_s, queue_s) < 0 or not math.isfinite(compute_s + queue_s + network_s):
            return
        network_s = max(network_s, 0.0)
        if compute_s > 0:
            surprise = math.log(compute_s / self.compute_s(num_sessions, num_tokens))
            surprise = min(max(surprise, -_MAX_SURPRISE), _MAX_SURPRISE)
            self._scale *= math.exp(self._smoothing * surprise)
        is_first = self._last_round == -math.inf
        weight = 1.0 if is_first else self._smoothing
        former_queue_s = self.queue_s(now)
        self._queue_s = former_queue_s + weight * (queue_s - former_queue_s)
        self._network_s += weight * (network_s - self._network_s)
        self._last_round = now


def spread_round_s(
    costs: Sequence[DraftCost],
    num_sessions: float,
    num_tokens: float,
    now: float,
    *,
    added_drafters: int = 0,
) -> float:
    """Time of a round that is spread evenly over several drafters, until its last answer.

    Args:
        costs: of each drafter, at least one.
        num_sessions: in the round.
        num_tokens: drafted for each.
        now: monotonic seconds.
        added_drafters: as if there were so many more, or fewer (never less than one); what waits on
            drafters is then spread over more of them, or over fewer.
    """
    count = max(len(costs) + added_drafters, 1)
    share = max(num_sessions / count, 1.0)
    times = [
        cost.network_s + cost.queue_s(now) * len(costs) / count + cost.compute_s(share, num_tokens)
        for cost in costs
    ]
    return max(times)
