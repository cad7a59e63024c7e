"""The drafters of a fleet, as many as the pool's policy wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.simulation.drafters import SimulatedDrafter
from cluster.simulation.events import Events
from cluster.speculation.pool_policy import DraftDemand, PoolPolicy

_PERIOD_S = 1.0


class DrafterPool:
    """Starts and stops drafters; a new one is ready ``start_s`` after it is wanted.

    Args:
        policy: chooses their number; unset: it stays as it is.
        initial: ready from the beginning.
        make: a new drafter.
        changed: called when those that are ready are others.

    Attributes:
        drafters: that are ready.
        wanted: how many there should be.
        log: times, wanted and ready drafters, and the policy's reason, at each change.
    """

    def __init__(
        self,
        policy: PoolPolicy | None,
        *,
        initial: int,
        start_s: float,
        make: Callable[[], SimulatedDrafter],
        changed: Callable[[], None],
        events: Events,
    ) -> None:
        self._policy = policy
        self._start_s = start_s
        self._make = make
        self._changed = changed
        self._events = events
        self.drafters = [make() for _ in range(initial)]
        self.wanted = initial
        self._stopped_busy_s = 0.0
        self._ready_s = 0.0
        self._counted_s = 0.0
        self.log: list[tuple[float, int, int, str]] = [(0.0, initial, initial, "at the start")]

    @property
    def busy_s(self) -> float:
        """Seconds that all drafters, also former ones, have been in passes."""
        return self._stopped_busy_s + sum(drafter.busy_s for drafter in self.drafters)

    @property
    def ready_s(self) -> float:
        """Seconds that drafters have been ready, added up."""
        self._count()
        return self._ready_s

    def watch(
        self, demands: Callable[[], Sequence[DraftDemand]], goes_on: Callable[[], bool]
    ) -> None:
        """Has the policy decide once a second while ``goes_on``."""
        if self._policy is None:
            return

        def decide() -> None:
            self._decide(demands())
            if goes_on():
                self._events.at(self._events.now + _PERIOD_S, decide)

        self._events.at(self._events.now + _PERIOD_S, decide)

    def _decide(self, demands: Sequence[DraftDemand]) -> None:
        if self._policy is None:
            return
        now, ready = self._events.now, len(self.drafters)
        wanted = self._policy.decide(demands, current=self.wanted, ready=ready, now=now)
        if wanted == self.wanted:
            return
        self.wanted = wanted
        self._note(self._policy.reason)
        for _ in range(wanted - ready):
            self._events.at(now + self._start_s, self._start)
        if wanted < ready:
            self._count()
            self._stopped_busy_s += sum(drafter.busy_s for drafter in self.drafters[wanted:])
            del self.drafters[wanted:]
            self._changed()

    def _start(self) -> None:
        if len(self.drafters) < self.wanted:  # else it was called off
            self._count()
            self.drafters.append(self._make())
            self._note("a drafter is ready")
            self._changed()

    def _note(self, reason: str) -> None:
        self.log.append((self._events.now, self.wanted, len(self.drafters), reason))

    def _count(self) -> None:
        now = self._events.now
        self._ready_s += len(self.drafters) * (now - self._counted_s)
        self._counted_s = now
