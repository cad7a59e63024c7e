"""A pass of a simulated replica, or several that do not differ."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cluster.speculation.speculation_policy import PassPromise

Integers = npt.NDArray[np.int64]


@dataclass(eq=False)
class SimulatedPass:
    """A pass under way, or several that do not differ, one behind the other.

    Attributes:
        rows: decoding sequences in it, by their place.
        tokens: ``[rounds, rows]`` that each gains.
        prompts: other sequences and how many of their tokens are computed.
        first_end_s: of the first pass; each further one ends ``cycle_s`` later.
        num_verified, num_accepted: guesses in each round.
        promise: of one round; unset without a speculator.
    """

    group: int
    rows: Integers
    tokens: Integers
    prompts: list[tuple[int, int]]
    first_end_s: float
    cycle_s: float
    started_s: float
    num_tokens: int
    num_context_tokens: int
    num_verified: Integers
    num_accepted: Integers
    promise: PassPromise | None
    is_cut: bool = False

    @property
    def end_s(self) -> float:
        """When the last round ends."""
        return self.first_end_s + (len(self.tokens) - 1) * self.cycle_s

    def cut(self, now: float) -> SimulatedPass:
        """It, without the passes behind the one that is under way now; itself if there are none."""
        if len(self.tokens) == 1 or self.is_cut:
            return self
        passed_s = max(now - self.first_end_s, 0.0)
        count = min(math.ceil(passed_s / self.cycle_s) + 1, len(self.tokens))
        if count == len(self.tokens):
            return self
        return replace(
            self,
            tokens=self.tokens[:count],
            num_verified=self.num_verified[:count],
            num_accepted=self.num_accepted[:count],
            is_cut=True,
        )
