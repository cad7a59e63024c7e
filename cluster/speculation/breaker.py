"""Whether a drafter is worth a round: a circuit breaker, one for each drafter of a replica.

::

               failures outweigh successes
    CLOSED ─────────────────────────────────▶ OPEN ◀──┐
       ▲                                        │     │
       │                       the time is over │     │ the probing round failed,
       │                                        ▼     │ or nothing came to be probed
       └───────────────────────────────── HALF_OPEN ──┘
                the probing round was in time

A drafter that answers too late costs its sequences the whole deadline of a round, so it may do that
a few times only. What finds out whether it has recovered is one round that nobody waits for.
"""

from __future__ import annotations

import enum
import random

# A failure weighs as much as two successes: more than one late round in three opens, and so do
# this many failures in a row.
FAILURES_TO_OPEN = 3.0
_SUCCESS_WEIGHT = 0.5
SHORTEST_OPEN_S = 0.25
LONGEST_OPEN_S = 60.0
# Well for so long, and what was before is forgotten: the next opening is a short one again.
FORGIVEN_AFTER_S = 30.0


class BreakerState(enum.StrEnum):
    """See the module."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """The state machine; it has no clock, every call is told the time (monotonic seconds).

    Guarantees: while it is open nothing is to be sent; each opening in a row lasts twice as long as
    the one before, up to ``LONGEST_OPEN_S``, less a random part of up to a half, so that replicas
    do not come back to a drafter together; from open it never closes but through ``HALF_OPEN``.

    Args:
        shortest_open_s: the first opening's time.
        rng: for the jitter.
    """

    def __init__(
        self, *, shortest_open_s: float = SHORTEST_OPEN_S, rng: random.Random | None = None
    ) -> None:
        self._shortest_open_s = shortest_open_s
        self._rng = rng or random.Random()
        self._state = BreakerState.CLOSED
        self._score = 0.0
        self._num_openings = 0  # in a row
        self._first_open_s = shortest_open_s
        self._closed_at = 0.0
        self._probe_at = 0.0

    @property
    def state(self) -> BreakerState:
        """Of now."""
        return self._state

    @property
    def num_openings(self) -> int:
        """Openings since it was last well for ``FORGIVEN_AFTER_S``."""
        return self._num_openings

    def succeed(self) -> None:
        """A round was answered in time."""
        if self._state is BreakerState.CLOSED:
            self._score = max(0.0, self._score - _SUCCESS_WEIGHT)

    def fail(self, now: float) -> bool:
        """A round was late, lost or not even sent because earlier ones had no answer.

        Returns:
            Whether this opened it.
        """
        if self._state is not BreakerState.CLOSED:
            return False
        self._score += 1.0
        if self._score < FAILURES_TO_OPEN:
            return False
        self.open(now)
        return True

    def open(self, now: float, at_least_s: float = 0.0) -> None:
        """Opens at once, whatever was before.

        Args:
            at_least_s: what the first of the openings in a row would last.
        """
        if self._state is BreakerState.CLOSED and now - self._closed_at > FORGIVEN_AFTER_S:
            self._num_openings, self._first_open_s = 0, self._shortest_open_s
        self._first_open_s = max(self._first_open_s, at_least_s)
        longest_s = self._first_open_s * 2.0**self._num_openings
        self._num_openings += 1
        self._state = BreakerState.OPEN
        self._score = 0.0
        self._probe_at = now + min(longest_s, LONGEST_OPEN_S) * self._rng.uniform(0.5, 1.0)

    def wait_s(self, now: float) -> float:
        """Seconds until a probe is due; 0 unless it is open."""
        return max(0.0, self._probe_at - now) if self._state is BreakerState.OPEN else 0.0

    def begin_probe(self, now: float) -> bool:
        """Half-opens when the time of an open breaker is over.

        Returns:
            Whether one probing round is to be sent now. False when it is closed, or still open.
        """
        if self._state is BreakerState.OPEN and now >= self._probe_at:
            self._state = BreakerState.HALF_OPEN
            return True
        return False

    def end_probe(self, now: float, *, succeeded: bool) -> None:
        """What became of the probing round.

        Raises:
            RuntimeError: there was none.
        """
        if self._state is not BreakerState.HALF_OPEN:
            raise RuntimeError(f"no probe is under way, the breaker is {self._state}")
        if succeeded:
            self._state = BreakerState.CLOSED
            self._closed_at = now
        else:
            self.open(now)
