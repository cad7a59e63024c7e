"""What a drafter's rounds took, and what became of them, as one replica saw it."""

from __future__ import annotations

from cluster.engine.pace import PaceStats
from cluster.histogram import Histogram
from cluster.rpc.convert import pace_from_proto
from cluster.rpc.draft_messages import decode_curve
from cluster.rpc.draft_session import DraftClientStats, PendingRound
from cluster.speculation.draft_cost import DraftCost
from cluster.v1 import drafter_pb2

_AVERAGE_WEIGHT = 0.1
_ROUND_TRIP_BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class DrafterTimes:
    """Learns from each answered round.

    Args:
        stats: of all drafters together; counted into.

    Attributes:
        cost: what rounds take; from the last stream while there is none.
        paced: of the drafter, if it is.
        round_trip_s: moving average; 0 before the first answer.
        round_trips: all of them.
        num_rounds: by what became of them: answered, late, dropped or lost.
    """

    def __init__(self, stats: DraftClientStats) -> None:
        self.cost = DraftCost()
        self.paced: PaceStats | None = None
        self.round_trip_s = 0.0
        self.round_trips = Histogram(_ROUND_TRIP_BOUNDS_S)
        self.num_rounds = dict.fromkeys(("answered", "late", "dropped", "lost"), 0)
        self._stats = stats

    def begin(self, welcome: drafter_pb2.DraftResponse.Welcome) -> None:
        """A new stream begins with this greeting.

        Raises:
            MalformedProposalError: its curve is none.
        """
        has_curve = welcome.HasField("draft_curve")
        self.cost = DraftCost(decode_curve(welcome.draft_curve) if has_curve else None)
        self.paced = pace_from_proto(welcome)

    def observe(
        self,
        answer: drafter_pb2.DraftResponse.Proposals,
        pending: PendingRound,
        received_at: float,
    ) -> None:
        """An answer has come at ``received_at``, in time or not."""
        stats = self._stats
        round_trip_s = received_at - pending.sent_at
        # A drafter may say anything; nothing of it took longer than the whole.
        compute_s = min(answer.compute_seconds, round_trip_s)
        queue_s = min(answer.queue_seconds, round_trip_s - compute_s)
        network_s = round_trip_s - compute_s - queue_s
        self.cost.observe(
            len(pending.sequences),
            max(s.num_speculative_tokens for s in pending.sequences.values()),
            compute_s=compute_s,
            queue_s=queue_s,
            network_s=network_s,
            now=received_at,
        )
        self.paced = pace_from_proto(answer)
        self.round_trips.observe(round_trip_s)
        self.round_trip_s = _average(self.round_trip_s, round_trip_s)
        stats.compute_s += compute_s
        stats.round_trip_s = _average(stats.round_trip_s, round_trip_s)
        stats.network_s = _average(stats.network_s, network_s)


def _average(average: float, value: float) -> float:
    return value if average == 0.0 else average + _AVERAGE_WEIGHT * (value - average)
