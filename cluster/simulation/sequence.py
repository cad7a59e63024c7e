"""A sequence that a simulated replica runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.simulation.job import Job


@dataclass(eq=False, slots=True)
class SimulatedSequence:
    """A request that has started.

    Attributes:
        missing: committed tokens that are not computed; 1 while it decodes.
        context: computed tokens.
        left: output tokens that are still to come.
        group: that it belongs to.
        luck: how much better than others its guesses are, in log-odds.
        last_s: when its last tokens came.
        fed: positions that the drafter has, or will have; ``fed_s``: when they were last sent.
        asked: draft tokens of the round under way; 0: it is not in it.
        link: which of the replica's drafters has its session; -1: none.
        is_probed: whether it is drafted for in a probe.
    """

    job: Job
    missing: int
    context: int
    left: int
    group: int
    luck: float
    last_s: float
    fed: int = 0
    fed_s: float = 0.0
    asked: int = 0
    link: int = -1
    is_probed: bool = False

    def take(self, num_tokens: int, now: float) -> None:
        """So many output tokens have come."""
        self.left -= num_tokens
        self.last_s = now
        self.job.num_made += num_tokens
        if math.isnan(self.job.first_token_s):
            self.job.first_token_s = now
