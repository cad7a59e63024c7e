"""What a step costs, and what it is expected to yield: the one cost model (DESIGN, rule 5)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class CostModel:
    """Time of a verifying pass by batch tokens, and visible time of a round of drafting.

    The verify curve is a table of measured sizes, interpolated between them, extended with the
    last segment's slope above them and flat below, and never falling: more tokens never cost
    less. Observations pull the nearest points towards what was measured.

    Args:
        verify_seconds_by_tokens: measured seconds by number of batch tokens, at least one.
        draft_seconds: visible drafting time of a round (drafter's queue and network included,
            less what is hidden behind other work).
        smoothing: weight of a new observation, in (0, 1].

    Raises:
        ValueError: an empty table, or values that are not finite and positive.
    """

    def __init__(
        self,
        verify_seconds_by_tokens: Mapping[int, float],
        *,
        draft_seconds: float = 0.0,
        smoothing: float = 0.1,
    ) -> None:
        points = sorted(verify_seconds_by_tokens.items())
        self._tokens: Floats = np.array([tokens for tokens, _ in points], dtype=np.float64)
        self._seconds: Floats = np.array([seconds for _, seconds in points], dtype=np.float64)
        if len(points) == 0:
            raise ValueError("the verify curve needs at least one point")
        if not (np.all(self._tokens > 0) and np.all(np.isfinite(self._seconds))):
            raise ValueError("the verify curve needs positive sizes and finite times")
        if not np.all(self._seconds > 0) or not 0 <= draft_seconds < np.inf:
            raise ValueError("verify times must be positive and the draft time not negative")
        if not 0 < smoothing <= 1:
            raise ValueError("smoothing must be in (0, 1]")
        self._seconds = np.maximum.accumulate(self._seconds)
        self._smoothing = smoothing
        self.draft_seconds = draft_seconds

    def verify_seconds(self, num_tokens: npt.ArrayLike) -> Floats:
        """Seconds of a pass over ``num_tokens`` batch tokens, prefill included; any shape."""
        sizes = np.asarray(num_tokens, dtype=np.float64)
        seconds = np.interp(sizes, self._tokens, self._seconds)
        if len(self._tokens) > 1:
            slope = (self._seconds[-1] - self._seconds[-2]) / (self._tokens[-1] - self._tokens[-2])
            seconds = seconds + slope * np.maximum(sizes - self._tokens[-1], 0.0)
        return np.asarray(seconds)

    def observe_verify(self, num_tokens: int, seconds: float) -> None:
        """Learn from a measured pass: the points on both sides move by their share of the error.

        A size above the largest known one becomes a point, so the curve's range grows with use.
        """
        predicted = float(self.verify_seconds(num_tokens))
        if num_tokens > self._tokens[-1]:
            self._tokens = np.append(self._tokens, float(num_tokens))
            self._seconds = np.append(self._seconds, predicted)
        error = self._smoothing * (seconds - predicted)
        weights = _interpolation_weights(self._tokens, num_tokens)
        moved = self._seconds + error * weights
        # Restore order around the moved points: what rose lifts the larger sizes with it, what
        # fell pulls the smaller ones down.
        if error >= 0:
            self._seconds = np.maximum.accumulate(moved)
        else:
            self._seconds = np.minimum.accumulate(moved[::-1])[::-1]

    def observe_draft(self, seconds: float) -> None:
        """Learn from a round's visible drafting time."""
        self.draft_seconds += self._smoothing * (seconds - self.draft_seconds)

    def expected_goodput(
        self,
        *,
        num_requests: int,
        survival_sum: npt.ArrayLike,
        num_tokens: npt.ArrayLike,
    ) -> Floats:
        """Expected tokens per second of a step that verifies a drafted round.

        Args:
            num_requests: requests that sample in this step; each yields one token for certain.
            survival_sum: sum of the admitted drafted tokens' survival probabilities; any shape.
            num_tokens: batch tokens of the step, the admitted ones included; the same shape.

        Returns:
            ``(num_requests + survival_sum) / (draft_seconds + verify_seconds(num_tokens))``.
        """
        tokens = num_requests + np.asarray(survival_sum, dtype=np.float64)
        return np.asarray(tokens / (self.draft_seconds + self.verify_seconds(num_tokens)))


def _interpolation_weights(points: Floats, value: float) -> Floats:
    """Weights with which linear interpolation at ``value`` reads each of ``points``."""
    weights = np.zeros_like(points)
    right = int(np.searchsorted(points, value))
    if right == 0 or points[right] == value:
        weights[right] = 1.0
        return weights
    weights[right] = (value - points[right - 1]) / (points[right] - points[right - 1])
    weights[right - 1] = 1.0 - weights[right]
    return weights
