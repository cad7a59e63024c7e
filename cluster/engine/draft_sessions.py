"""The table of a drafter's sessions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from cluster.engine.draft_client import DraftResult, DraftSampling, SessionKey


@dataclass(eq=False)
class DraftSession:
    """One request's draft state of one epoch.

    Attributes:
        length: positions received, 0 .. length-1, kept as far as the drafter reaches.
        pages: block table of what is kept.
        hidden: EAGLE-3's output ``[d]`` at the last position, which the next draft starts from.
        last_result: the proposal for the newest base, kept so that a base gets only one.
        last_used: monotonic seconds.
    """

    replica_id: str
    key: SessionKey
    sampling: DraftSampling
    last_used: float
    length: int = 0
    pages: list[int] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    last_result: DraftResult | None = None


class DraftSessions:
    """Sessions by (replica, key), ordered by use.

    Guarantees: at most ``max_sessions``; iteration goes from the least recently used to the
    most recently used.
    """

    def __init__(self, max_sessions: int) -> None:
        self.max_sessions = max_sessions
        self._sessions: OrderedDict[tuple[str, SessionKey], DraftSession] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[DraftSession]:
        return iter(self._sessions.values())

    @property
    def is_full(self) -> bool:
        """Whether one must go before another comes."""
        return len(self._sessions) >= self.max_sessions

    def get(self, replica_id: str, key: SessionKey) -> DraftSession | None:
        """The session, or ``None``; does not count as use."""
        return self._sessions.get((replica_id, key))

    def add(self, session: DraftSession) -> None:
        """Adds a session that is not in the table; the caller has made room."""
        if self.is_full:
            raise RuntimeError(f"more than {self.max_sessions} draft sessions")
        self._sessions[session.replica_id, session.key] = session

    def touch(self, session: DraftSession, now: float) -> None:
        """Marks the session as used now."""
        session.last_used = now
        self._sessions.move_to_end((session.replica_id, session.key))

    def remove(self, session: DraftSession) -> None:
        """Takes the session out of the table."""
        del self._sessions[session.replica_id, session.key]

    def of_replica(self, replica_id: str) -> list[DraftSession]:
        """All sessions of one replica."""
        return [session for session in self if session.replica_id == replica_id]
