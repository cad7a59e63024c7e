"""Drafting inside the target's own process."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from cluster.engine.draft_client import (
    DraftOutcome,
    DraftResult,
    DraftRound,
    DraftSampling,
    DraftTimes,
    SessionKey,
)
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.pace import PaceStats
from cluster.speculation.draft_cost import DraftCost
from cluster.speculation.draft_curve import DraftCurve

_REPLICA_ID = "local"


class LocalDraftClient:
    """A ``DraftClient`` on a ``DraftEngine`` of this process (co-located drafting, evaluation).

    Guarantees: everything happens in the caller's thread, ``collect`` does the round's whole work
    (so that it is seen as the time that drafting takes), and no answer is ever late.

    Args:
        engine: used by nobody else.
        curve: of its passes; unset: all are taken to be as long as the last ones.

    Attributes:
        num_rounds: drafted so far.
    """

    is_concurrent = False

    def __init__(self, engine: DraftEngine, curve: DraftCurve | None = None) -> None:
        self._engine = engine
        self._is_closed = False
        self._cost = DraftCost(curve)
        self._compute_s = 0.0
        self.num_rounds = 0

    @property
    def paced(self) -> PaceStats | None:
        """How well rounds keep a device profile's time; ``None``: they take what they take."""
        return self._engine.paced

    @property
    def block_size(self) -> int:
        """Most draft tokens a round; 0 after ``close``."""
        return 0 if self._is_closed else self._engine.block_size

    def is_ready(self) -> bool:
        """True until ``close``."""
        return not self._is_closed

    def predicted_round_s(
        self, num_sessions: float, num_tokens: int, *, added_drafters: int = 0
    ) -> float:
        """Seconds of a pass; there is one drafter here, whatever is added."""
        return self._cost.compute_s(num_sessions, num_tokens)

    def times(self) -> DraftTimes:
        """Of this drafter; it has neither queue nor network."""
        return DraftTimes(compute_s=self._compute_s)

    def open_session(self, session: SessionKey, sampling: DraftSampling) -> bool:
        """Opens the session, perhaps in place of the least recently used one."""
        if self._is_closed:
            return False
        self._engine.open(_REPLICA_ID, session, sampling)
        return True

    def has_session(self, session: SessionKey) -> bool:
        """Whether the session is open and was not evicted."""
        return self._engine.length_of(_REPLICA_ID, session) is not None

    def feed(
        self, session: SessionKey, start: int, features: torch.Tensor, token_ids: Sequence[int]
    ) -> int:
        """Appends positions; takes all of them, or none if the session is gone."""
        length = self._engine.append(_REPLICA_ID, session, start, features, token_ids)
        return 0 if length is None or length < start else len(features)

    def acknowledged_length(self, session: SessionKey) -> int:
        """Positions held."""
        return self._engine.length_of(_REPLICA_ID, session) or 0

    def close_session(self, session: SessionKey) -> None:
        """Forgets the session; unknown ones are ignored."""
        self._engine.close(_REPLICA_ID, session)

    def start_round(self, round: DraftRound) -> DraftRound:
        """Keeps the round for ``collect``."""
        return round

    def collect(self, handle: DraftRound, timeout_s: float) -> list[DraftResult]:
        """Drafts the round now, however long that takes."""
        if self._is_closed:
            return []
        start = time.monotonic()
        (results,) = self._engine.draft([(_REPLICA_ID, handle)])
        end = time.monotonic()
        self._compute_s += end - start
        self.num_rounds += 1
        self._cost.observe(
            len(handle.sequences),
            handle.num_tokens,
            compute_s=end - start,
            queue_s=0.0,
            network_s=0.0,
            now=end,
        )
        for result in results:
            if result.outcome is DraftOutcome.UNKNOWN_SESSION:
                # The engine that refuses a base must not be asked for it again.
                self._engine.close(_REPLICA_ID, result.session)
        return results

    def close(self) -> None:
        """Forgets every session."""
        self._is_closed = True
        self._engine.drop_replica(_REPLICA_ID)
