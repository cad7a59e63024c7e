"""Calibrated confidences: DSpark's sequential temperature scaling, and a bias beside it.

Planners multiply confidences, so what must be right is the *survival* of a token: the product of
the confidences up to it, against how often all of these tokens are accepted. The paper (sections
3.2.1 and 4.3) divides each position's logit by a temperature of its own, fitted from left to right,
each on the survival that those before it make.

A bias is ours: the calibrated logit is ``logit / T + b`` (Platt scaling). A head learns the overlap
of two laws, which is how often *rejection* accepts. That both sides pick the same token is a rarer
event, so with *coupled* verification every confidence is too high, those below one half as well;
dividing the logit would raise these. T is positive, so the order of a position's confidences stays
as it is (docs/models.md has the errors with and without the bias).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cluster.speculation.record import BUCKETS, CalibrationKey
from cluster.speculation.reliability import RoundTable

Floats = npt.NDArray[np.float64]

_SMALLEST = 1e-6  # a confidence of exactly 0 or 1 has no logit
_TEMPERATURE_RANGE = (0.2, 5.0)
_NUM_SCORING_STEPS = 30  # a handful is enough unless the range above binds
_LARGEST_STEP = 0.5
_PRIOR_STD = 2.0  # of slope and bias around 1 and 0: they stay finite where rounds say nothing


@dataclass(frozen=True)
class LogitScaling:
    """How raw confidences become calibrated ones: ``sigmoid(logit(c) / T + b)`` by position.

    Guarantees: in one position the order of confidences stays.

    Attributes:
        temperatures: T by position (1 and up), all positive.
        biases: b by position, as many; in log-odds.
    """

    temperatures: tuple[float, ...]
    biases: tuple[float, ...]

    @classmethod
    def identity(cls, num_positions: int) -> LogitScaling:
        """The scaling that leaves confidences as they are."""
        return cls((1.0,) * num_positions, (0.0,) * num_positions)

    def __len__(self) -> int:
        return len(self.temperatures)

    def of_length(self, num_positions: int) -> LogitScaling:
        """The first positions; behind the last one it goes on as there."""
        indices = [min(k, len(self) - 1) for k in range(num_positions)]
        return LogitScaling(
            tuple(self.temperatures[k] for k in indices), tuple(self.biases[k] for k in indices)
        )

    def apply(self, confidences: Floats) -> Floats:
        """Calibrated confidences of raw ones, ``[..., K]`` for K positions."""
        scaled = logit(confidences) / np.asarray(self.temperatures) + np.asarray(self.biases)
        return sigmoid(scaled)


@dataclass(frozen=True)
class Calibration:
    """What was fitted for one drafter; without anything, confidences stay as they are.

    Attributes:
        fitted: by verifier and bucket.
    """

    fitted: Mapping[CalibrationKey, LogitScaling] = field(default_factory=dict)

    def scaling(self, key: CalibrationKey, num_positions: int) -> LogitScaling:
        """The scaling of the first ``num_positions`` positions for ``key``.

        A bucket that was not fitted takes the nearest one of the same verifier that was (of two
        the hotter), a position behind the last fitted one takes that one's; without any it is the
        identity.
        """
        wanted = BUCKETS.index(key.bucket)
        candidates = [k for k in self.fitted if k.verifier == key.verifier]
        if not candidates:
            return LogitScaling.identity(num_positions)
        nearest = min(
            candidates,
            key=lambda k: (abs(BUCKETS.index(k.bucket) - wanted), -BUCKETS.index(k.bucket)),
        )
        return self.fitted[nearest].of_length(num_positions)


def logit(confidences: Floats) -> Floats:
    """Log-odds of confidences in [0, 1], finite also at the ends; any shape."""
    inside = np.clip(confidences, _SMALLEST, 1 - _SMALLEST)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def sigmoid(logits: Floats) -> Floats:
    """The chances of log-odds; any shape."""
    return np.asarray(1 / (1 + np.exp(-logits)))


def survival(confidences: Floats) -> Floats:
    """``[N, K]`` products of confidences up to each position."""
    return np.asarray(np.cumprod(confidences, axis=-1, dtype=np.float64))


def fit_scaling(table: RoundTable) -> LogitScaling:
    """Temperature and bias of each position, left to right, by the log-loss of the survival.

    The paper takes the temperature with the least binned error from a grid. With two numbers a
    position the bins' noise has more to be fitted to; the log-loss is smooth, its optimum is the
    same where one scaling can be right, and online calibration descends on it as well. A position
    that no round has a token at keeps its confidences.

    Raises:
        ValueError: the table is empty.
    """
    if len(table) == 0:
        raise ValueError("no rounds to fit a calibration on")
    logits, outcomes, is_drafted = logit(table.confidences), table.outcomes, table.is_drafted
    before = np.ones(len(table))
    temperatures, biases = [], []
    for position in range(table.num_positions):
        column, rows = logits[:, position], is_drafted[:, position]
        slope, bias = _fit_line(column[rows], before[rows], outcomes[rows, position])
        temperatures.append(1 / slope)
        biases.append(bias)
        before = before * sigmoid(column * slope + bias)
    return LogitScaling(tuple(temperatures), tuple(biases))


def _fit_line(logits: Floats, before: Floats, outcomes: Floats) -> tuple[float, float]:
    """Slope and bias of the calibrated logit over the raw one, by Newton's method."""
    coldest, hottest = _TEMPERATURE_RANGE
    start = np.array([1.0, 0.0])
    line = start
    precision = _PRIOR_STD**-2
    for _ in range(_NUM_SCORING_STEPS):
        gradient, curvature = scoring_terms(logits, before, outcomes, line[0], line[1])
        gradient -= precision * (line - start)
        step = np.linalg.solve(curvature + precision * np.eye(2), gradient)
        line = line + np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
        line[0] = np.clip(line[0], 1 / hottest, 1 / coldest)
    return float(line[0]), float(line[1])


def scoring_terms(
    logits: Floats, before: Floats, outcomes: Floats, slope: float, bias: float
) -> tuple[Floats, Floats]:
    """What a scoring step is made of (Newton's method with the expected curvature).

    The likelihood is that of ``outcomes`` ``[N]``, in [0, 1], under the survival
    P = before * sigmoid(z) with z = slope * logit + bias; dP/dz = P (1 - sigmoid(z)).

    Args:
        before: survival up to the position before, ``[N]``.

    Returns:
        Gradient of the log-likelihood by slope and bias, ``[2]``, and its expected curvature,
        ``[2, 2]``.
    """
    scaled = logits * slope + bias
    confidence, doubt = sigmoid(scaled), sigmoid(-scaled)
    chance = before * confidence
    # 1 - chance, which never becomes 0 like this, however sure a scaled confidence is.
    failure = (1 - before) + before * doubt
    weight = doubt / failure
    inputs = np.stack((logits, np.ones_like(logits)))
    gradient = inputs @ ((outcomes - chance) * weight)
    curvature = (inputs * (chance * failure * weight**2)) @ inputs.T
    return gradient, curvature
