"""The offline fit of a drafter's confidences: one position after the other, from the left.

As in DSpark (sections 3.2.1 and 4.3), each position's map is fitted on the survival that those
before it make. Two things are asked of it:

- *The log-loss of the survival* is small, so that confidences stay as sharp as they are. Alone it
  is not enough where no map is right everywhere: it then makes the most of single tokens, and
  survivals come out too low at both ends and too high between them.
- *The squared calibration error of the survival* is small: that is what planners rely on, and what
  the paper takes its temperatures by. Alone it would also be content with a position that says the
  same of every token.

The error is taken over overlapping bins (hat functions of the survival), which makes it smooth.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cluster.speculation.calibration import LogitMap, LogitScaling, logit, sigmoid
from cluster.speculation.reliability import NUM_BINS, RoundTable

Floats = npt.NDArray[np.float64]

# Squared errors are some 1e-4, differences of the log-loss that matter some 1e-3.
_ERROR_WEIGHT = 30.0
_NUM_POINTS = 8  # of a position's map; the outermost at these quantiles of its confidences
_QUANTILES = np.linspace(0.005, 0.995, _NUM_POINTS)
# Deviations of the prior: of the map's first value around its raw one, of the logarithms of its
# slopes around 0, and of their differences. It stays finite where rounds say nothing.
_VALUE_STD, _SLOPE_STD, _BEND_STD = 4.0, 1.0, 1.0
_MAX_STEPS = 50
_LARGEST_STEP = 2.0
_LEAST_DISTANCE = 1e-3  # of two points, in log-odds
_LEAST_GAIN = 1e-6  # a round
_DAMPING_RANGE = (1e-6, 1e6)


def fit_scaling(table: RoundTable) -> LogitScaling:
    """The map of each position, left to right.

    A position that no round has a token at keeps its confidences.

    Raises:
        ValueError: the table is empty.
    """
    if len(table) == 0:
        raise ValueError("no rounds to fit a calibration on")
    logits, outcomes, is_drafted = logit(table.confidences), table.outcomes, table.is_drafted
    before = np.ones(len(table))
    maps: list[LogitMap] = []
    for position in range(table.num_positions):
        column, rows = logits[:, position], is_drafted[:, position]
        if rows.any():
            loss = _Loss(column[rows], before[rows], outcomes[rows, position])
            maps.append(loss.map_of(_descend(loss)))
        else:
            maps.append(LogitMap.identity())
        before = before * sigmoid(maps[-1].apply(column))
    return LogitScaling(tuple(maps))


def _descend(loss: _Loss) -> Floats:
    """The parameters of least loss, from the identity (Levenberg-Marquardt)."""
    parameters, damping = loss.start, 1e-3
    value = loss.value(parameters)
    smallest, largest = _DAMPING_RANGE
    gradient, curvature = loss.terms(parameters)
    for _ in range(_MAX_STEPS):
        damped = curvature + damping * np.diag(np.diag(curvature))
        step = np.linalg.solve(damped, gradient)
        candidate = parameters - np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
        reached = loss.value(candidate)
        if not reached < value:
            if damping >= largest:
                break
            damping *= 10
            continue
        gain, parameters, value = value - reached, candidate, reached
        if gain < _LEAST_GAIN:
            break
        damping = max(damping / 10, smallest)
        gradient, curvature = loss.terms(parameters)
    return parameters


class _Loss:
    """What a map of one position is judged by. Its parameters, ``[M]``: the calibrated log-odds at
    the first point, and the logarithms of the slopes from point to point.

    Args:
        logits: raw, ``[N]``.
        before: survival up to the position before, ``[N]``.
        outcomes: whether everything up to the position was accepted, ``[N]`` in [0, 1].
    """

    def __init__(self, logits: Floats, before: Floats, outcomes: Floats) -> None:
        self._before, self._outcomes = before, outcomes
        points = np.unique(np.quantile(logits, _QUANTILES))
        points = points[np.concatenate(([True], np.diff(points) > _LEAST_DISTANCE))]
        if len(points) < 2:
            points = np.array([points[0], points[0] + 1.0])
        self._points = points
        # How much of each stretch between points lies before a logit; the outer ones go on.
        ends = np.concatenate(([-np.inf], points[1:-1], [np.inf]))
        self._stretches = np.stack(
            [
                np.clip(logits, low, high) - np.clip(points[0], low, high)
                for low, high in pairwise(ends)
            ]
        )
        self.start = np.concatenate(([points[0]], np.zeros(len(points) - 1)))
        # The prior is that of these differences.
        bends = np.diff(np.eye(len(points))[1:], axis=0) / _BEND_STD
        stds = np.array([_VALUE_STD] + [_SLOPE_STD] * (len(points) - 1))
        self._prior = np.concatenate((np.diag(1 / stds), bends))

    def map_of(self, parameters: Floats) -> LogitMap:
        """The map with these parameters."""
        rises = np.exp(parameters[1:]) * np.diff(self._points)
        values = parameters[0] + np.concatenate(([0.0], np.cumsum(rises)))
        return LogitMap(tuple(self._points.tolist()), tuple(values.tolist()))

    def value(self, parameters: Floats) -> float:
        """Log-loss and weighted squared error a round, and the prior."""
        chance, failure = self._chances(self._scaled(parameters))
        log_loss = -(
            self._outcomes * np.log(np.maximum(chance, 1e-300))
            + (1 - self._outcomes) * np.log(np.maximum(failure, 1e-300))
        ).mean()
        gaps, counts = _Hats(chance).sums(self._outcomes - chance)
        prior = ((self._prior @ (parameters - self.start)) ** 2).sum() / 2
        error = _ERROR_WEIGHT * (gaps**2 / counts).sum()
        return float(log_loss + (error + prior) / len(chance))

    def terms(self, parameters: Floats) -> tuple[Floats, Floats]:
        """Gradient of the value, ``[M]``, and its curvature, ``[M, M]``: that which is expected of
        the log-loss, that of fixed hat functions of the error."""
        scaled = self._scaled(parameters)
        chance, failure = self._chances(scaled)
        slopes = np.exp(parameters[1:])[:, None]
        by_parameter = np.concatenate((np.ones((1, len(chance))), slopes * self._stretches))
        by_parameter *= chance * sigmoid(-scaled)  # derivative of the chance
        gap = self._outcomes - chance
        variance = np.maximum(chance * failure, 1e-300)
        hats = _Hats(chance)
        gaps, counts = hats.sums(gap)
        by_hat = np.stack([hats.sums(row)[0] for row in by_parameter])
        error = _ERROR_WEIGHT * hats.error_slopes(gap, gaps / counts)
        precision = self._prior.T @ self._prior
        gradient = by_parameter @ (error - gap / variance) + precision @ (parameters - self.start)
        curvature = (by_parameter / variance) @ by_parameter.T + precision
        curvature += 2 * _ERROR_WEIGHT * (by_hat / counts) @ by_hat.T
        return gradient / len(chance), curvature / len(chance)

    def _scaled(self, parameters: Floats) -> Floats:
        return np.asarray(parameters[0] + np.exp(parameters[1:]) @ self._stretches)

    def _chances(self, scaled: Floats) -> tuple[Floats, Floats]:
        """Survival and 1 - survival, which never becomes 0 like this, however sure a confidence."""
        chance = self._before * sigmoid(scaled)
        return chance, (1 - self._before) + self._before * sigmoid(-scaled)


class _Hats:
    """Hat functions over [0, 1], one for each edge of a bin; N chances are under two each."""

    def __init__(self, chance: Floats) -> None:
        place = chance * NUM_BINS
        self._left = np.minimum(place.astype(np.int64), NUM_BINS - 1)
        self._right_share = place - self._left
        self._counts = np.maximum(self._spread(np.ones_like(chance)), 1.0)

    def sums(self, values: Floats) -> tuple[Floats, Floats]:
        """Sums of ``[N]`` values under each function and how many these are (at least 1)."""
        return self._spread(values), self._counts

    def error_slopes(self, gap: Floats, mean_gaps: Floats) -> Floats:
        """Derivative of the sum over functions of count * mean gap ** 2 by each chance, ``[N]``."""
        left, right = mean_gaps[self._left], mean_gaps[self._left + 1]
        mean = (1 - self._right_share) * left + self._right_share * right
        return (2 * gap - (left + right)) * (right - left) * NUM_BINS - 2 * mean

    def _spread(self, values: Floats) -> Floats:
        size = NUM_BINS + 1
        left = np.bincount(self._left, (1 - self._right_share) * values, minlength=size)
        right = np.bincount(self._left + 1, self._right_share * values, minlength=size)
        return np.asarray(left + right, dtype=np.float64)
