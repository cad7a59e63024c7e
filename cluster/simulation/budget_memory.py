"""Budgets that were planned for about the same pass, for fleets in which they are all the time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.simulation.events import Events

_LIFETIME_S = 30.0
_STEPS_PER_OCTAVE = 4


@dataclass(kw_only=True, slots=True)
class PassBase:
    """What a pass has to do without guesses, as ``BudgetPlanner.plan`` takes it."""

    num_requests: int
    num_base_tokens: int
    num_context_tokens: int


class BudgetMemory:
    """How many guesses were admitted in all, by requests, guesses, and the size of the pass.

    Sizes are rounded to a quarter of an octave, and what was planned is kept for 30 s. Only for
    replicas that share a cost model and a survival profile: the total of a ``SearchBudget`` comes
    from these two, and which guesses make it up is ranked anew every time.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._totals: dict[tuple[int, ...], tuple[float, int]] = {}

    def recall(self, limits: list[int], base: PassBase) -> int | None:
        """The total of an earlier plan; ``None``: there is none that is still good."""
        made_s, total = self._totals.get(_key(limits, base), (-math.inf, 0))
        return total if self._events.now - made_s <= _LIFETIME_S else None

    def keep(self, limits: list[int], base: PassBase, total: int) -> None:
        """Remembers a plan."""
        self._totals[_key(limits, base)] = self._events.now, total


def _key(limits: list[int], base: PassBase) -> tuple[int, ...]:
    return (
        base.num_requests,
        len(limits),
        sum(limits),
        _step(base.num_base_tokens - base.num_requests + 1),
        _step(base.num_context_tokens + 1),
    )


def _step(value: float) -> int:
    return round(_STEPS_PER_OCTAVE * math.log2(value))
