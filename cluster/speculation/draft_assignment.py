"""Which drafter drafts for which of a replica's sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# A drafter on another host takes part of the network that one on this host spares: it counts as so
# much slower than it is.
_FAR_COST = 1.25
# A session moves where its new drafter will still be so much better off than the old one was: what
# it costs to build its state anew is not for a trifle.
_MOVE_MARGIN = 1.25


@dataclass(frozen=True)
class DrafterLoad:
    """One drafter that can be asked, as a replica sees it.

    Attributes:
        num_sessions: of this replica.
        round_s: what a round takes there, queue and network included; above 0.
        is_near: whether it runs on the replica's own host.
    """

    num_sessions: int
    round_s: float
    is_near: bool = False

    def cost(self, num_sessions: int) -> float:
        """How badly off it would be with so many sessions."""
        return num_sessions * self.round_s * (1.0 if self.is_near else _FAR_COST)


def choose_drafter(loads: Sequence[DrafterLoad]) -> int:
    """The drafter for a new session, as an index.

    Sessions go to drafters in inverse proportion to what a round takes there; so to equal ones
    evenly, to a busy one or one behind a slow network less.

    Args:
        loads: at least one.
    """
    return min(range(len(loads)), key=lambda i: loads[i].cost(loads[i].num_sessions + 1))


def sessions_to_move(loads: Sequence[DrafterLoad], limit: int) -> list[int]:
    """How many sessions should leave each drafter, for ``choose_drafter`` to place them anew.

    Nothing moves where drafters are about as well off as they could be. What is left over when
    these have moved is no more than before, so that repeated calls come to rest.

    Args:
        limit: most sessions that move in all.
    """
    counts = [load.num_sessions for load in loads]
    leaving = [0] * len(loads)
    for _ in range(limit):
        worst = max(range(len(loads)), key=lambda i: loads[i].cost(counts[i]), default=0)
        best = min(range(len(loads)), key=lambda i: loads[i].cost(counts[i] + 1), default=0)
        gained = math.inf
        if loads and counts[worst] > 0:
            gained = loads[best].cost(counts[best] + 1) * _MOVE_MARGIN
        if worst == best or gained > loads[worst].cost(counts[worst]):
            break
        counts[worst] -= 1
        counts[best] += 1
        leaving[worst] += 1
    return leaving
