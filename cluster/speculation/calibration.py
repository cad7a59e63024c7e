"""Calibrated confidences: DSpark's sequential temperature scaling, with a bias and a floor.

Planners multiply confidences, so what must be right is the *survival* of a token: the product of
the confidences up to it, against how often all of these tokens are accepted. The paper (sections
3.2.1 and 4.3) divides each position's logit by a temperature of its own, fitted from left to right,
each on the survival that those before it make.

Ours is a rising map of the log-odds for each position instead, straight between a few points: a
temperature is one straight line. A head learns the overlap of two laws, which is how often
*rejection* accepts. That both sides pick the same token is a rarer event, so with *coupled*
verification every confidence is too high, those below one half as well; and a greedy answer that
repeats itself is accepted also where the head is unsure. No temperature mends either
(docs/models.md has the errors). As the map rises, the order of a position's confidences stays as
it is.

``calibration_fit`` fits the maps, ``online_calibration`` keeps them current.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cluster.speculation.record import BUCKETS, CalibrationKey

Floats = npt.NDArray[np.float64]

_SMALLEST = 1e-6  # a confidence of exactly 0 or 1 has no logit


@dataclass(frozen=True)
class LogitMap:
    """A rising line of straight stretches from raw log-odds to calibrated ones; beyond the outer
    points it goes on as between the last two.

    Attributes:
        raw: log-odds of its points, 2 or more, rising.
        calibrated: what they become, as many, rising.
    """

    raw: tuple[float, ...]
    calibrated: tuple[float, ...]

    @classmethod
    def identity(cls) -> LogitMap:
        """The map that leaves everything as it is."""
        return cls((0.0, 1.0), (0.0, 1.0))

    @classmethod
    def straight(cls, temperature: float, bias: float = 0.0) -> LogitMap:
        """``logit / temperature + bias``."""
        return cls((0.0, temperature), (bias, bias + 1.0))

    def moved(self, log_temperature: float, bias: float) -> LogitMap:
        """This map behind a temperature, and a bias behind this map."""
        factor = math.exp(log_temperature)
        return LogitMap(
            tuple(point * factor for point in self.raw),
            tuple(value + bias for value in self.calibrated),
        )

    def apply(self, logits: Floats) -> Floats:
        """Calibrated log-odds of raw ones; any shape."""
        return self.value_and_slope(logits)[0]

    def value_and_slope(self, logits: Floats) -> tuple[Floats, Floats]:
        """Calibrated log-odds of raw ones, and how fast they rise there; any shape."""
        raw, calibrated = np.asarray(self.raw), np.asarray(self.calibrated)
        stretch = np.searchsorted(raw[1:-1], logits)
        slope = (np.diff(calibrated) / np.diff(raw))[stretch]
        return calibrated[stretch] + slope * (logits - raw[stretch]), slope


@dataclass(frozen=True)
class LogitScaling:
    """How raw confidences become calibrated ones.

    Guarantees: in one position the order of confidences stays.

    Attributes:
        maps: of their log-odds, by position (1 and up).
    """

    maps: tuple[LogitMap, ...]

    @classmethod
    def identity(cls, num_positions: int) -> LogitScaling:
        """The scaling that leaves confidences as they are."""
        return cls((LogitMap.identity(),) * num_positions)

    def __len__(self) -> int:
        return len(self.maps)

    def of_length(self, num_positions: int) -> LogitScaling:
        """The first positions; behind the last one it goes on as there."""
        return LogitScaling(tuple(self.maps[min(k, len(self) - 1)] for k in range(num_positions)))

    def apply(self, confidences: Floats) -> Floats:
        """Calibrated confidences of raw ones, ``[..., K]`` for K positions."""
        start, low, high, slope = self._stretches
        # What lies before a logit of each stretch between two points, from the first point on.
        passed = np.clip(logit(confidences)[..., None], low, high) - np.clip(start[0], low, high)
        return sigmoid(start[1][..., 0] + (passed * slope).sum(axis=-1))

    @cached_property
    def _stretches(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Of all maps at once, so that a round costs no loop: the first point, raw and calibrated,
        ``[2, K, 1]``; where stretches begin and end, and their slopes, ``[K, M]`` each, with
        stretches of slope 0 behind those of a map that has fewer than others."""
        shape = (len(self), max((len(line.raw) for line in self.maps), default=2) - 1)
        low, high, slope = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        start = np.zeros((2, len(self), 1))
        for row, line in enumerate(self.maps):
            raw, count = np.asarray(line.raw), len(line.raw) - 1
            start[:, row, 0] = line.raw[0], line.calibrated[0]
            slope[row, :count] = np.diff(line.calibrated) / np.diff(raw)
            low[row, :count], high[row, :count] = raw[:-1], raw[1:]
            low[row, 0], high[row, count - 1] = -np.inf, np.inf  # the outer ones go on
        return start, low, high, slope


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
    return np.asarray(np.exp(-np.logaddexp(0.0, -logits)))  # which overflows nowhere


def survival(confidences: Floats) -> Floats:
    """``[N, K]`` products of confidences up to each position."""
    return np.asarray(np.cumprod(confidences, axis=-1, dtype=np.float64))


def scoring_terms(
    scaled: Floats, by_parameter: Floats, before: Floats, outcomes: Floats
) -> tuple[Floats, Floats]:
    """What a scoring step is made of (Newton's method with the expected curvature).

    The likelihood is that of ``outcomes`` ``[N]``, in [0, 1], under the survival
    P = before * sigmoid(z) with the calibrated log-odds z; dP/dz = P (1 - sigmoid(z)).

    Args:
        scaled: z, ``[N]``.
        by_parameter: derivative of z by each of M parameters, ``[M, N]``.
        before: survival up to the position before, ``[N]``.

    Returns:
        Gradient of the log-likelihood by the parameters, ``[M]``, and its expected curvature,
        ``[M, M]``.
    """
    confidence, doubt = sigmoid(scaled), sigmoid(-scaled)
    chance = before * confidence
    # 1 - chance, which never becomes 0 like this, however sure a scaled confidence is.
    failure = (1 - before) + before * doubt
    weight = doubt / failure
    gradient = by_parameter @ ((outcomes - chance) * weight)
    curvature = (by_parameter * (chance * failure * weight**2)) @ by_parameter.T
    return gradient, curvature
