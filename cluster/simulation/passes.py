"""A pass of a simulated replica, or several that do not differ."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cluster.simulation.outcome import Outcome
from cluster.simulation.sequence import SimulatedSequence
from cluster.speculation.speculation_policy import PassPromise

Chunks = list[tuple[SimulatedSequence, int]]


@dataclass(eq=False, slots=True)
class SimulatedPass:
    """A pass under way, or several that do not differ, one behind the other.

    Attributes:
        rows: decoding sequences in it.
        outcome: what these gain.
        prompts: other sequences and how many of their tokens are computed.
        first_end_s: of the first pass; each further one ends ``cycle_s`` later.
        promise: of one pass; unset without a speculator.
    """

    group: int
    rows: list[SimulatedSequence]
    outcome: Outcome
    prompts: Chunks
    first_end_s: float
    cycle_s: float
    started_s: float
    num_tokens: int
    num_context_tokens: int
    promise: PassPromise | None
    is_cut: bool = False

    @property
    def end_s(self) -> float:
        """When the last pass ends."""
        return self.first_end_s + (self.outcome.num_rounds - 1) * self.cycle_s

    def cut(self, now: float) -> SimulatedPass:
        """It, without the passes behind the one that is under way now; itself if there are none."""
        if self.outcome.num_rounds == 1 or self.is_cut:
            return self
        passed_s = max(now - self.first_end_s, 0.0)
        count = min(math.ceil(passed_s / self.cycle_s) + 1, self.outcome.num_rounds)
        if count == self.outcome.num_rounds:
            return self
        return replace(self, outcome=self.outcome.first(count), is_cut=True)
