"""Calibrated confidences: sequential temperature scaling (DSpark, sections 3.2.1 and 4.3).

Planners multiply confidences, so what must be right is the *survival* of a token: the product of
the confidences up to it, against how often all of these tokens are accepted. One temperature per
position divides the confidence's logit; temperatures are fitted from left to right, each on the
survival that those before it make. The order of a position's confidences stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cluster.speculation.record import BUCKETS, CalibrationKey
from cluster.speculation.reliability import RoundTable, calibration_error

Floats = npt.NDArray[np.float64]

_SMALLEST = 1e-6  # a confidence of exactly 0 or 1 has no logit
_SEARCH_RANGE = (0.2, 5.0)
_NUM_GRID = 41
_NUM_REFINEMENTS = 2


@dataclass(frozen=True)
class Calibration:
    """Fitted temperatures of one drafter; without any, confidences stay as they are.

    Attributes:
        fitted: temperatures by position (1 and up), all positive, by verifier and bucket.
    """

    fitted: Mapping[CalibrationKey, tuple[float, ...]] = field(default_factory=dict)

    def temperatures(self, key: CalibrationKey, num_positions: int) -> Floats:
        """``[num_positions]`` temperatures for ``key``.

        A bucket that was not fitted takes the nearest one of the same verifier that was (of two
        the hotter), a position behind the last fitted one takes that one's; without any it is 1.
        """
        wanted = BUCKETS.index(key.bucket)
        candidates = [k for k in self.fitted if k.verifier == key.verifier]
        if not candidates:
            return np.ones(num_positions)
        nearest = min(
            candidates,
            key=lambda k: (abs(BUCKETS.index(k.bucket) - wanted), -BUCKETS.index(k.bucket)),
        )
        values = np.asarray(self.fitted[nearest], dtype=np.float64)
        return values[np.minimum(np.arange(num_positions), len(values) - 1)]


def logit(confidences: Floats) -> Floats:
    """Log-odds of confidences in [0, 1], finite also at the ends; any shape."""
    inside = np.clip(confidences, _SMALLEST, 1 - _SMALLEST)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def apply_temperatures(confidences: Floats, temperatures: npt.ArrayLike) -> Floats:
    """``sigmoid(logit(c) / T)``; shapes broadcast, the last axis is the position."""
    return np.asarray(1 / (1 + np.exp(-logit(confidences) / np.asarray(temperatures))))


def survival(confidences: Floats) -> Floats:
    """``[N, K]`` products of confidences up to each position."""
    return np.asarray(np.cumprod(confidences, axis=-1, dtype=np.float64))


def fit_temperatures(table: RoundTable) -> tuple[float, ...]:
    """One temperature per position, left to right, each with the least calibration error.

    A position that no round has a token at gets 1.

    Raises:
        ValueError: the table is empty.
    """
    if len(table) == 0:
        raise ValueError("no rounds to fit temperatures on")
    logits, outcomes, is_drafted = logit(table.confidences), table.outcomes, table.is_drafted
    before = np.ones(len(table))
    temperatures = []
    for position in range(table.num_positions):
        column, rows = logits[:, position], is_drafted[:, position]
        best = _search(column[rows], before[rows], outcomes[rows, position]) if rows.any() else 1.0
        temperatures.append(best)
        before = before / (1 + np.exp(-column / best))
    return tuple(temperatures)


def _search(logits: Floats, before: Floats, outcomes: Floats) -> float:
    """The temperature with the least error of ``before * sigmoid(logits / T)``: finer grids."""
    low, high = np.log(_SEARCH_RANGE)
    best = 0.0
    for _ in range(1 + _NUM_REFINEMENTS):
        grid = np.linspace(low, high, _NUM_GRID)
        errors = [
            calibration_error(before / (1 + np.exp(-logits / np.exp(value))), outcomes)
            for value in grid
        ]
        best = float(grid[int(np.argmin(errors))])
        spacing = (high - low) / (_NUM_GRID - 1)
        low, high = max(best - spacing, low), min(best + spacing, high)
    return float(np.exp(best))
