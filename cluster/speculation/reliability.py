"""How well confidences agree with what happened: calibration error, AUC, Brier score.

Figures are about rounds whose drafted tokens were all verified, so that of every one it is known
what was accepted. Rounds of one request are not independent, so intervals resample requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.speculation.record import VerificationRecord

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

NUM_BINS = 20
_NUM_RESAMPLES = 1000
_NUM_SIMULATIONS = 20


@dataclass(frozen=True, eq=False)
class RoundTable:
    """N rounds of at most K drafted tokens, all of which were verified.

    Attributes:
        confidences: ``[N, K]`` raw; without meaning behind ``num_drafted``.
        num_drafted: ``[N]``, 0 to K; less than K where the drafter had less to say.
        num_accepted: ``[N]``, 0 to ``num_drafted``.
        acceptance: ``[N, K]`` exact chance of each token's acceptance (rejection), or ``None``.
        request_index: ``[N]``, equal for rounds of one request.
        request_ids: the requests, in the order of ``request_index``.
    """

    confidences: Floats
    num_drafted: Integers
    num_accepted: Integers
    acceptance: Floats | None
    request_index: Integers
    request_ids: tuple[str, ...]

    @classmethod
    def from_records(cls, records: Sequence[VerificationRecord], num_positions: int) -> RoundTable:
        """The records whose drafted tokens were all admitted; the rest is left out."""
        whole = [r for r in records if len(r.confidences) == r.block_size]
        shape = (len(whole), num_positions)
        confidences, acceptance = np.full(shape, 0.5), np.zeros(shape)
        numbers: dict[str, int] = {}
        request_index = np.zeros(len(whole), dtype=np.int64)
        for row, record in enumerate(whole):
            confidences[row, : len(record.confidences)] = record.confidences
            acceptance[row, : len(record.acceptance)] = record.acceptance
            request_index[row] = numbers.setdefault(record.request_id, len(numbers))
        is_exact = any(r.acceptance for r in whole)
        return cls(
            confidences=confidences,
            num_drafted=np.array([len(r.confidences) for r in whole], dtype=np.int64),
            num_accepted=np.array([r.num_accepted_tokens for r in whole], dtype=np.int64),
            acceptance=acceptance if is_exact else None,
            request_index=request_index,
            request_ids=tuple(numbers),
        )

    def __len__(self) -> int:
        return len(self.num_accepted)

    @property
    def num_positions(self) -> int:
        """K."""
        return self.confidences.shape[1]

    @property
    def is_drafted(self) -> Booleans:
        """``[N, K]`` whether there was a token."""
        return np.arange(self.num_positions) < self.num_drafted[:, None]

    @property
    def is_reached(self) -> Booleans:
        """``[N, K]`` whether there was a token, and all before it were accepted."""
        return self.is_drafted & (np.arange(self.num_positions) <= self.num_accepted[:, None])

    @property
    def is_accepted(self) -> Booleans:
        """``[N, K]`` whether a token and all before it were accepted."""
        return np.arange(self.num_positions) < self.num_accepted[:, None]

    @property
    def outcomes(self) -> Floats:
        """``[N, K]`` whether a token and all before it were accepted, with less noise.

        Where the exact chance of acceptance is known it stands in for the last coin.
        """
        if self.acceptance is None:
            return self.is_accepted.astype(np.float64)
        return np.where(self.is_reached, np.clip(self.acceptance, 0.0, 1.0), 0.0)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% bootstrap interval, over resampled requests."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """Predictions in equal-width bins; each array is ``[NUM_BINS]``, zero in an empty bin."""

    count: Integers
    mean_prediction: Floats
    mean_outcome: Floats


def reliability_bins(predictions: Floats, outcomes: Floats) -> ReliabilityBins:
    """Sorts predictions in [0, 1] into ``NUM_BINS`` bins of equal width; both are ``[N]``."""
    bins = _bins(predictions)
    count = np.bincount(bins, minlength=NUM_BINS)
    divisor = np.maximum(count, 1)
    return ReliabilityBins(
        count=count,
        mean_prediction=np.bincount(bins, predictions, minlength=NUM_BINS) / divisor,
        mean_outcome=np.bincount(bins, outcomes, minlength=NUM_BINS) / divisor,
    )


def calibration_error(predictions: Floats, outcomes: Floats) -> float:
    """Expected calibration error: mean over predictions of their bin's |prediction - outcome|.

    Raises:
        ValueError: there is nothing to measure.
    """
    if len(predictions) == 0:
        raise ValueError("no rounds to measure the calibration of")
    gaps = np.bincount(_bins(predictions), predictions - outcomes, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(predictions))


def calibration_error_interval(
    predictions: Floats, outcomes: Floats, request_index: Integers, seed: int = 0
) -> Estimate:
    """``calibration_error`` with an interval.

    Noise only ever adds to this error, and resampling adds it twice: the interval errs upwards.
    """
    gaps, counts = _gaps_by_request(predictions, outcomes, request_index)
    weights = _resamples(len(gaps), seed)
    errors = np.abs(weights @ gaps).sum(axis=1) / (weights @ counts.sum(axis=1))
    low, high = np.quantile(errors, (0.025, 0.975))
    return Estimate(calibration_error(predictions, outcomes), float(low), float(high))


def calibration_noise(predictions: Floats, seed: int = 0) -> float:
    """The error that predictions would show if they were exactly right, for want of rounds."""
    random = np.random.default_rng(seed)
    shape = (_NUM_SIMULATIONS, len(predictions))
    outcomes = (random.random(shape) < predictions).astype(np.float64)
    errors = [calibration_error(predictions, simulated) for simulated in outcomes]
    return float(np.mean(errors))


def calibration_request_noise(
    predictions: Floats, outcomes: Floats, request_index: Integers, seed: int = 0
) -> float:
    """``calibration_noise`` where rounds of one request are alike: errors of whole requests.

    What every request adds to a bin, beyond the bin's own mean error, has its sign drawn anew (a
    wild bootstrap): so requests stay as uneven as they are, and nothing but chance is left.
    """
    gaps, counts = _gaps_by_request(predictions, outcomes, request_index)
    mean_gap = gaps.sum(axis=0) / np.maximum(counts.sum(axis=0), 1)
    random = np.random.default_rng(seed)
    signs = random.choice((-1.0, 1.0), size=(_NUM_RESAMPLES, len(gaps)))
    errors = np.abs(signs @ (gaps - counts * mean_gap)).sum(axis=1) / len(predictions)
    return float(errors.mean())


def area_under_curve(scores: Floats, is_positive: Booleans) -> float | None:
    """Chance that a positive scores above a negative, ties counting half; ``[N]`` each.

    ``None`` where there is no positive or no negative.
    """
    num_positive = int(is_positive.sum())
    num_negative = len(scores) - num_positive
    if num_positive == 0 or num_negative == 0:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    excess = ranks[is_positive].sum() - num_positive * (num_positive + 1) / 2
    return float(excess / (num_positive * num_negative))


def brier_score(predictions: Floats, outcomes: Booleans) -> float | None:
    """Mean squared difference; ``None`` of nothing."""
    if len(predictions) == 0:
        return None
    return float(np.mean((predictions - outcomes) ** 2))


def mean_interval(values: Floats, request_index: Integers, seed: int = 0) -> Estimate:
    """The mean of ``[N]`` values with an interval."""
    num_requests = int(request_index.max()) + 1
    sums = np.bincount(request_index, values, minlength=num_requests)
    counts = np.bincount(request_index, minlength=num_requests)
    weights = _resamples(num_requests, seed)
    low, high = np.quantile((weights @ sums) / (weights @ counts), (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))


def length_difference(ours: RoundTable, theirs: RoundTable) -> Estimate | None:
    """By how much our acceptance length is above theirs, on requests of the same ids.

    A request is drawn with its rounds on both sides, so that how hard it is cancels: this interval
    is narrower than those of the two lengths say. ``None`` where no request has rounds on both.
    """
    common = [name for name in ours.request_ids if name in set(theirs.request_ids)]
    if not common:
        return None
    weights = np.vstack((np.ones(len(common)), _resamples(len(common), seed=0)))
    means = []
    for table in (ours, theirs):
        rows = [table.request_ids.index(name) for name in common]
        sums = np.bincount(table.request_index, table.num_accepted + 1.0)[rows]
        means.append((weights @ sums) / (weights @ np.bincount(table.request_index)[rows]))
    differences = means[0] - means[1]
    low, high = np.quantile(differences[1:], (0.025, 0.975))
    return Estimate(float(differences[0]), float(low), float(high))


def _gaps_by_request(
    predictions: Floats, outcomes: Floats, request_index: Integers
) -> tuple[Floats, Floats]:
    """Sums of prediction - outcome, and their counts, ``[requests, NUM_BINS]`` each."""
    num_requests = int(request_index.max()) + 1
    cells, size = request_index * NUM_BINS + _bins(predictions), num_requests * NUM_BINS
    gaps = np.bincount(cells, predictions - outcomes, minlength=size).astype(np.float64)
    counts = np.bincount(cells, minlength=size).astype(np.float64)
    return gaps.reshape(-1, NUM_BINS), counts.reshape(-1, NUM_BINS)


def _bins(predictions: Floats) -> Integers:
    return np.minimum((predictions * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def _resamples(num_requests: int, seed: int) -> Floats:
    """``[_NUM_RESAMPLES, num_requests]`` how often each request is drawn."""
    random = np.random.default_rng(seed)
    chances = np.full(num_requests, 1 / num_requests)
    return random.multinomial(num_requests, chances, size=_NUM_RESAMPLES).astype(np.float64)
