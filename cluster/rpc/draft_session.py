"""What a target replica keeps of its sessions and rounds on drafters."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.engine.draft_client import DraftResult, DraftSampling, DraftSequence, SessionKey

if TYPE_CHECKING:
    from cluster.rpc.drafter_connection import DrafterConnection


class DrafterState(enum.StrEnum):
    """How a replica stands with a drafter; ``OPEN`` and ``HALF_OPEN`` as of its breaker.

    ``DRAINING``: it is going away, and what it drafts for goes on elsewhere, a few at a time.
    """

    CONNECTING = "connecting"
    READY = "ready"
    DRAINING = "draining"
    OPEN = "open"
    HALF_OPEN = "half-open"
    QUARANTINED = "quarantined"
    MISMATCHED = "mismatched"
    LOST = "lost"


@dataclass
class DraftClientStats:
    """Counts and averages over all drafters of a replica.

    Attributes:
        num_rounds: sent to a drafter and answered in time.
        num_late: sent and not answered in time.
        num_dropped: not sent, because the drafter had not answered earlier ones.
        num_lost: sent, and the drafter was lost or quarantined before its answer.
        num_malformed: answers that broke the protocol.
        num_mismatched: handshakes that failed on a digest or version.
        round_trip_s: moving average from sending to the answer.
        network_s: the same, less the drafter's queue and computation.
        compute_s: of all passes that had rounds of this replica in them, added up.
    """

    num_rounds: int = 0
    num_late: int = 0
    num_dropped: int = 0
    num_lost: int = 0
    num_malformed: int = 0
    num_mismatched: int = 0
    round_trip_s: float = 0.0
    network_s: float = 0.0
    compute_s: float = 0.0


@dataclass(eq=False)
class RoundHandle:
    """One round on its way: results so far, and the connections that still owe theirs."""

    waiting: set[DrafterConnection] = field(default_factory=set)
    results: list[DraftResult] = field(default_factory=list)


@dataclass(eq=False)
class ClientSession:
    """A session on one stream of one drafter.

    Attributes:
        generation: the connection's stream that it lives and dies with.
        acknowledged_length: features that the drafter is known to hold.
        num_unacknowledged: chunks on their way.
        is_open: whether its first chunk was sent.
        is_lost: the drafter does not have it any more.
        is_leaving: another drafter should have it; until it is opened there it goes on here.
        is_closing: closed here, to be closed there behind its last chunk.
    """

    key: SessionKey
    sampling: DraftSampling
    connection: DrafterConnection
    generation: int
    acknowledged_length: int = 0
    num_unacknowledged: int = 0
    is_open: bool = False
    is_lost: bool = False
    is_leaving: bool = False
    is_closing: bool = False

    @property
    def is_live(self) -> bool:
        """Whether the drafter has it, as far as is known here."""
        return not self.is_lost and self.connection.is_generation(self.generation)


@dataclass(frozen=True, eq=False)
class PendingRound:
    """A round that a drafter owes an answer."""

    handle: RoundHandle
    sessions: Mapping[SessionKey, ClientSession]
    sequences: Mapping[SessionKey, DraftSequence]
    sent_at: float


@dataclass(frozen=True, eq=False)
class PendingChunk:
    """Features up to position ``end`` that a drafter has not acknowledged."""

    session: ClientSession
    end: int
    num_bytes: int
