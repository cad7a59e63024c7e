"""Counts of values by size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """How many values there were up to each bound.

    Not thread-safe to write; what another thread reads may lack the value that is being added.

    Args:
        bounds: ascending; a value counts for the first one that it does not exceed.

    Attributes:
        counts: one more than bounds; the last are the values above all of them.
        sum: of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value
