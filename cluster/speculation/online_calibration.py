"""A calibration kept current from what is accepted while serving.

**What is learnt.** A position is only known about where it was admitted, so of a round only its
admitted positions count; for those the outcome "this token and all before it were accepted" is
always known. Where rejection sampling gives the exact chance of acceptance, it stands in for the
coin of the last token reached. Admission looks at confidences, never at outcomes, so within what
was admitted the outcome given the confidences keeps its law: selecting by what a model conditions
on does not bias it.

**What is forgotten.** Outcomes count for a number of rounds, not until others take their place. A
drafter that was bad for a while would else be out for good: with confidences that low nothing of it
is admitted, so nothing would ever speak for it again. As the outcomes age, the scaling goes back
towards the offline fit, until so much is admitted that what it shows holds the scaling where it
belongs; that is some rounds in a hundred where nothing else is worth its time.

**How.** The last rounds of each key are kept, and every so often each position's temperature and
bias, one before the fitted map and one behind it, take scoring steps (Newton's method with the
expected curvature) on the log-loss of the survival, left to right as in the offline fit, with a
normal prior on both around that fit: on the logarithm of the temperature and on the bias, which is
one of odds.

**Legality** (DESIGN.md, rule 3). With rejection sampling, admission of x_k may depend only on what
was fixed before x_k was drawn, or is independent of it given that. The scaling changes from
outcomes of finished passes only. A pass's outcomes involve its own sequences' drafts of rounds
that are over, and random numbers that are nobody else's; the plan of that pass read no draft of
a round that was not in it. So when a proposal that contains x_k is planned, the scaling is a
function of earlier rounds of its own sequence, which were over before x_k was drawn, and of other
sequences' outcomes, which x_k had no part in, even where they were drawn while x_k was on its way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.speculation.calibration import (
    Calibration,
    LogitScaling,
    logit,
    scoring_terms,
    sigmoid,
    survival,
)
from cluster.speculation.record import CalibrationKey, VerificationRecord

Floats = npt.NDArray[np.float64]

MAX_DRIFT = 4.0

_WINDOW_ROUNDS = 2048
_UPDATE_ROUNDS = 256
_NUM_SCORING_STEPS = 2
# Of the logarithm of a temperature, and of a bias; the prior is around their offline fit.
_LARGEST_STEP = 0.5
_PRIOR_STD = 0.2
_NUM_ERROR_BINS = 10
_MIN_ERROR_OUTCOMES = 512  # with fewer, chance makes several percent of it


class OnlineCalibration:
    """The scaling in force, and how wrong it has lately been.

    Guarantees: temperatures stay within a factor of ``MAX_DRIFT`` of 1, and so do the factors that
    biases make of odds; memory is bounded by the number of keys; the result does not
    depend on records that were not passed in.

    Args:
        offline: where every key starts, and is drawn back to where there are few outcomes.
        is_fixed: leave the scaling as it is and only measure its error.
    """

    def __init__(self, offline: Calibration, *, is_fixed: bool = False) -> None:
        self._offline = offline
        self._is_fixed = is_fixed
        self._windows: dict[CalibrationKey, _Window] = {}

    @property
    def error(self) -> float | None:
        """Windowed calibration error of the survival as it was served, in [0, 1].

        The largest over positions and keys of the root mean square gap between survival and
        outcome in bins, less what chance alone makes of it; each outcome was predicted by a
        scaling that had not seen it. ``None`` while no position has enough outcomes.
        """
        errors = [w.error for w in self._windows.values() if w.error is not None]
        return max(errors, default=None)

    @property
    def drift(self) -> float:
        """Largest factor, up or down, by which raw log-odds are divided before the offline map, or
        odds multiplied behind it; at least 1."""
        drifts = [float(np.exp(np.abs(w.drift).max())) for w in self._windows.values()]
        return max(drifts, default=1.0)

    def scaling(self, key: CalibrationKey, num_positions: int) -> LogitScaling:
        """The scaling in force of the first ``num_positions`` positions."""
        window = self._windows.get(key)
        offline = self._offline.scaling(key, num_positions)
        if window is None:
            return offline
        moved = window.scaling()
        known = min(num_positions, len(moved))
        return LogitScaling(moved.maps[:known] + offline.maps[known:])

    def observe(self, record: VerificationRecord) -> None:
        """Takes in one proposal that was planned, whether or not anything of it was admitted; the
        scaling moves once every so many."""
        if record.block_size == 0:
            return
        window = self._windows.get(record.key)
        if window is None or window.num_positions < record.block_size:
            # A longer block than any before starts the key anew; that happens once or twice.
            offline = self._offline.scaling(record.key, record.block_size)
            window = self._windows[record.key] = _Window(offline)
        window.pending.append(record)
        if len(window.pending) >= _UPDATE_ROUNDS:
            window.take_in()
            if not self._is_fixed:
                window.update()


class _Window:
    """The last rounds of one key, and the drift of its scaling.

    Attributes:
        drift: ``[K, 2]`` logarithms of what raw log-odds are divided by before the offline map, and
            what is added behind it.
        pending: records not yet in the window.
        error: see ``OnlineCalibration.error``.
    """

    def __init__(self, offline: LogitScaling) -> None:
        self.num_positions = len(offline)
        self.drift = np.zeros((self.num_positions, 2))
        self.pending: list[VerificationRecord] = []
        self.error: float | None = None
        self._offline = offline
        shape = (_WINDOW_ROUNDS, self.num_positions)
        self._logits = np.zeros(shape)
        self._outcomes = np.full(shape, np.nan)  # not a number where a position is not known
        self._served = np.zeros(shape)
        self._num_rounds = 0

    def scaling(self) -> LogitScaling:
        """The offline scaling, moved by the drift."""
        drifts = self.drift.tolist()
        return LogitScaling(
            tuple(
                line.moved(*drift) for line, drift in zip(self._offline.maps, drifts, strict=True)
            )
        )

    def take_in(self) -> None:
        """Moves the pending records into the window, over the oldest ones."""
        shape = (len(self.pending), self.num_positions)
        confidences, outcomes = np.full(shape, 0.5), np.full(shape, np.nan)
        for row, record in enumerate(self.pending):
            width, num_accepted = len(record.confidences), record.num_accepted_tokens
            confidences[row, :width] = record.confidences
            outcomes[row, :num_accepted] = 1.0
            outcomes[row, num_accepted:width] = 0.0
            if record.acceptance:
                last = min(num_accepted + 1, width)
                outcomes[row, :last] = record.acceptance[:last]
        rows = np.arange(self._num_rounds, self._num_rounds + len(self.pending)) % _WINDOW_ROUNDS
        self._logits[rows] = logit(confidences)
        self._outcomes[rows] = np.minimum(outcomes, 1.0)
        self._served[rows] = survival(self.scaling().apply(confidences))
        self._num_rounds += len(self.pending)
        self.pending.clear()
        self.error = self._served_error()

    def update(self) -> None:
        """Scoring steps for every position, left to right."""
        num_rows = min(self._num_rounds, _WINDOW_ROUNDS)
        before = np.ones(num_rows)
        for position in range(self.num_positions):
            logits = self._logits[:num_rows, position]
            outcome = self._outcomes[:num_rows, position]
            known = ~np.isnan(outcome)
            for _ in range(_NUM_SCORING_STEPS):
                self._step(position, logits[known], before[known], outcome[known])
            before = before * sigmoid(self._scaled(position, logits)[0])

    def _scaled(self, position: int, logits: Floats) -> tuple[Floats, Floats]:
        """Calibrated logits ``[N]`` of raw ones, and their derivatives by drift, ``[2, N]``."""
        log_temperature, bias = self.drift[position]
        tempered = logits * np.exp(-log_temperature)
        value, slope = self._offline.maps[position].value_and_slope(tempered)
        return value + bias, np.stack((-slope * tempered, np.ones_like(slope)))

    def _step(self, position: int, logits: Floats, before: Floats, outcome: Floats) -> None:
        """One scoring step on the log-likelihood of the survival and the prior of the drift."""
        scaled, by_drift = self._scaled(position, logits)
        gradient, curvature = scoring_terms(scaled, by_drift, before, outcome)
        precision = _PRIOR_STD**-2
        gradient -= precision * self.drift[position]
        curvature += precision * np.eye(2)
        step = np.clip(np.linalg.solve(curvature, gradient), -_LARGEST_STEP, _LARGEST_STEP)
        largest = np.log(MAX_DRIFT)
        self.drift[position] = np.clip(self.drift[position] + step, -largest, largest)

    def _served_error(self) -> float | None:
        num_rows = min(self._num_rounds, _WINDOW_ROUNDS)
        gaps = []
        for position in range(self.num_positions):
            outcome = self._outcomes[:num_rows, position]
            known = ~np.isnan(outcome)
            if known.sum() >= _MIN_ERROR_OUTCOMES:
                gaps.append(_debiased_gap(self._served[:num_rows, position][known], outcome[known]))
        return max(gaps, default=None)


def _debiased_gap(chance: Floats, outcome: Floats) -> float:
    """Root mean square gap over bins, each bin's less the variance of its mean outcome."""
    bins = np.minimum((chance * _NUM_ERROR_BINS).astype(np.int64), _NUM_ERROR_BINS - 1)
    counts = np.maximum(np.bincount(bins, minlength=_NUM_ERROR_BINS), 1)
    gap = np.bincount(bins, chance - outcome, minlength=_NUM_ERROR_BINS) / counts
    variance = np.bincount(bins, chance * (1 - chance), minlength=_NUM_ERROR_BINS) / counts**2
    return float(np.sqrt(max(0.0, counts @ (gap**2 - variance) / len(chance))))
