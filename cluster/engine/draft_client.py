"""What the engine needs of drafters, wherever they run.

The engine calls a ``DraftClient`` from its own thread and never waits in it, except in ``collect``,
which has a timeout. ``cluster.rpc.drafter_client`` implements it over gRPC, and
``cluster.engine.local_drafter`` inside the process.

Conventions (DESIGN.md, draft conventions): with n committed tokens, context features exist for
positions 0 .. n-2; token n-1 is the anchor. A session is keyed (replica, request, epoch). Tokens
travel with features, one more of them: whatever ends at position p brings token p+1.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from cluster.speculation.proposal import DraftProposal


class SessionKey(NamedTuple):
    """One request's draft state of one epoch; the epoch rises when it must be built anew."""

    request_id: str
    epoch: int


@dataclass(frozen=True, kw_only=True)
class DraftSampling:
    """The request's sampling as far as a drafter needs it.

    ``seed`` set means coupled verification: picks use the noise shared with the target.
    ``send_probs`` asks for the sparse draft distribution (rejection at temperature > 0).
    ``traceparent`` is the request's place in its trace, and no part of how it is sampled.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    choice_index: int = 0
    send_probs: bool = False
    traceparent: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class DraftSequence:
    """One sequence's part of a round.

    Attributes:
        committed_length: n; the proposal continues at position n.
        num_features: rows of ``DraftRound.features`` that belong to this sequence; they are the
            features of positions ``n-1-num_features .. n-2``.
        new_token_ids: tokens of the same positions and of ``n-1``: the last is the anchor.
        num_speculative_tokens: draft tokens wanted, at most the drafter's block size.
    """

    session: SessionKey
    committed_length: int
    num_features: int
    new_token_ids: tuple[int, ...]
    num_speculative_tokens: int


@dataclass(frozen=True)
class DraftRound:
    """All sequences of one round; ``features`` is ``[sum of num_features, d]`` on the CPU.

    d is 0 for methods that need no features; the rows are counted all the same.
    """

    sequences: tuple[DraftSequence, ...]
    features: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Most tokens that are drafted for a sequence; 0 without sequences."""
        return max((s.num_speculative_tokens for s in self.sequences), default=0)


class DraftOutcome(enum.IntEnum):
    """Values as in ``cluster.v1.DraftResponse.Outcome``."""

    DRAFTED = 1
    MISSING = 2
    UNKNOWN_SESSION = 3


@dataclass(frozen=True, kw_only=True)
class DraftResult:
    """A drafter's answer for one sequence of a round.

    ``proposal`` is set with ``DRAFTED``; ``missing_from`` (a position) with ``MISSING``.
    """

    session: SessionKey
    committed_length: int
    outcome: DraftOutcome
    missing_from: int = 0
    proposal: DraftProposal | None = None


@dataclass(frozen=True, kw_only=True)
class DraftTimes:
    """What drafters have told of their time.

    Attributes:
        compute_s: of all passes so far that had rounds of this replica in them, added up.
        queue_s: expected wait of a round on its drafter.
        network_s: average of a round's way there and back.
    """

    compute_s: float = 0.0
    queue_s: float = 0.0
    network_s: float = 0.0


class DraftClient(Protocol):
    """The engine's view of the drafters. Not thread-safe: only the engine's thread calls it.

    Attributes:
        is_concurrent: whether a round is drafted while the target computes, so that it can be
            hidden behind passes; constant.
    """

    is_concurrent: bool

    @property
    def block_size(self) -> int:
        """Most draft tokens a round; 0 while no drafter is ready."""
        ...

    def is_ready(self) -> bool:
        """Whether some drafter is connected, matches, and is not left alone."""
        ...

    def predicted_round_s(
        self, num_sessions: float, num_tokens: int, *, added_drafters: int = 0
    ) -> float:
        """Seconds from sending a round to its last answer, from what earlier ones took.

        Known, if roughly, before the first round and while no drafter is ready.

        Args:
            num_sessions: in the round, spread over the drafters that are ready.
            num_tokens: drafted for each.
            added_drafters: as if there were so many more, or fewer (never less than one).
        """
        ...

    def times(self) -> DraftTimes:
        """What drafters' passes have taken."""
        ...

    def open_session(self, session: SessionKey, sampling: DraftSampling) -> bool:
        """Assigns the session to a ready drafter. Returns False when there is none."""
        ...

    def has_session(self, session: SessionKey) -> bool:
        """Whether the session is open and its drafter is still ready (False: open a new epoch)."""
        ...

    def feed(
        self, session: SessionKey, start: int, features: torch.Tensor, token_ids: Sequence[int]
    ) -> int:
        """Sends committed positions in bulk, without waiting.

        Args:
            start: first position.
            features: ``[rows, d]`` of positions ``start ..``.
            token_ids: rows + 1 of them, of positions ``start ..``.

        Returns:
            How many rows were taken (the byte credit may allow fewer, also none).
        """
        ...

    def acknowledged_length(self, session: SessionKey) -> int:
        """Positions that the drafter has confirmed from ``feed``: 0 .. length-1."""
        ...

    def close_session(self, session: SessionKey) -> None:
        """Forgets the session here and on its drafter; unknown sessions are ignored."""
        ...

    def start_round(self, round: DraftRound) -> Any:
        """Sends a round without waiting; returns a handle for ``collect``."""
        ...

    def collect(self, handle: Any, timeout_s: float) -> list[DraftResult]:
        """Waits at most ``timeout_s`` for the round's answers; what is late is dropped for good.

        Never raises for a drafter's fault: lost, late and malformed answers are counted and simply
        absent from the result.
        """
        ...

    def close(self) -> None:
        """Ends every connection."""
        ...
