"""How long guesses survive, as earlier rounds had it: what is expected before anything is drafted.

Whether to draft, how many tokens, and how many of them to verify in all may be decided on this:
it holds nothing of the round at hand, so rule 3 of DESIGN.md is kept (DSpark, section 5.2).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_LEVELS = (np.arange(32) + 0.5) / 32
# Sequences' rounds that are remembered, roughly; one step never counts for more than a third.
_MEMORY_ROUNDS = 50.0
_MAX_WEIGHT = 0.3
# Before anything is known, a guess is taken to be accepted as often as this, given those before.
_PRIOR_CONFIDENCE = 0.7


class SurvivalProfile:
    """The distribution of survival at each position of a block, as a moving average.

    *Survival* at position k is the (calibrated) chance that the guesses up to k are all accepted.
    Held as quantiles: expected values of any number of sequences can be drawn from it.
    """

    def __init__(self) -> None:
        self._quantiles = np.empty((0, len(_LEVELS)))  # [K, levels], falling in both directions

    def observe(self, survival: Floats, num_candidates: Integers) -> None:
        """Takes in a round.

        Args:
            survival: ``[R, K]``; entries behind ``num_candidates`` are not read.
            num_candidates: ``[R]`` guesses of each sequence.
        """
        for k in range(int(num_candidates.max(initial=0))):
            column = -np.sort(-survival[num_candidates > k, k])
            ranks = (np.arange(len(column)) + 0.5) / len(column)
            current = np.interp(_LEVELS, ranks, column)
            if k == len(self._quantiles):
                self._quantiles = np.vstack([self._quantiles, current])
                continue
            weight = min(1.0 - (1.0 - 1.0 / _MEMORY_ROUNDS) ** len(column), _MAX_WEIGHT)
            self._quantiles[k] += weight * (current - self._quantiles[k])

    def expected(self, num_rows: Integers) -> list[Floats]:
        """For each position k the expected survivals of ``num_rows[k]`` sequences, falling."""
        known = self._quantiles
        latest = np.ones(len(_LEVELS)) if len(known) == 0 else known[-1]
        expected = []
        for k, count in enumerate(num_rows):
            if k < len(known):
                quantiles = known[k]
            else:
                latest = quantiles = latest * _PRIOR_CONFIDENCE
            ranks = (np.arange(count) + 0.5) / max(count, 1)
            expected.append(np.interp(ranks, _LEVELS, quantiles))
        return expected
