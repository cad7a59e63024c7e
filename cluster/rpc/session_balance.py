"""How a replica spreads its sessions over its drafters, and moves them when drafters come."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence

from cluster.rpc.draft_session import ClientSession
from cluster.rpc.drafter_connection import DrafterConnection
from cluster.speculation.draft_assignment import DrafterLoad, choose_drafter, sessions_to_move

# A session that moves decodes plainly for a round or two, and its features are sent again: an
# eighth of all at a time, so often.
_PERIOD_S = 0.25
_SHARE = 8
_UNKNOWN_ROUND_S = 1e-3  # before the first round of any drafter


class SessionBalance:
    """Places sessions, and says which ones are better off elsewhere.

    Args:
        host: of the replica: drafters on it come first.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._next = 0.0

    def choose(self, connections: Sequence[DrafterConnection]) -> DrafterConnection:
        """The drafter for a new session; ``connections`` are ready, and at least one."""
        return connections[choose_drafter(self._loads(connections, time.monotonic()))]

    def leaving(
        self,
        connections: Sequence[DrafterConnection],
        sessions: Collection[ClientSession],
        now: float,
        *,
        retired: Collection[DrafterConnection] = (),
    ) -> Iterable[ClientSession]:
        """Sessions that should be placed anew now: few at a time, the shortest first.

        Args:
            connections: that are ready.
            sessions: of the replica.
            now: monotonic seconds.
            retired: connections of drafters that are being stopped; their sessions go first.
        """
        if now < self._next or any(s.is_leaving for s in sessions):
            return
        stranded = [s for s in sessions if s.connection in retired and s.is_live]
        if len(connections) + bool(stranded) < 2 or not connections:
            return
        self._next = now + _PERIOD_S
        limit = max(len(sessions) // _SHARE, 1)
        if stranded:
            stranded.sort(key=lambda session: session.acknowledged_length)
            yield from stranded[:limit]
            return
        numbers = sessions_to_move(self._loads(connections, now), limit)
        for connection, number in zip(connections, numbers, strict=True):
            if number > 0:
                here = [s for s in sessions if s.connection is connection and s.is_live]
                here.sort(key=lambda session: session.acknowledged_length)
                yield from here[:number]

    def _loads(self, connections: Sequence[DrafterConnection], now: float) -> list[DrafterLoad]:
        share = max(sum(c.num_sessions for c in connections) / len(connections), 1.0)
        seconds = {
            connection: connection.cost.round_trip_s(share, connection.block_size, now)
            for connection in connections
            if connection.has_answered
        }
        # One that has not answered yet is taken to be as the others.
        unknown_s = sum(seconds.values()) / len(seconds) if seconds else _UNKNOWN_ROUND_S
        return [
            DrafterLoad(
                connection.num_sessions,
                seconds.get(connection, unknown_s),
                connection.address.rpartition(":")[0] == self._host,
            )
            for connection in connections
        ]
