"""Calibration of confidences: metrics and the offline fit."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.speculation.calibration import (
    Calibration,
    LogitMap,
    LogitScaling,
    logit,
    sigmoid,
)
from cluster.speculation.calibration_fit import _Loss, fit_scaling
from cluster.speculation.record import (
    COUPLED,
    REJECTION,
    CalibrationKey,
    VerificationRecord,
    calibration_key,
)
from cluster.speculation.reliability import (
    RoundTable,
    area_under_curve,
    brier_score,
    calibration_error,
    calibration_error_interval,
    calibration_noise,
    calibration_request_noise,
    mean_interval,
    reliability_bins,
)
from tests.calibration_rounds import BLOCK, EXACT_KEY, KEY, RAW, draw_table, errors, straight

# ------------------------------------------------------------------------------------- metrics


def test_calibration_error_by_hand() -> None:
    # Bin [0.1, 0.15): predictions 0.1 and 0.14, one of two happened. Bin [0.95, 1]: 1.0, happened.
    predictions, outcomes = np.array([0.1, 0.14, 1.0]), np.array([0.0, 1.0, 1.0])
    assert calibration_error(predictions, outcomes) == pytest.approx((1 - 0.24) / 3)
    bins = reliability_bins(predictions, outcomes)
    assert bins.count[2] == 2
    assert bins.mean_prediction[2] == pytest.approx(0.12)
    assert bins.mean_outcome[2] == 0.5
    assert bins.count[19] == 1
    assert bins.count.sum() == 3
    with pytest.raises(ValueError, match="no rounds"):
        calibration_error(np.zeros(0), np.zeros(0))


def test_area_under_curve_counts_ties_half() -> None:
    scores = np.array([0.1, 0.4, 0.4, 0.8])
    is_positive = np.array([False, False, True, True])
    assert area_under_curve(scores, is_positive) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert area_under_curve(scores, np.ones(4, dtype=bool)) is None


def test_brier_score_by_hand() -> None:
    assert brier_score(np.array([0.2, 0.9]), np.array([False, True])) == pytest.approx(0.025)
    assert brier_score(np.zeros(0), np.zeros(0, dtype=bool)) is None


def test_intervals_hold_the_value_and_widen_where_requests_differ() -> None:
    random = np.random.default_rng(0)
    request_index = np.repeat(np.arange(50), 20)
    alone = random.random(1000)
    together = np.repeat(random.random(50), 20)
    narrow, wide = mean_interval(alone, request_index), mean_interval(together, request_index)
    assert narrow.low < narrow.value < narrow.high
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)
    predictions = np.full(1000, 0.3)
    interval = calibration_error_interval(predictions, np.ones(1000), request_index)
    assert interval.value == pytest.approx(0.7)
    assert interval.low == pytest.approx(0.7)


def test_noise_is_what_right_predictions_show() -> None:
    random = np.random.default_rng(1)
    predictions = random.random(4000)
    shown = [
        calibration_error(predictions, (random.random(4000) < predictions) * 1.0) for _ in range(30)
    ]
    assert calibration_noise(predictions) == pytest.approx(np.mean(shown), rel=0.15)


def test_noise_of_requests_whose_rounds_are_alike_is_larger() -> None:
    """Twenty rounds that share one outcome are one; the independent noise does not see that."""
    random = np.random.default_rng(2)
    request_index = np.repeat(np.arange(400), 20)
    predictions = random.random(8000)
    alone = (random.random(8000) < predictions) * 1.0
    together = (np.repeat(random.random(400), 20) < predictions) * 1.0
    independent = calibration_noise(predictions)
    assert calibration_request_noise(predictions, alone, request_index) == pytest.approx(
        independent, rel=0.2
    )
    shown = [
        calibration_error(predictions, (np.repeat(random.random(400), 20) < predictions) * 1.0)
        for _ in range(30)
    ]
    assert calibration_request_noise(predictions, together, request_index) == pytest.approx(
        np.mean(shown), rel=0.25
    )
    assert np.mean(shown) > 1.2 * independent
    # An error that all requests share is no noise.
    same = calibration_request_noise(np.full(8000, 0.3), np.ones(8000), request_index)
    assert same == pytest.approx(0.0, abs=1e-9)


def test_outcomes_use_the_exact_chance_where_it_is_known() -> None:
    record = VerificationRecord(EXACT_KEY, "a", 3, (0.5, 0.5, 0.5), 1, (0.9, 0.4, 0.7))
    partial = record._replace(confidences=(0.5,), num_accepted_tokens=1, acceptance=(0.9,))
    short = partial._replace(block_size=1)
    table = RoundTable.from_records([record, partial, short], 3)
    assert len(table) == 2  # the second block was not verified whole
    assert table.outcomes.tolist() == [[0.9, 0.4, 0.0], [0.9, 0.0, 0.0]]
    assert table.is_reached.tolist() == [[True, True, False], [True, False, False]]
    coin = RoundTable.from_records([record._replace(acceptance=())], 3)
    assert coin.outcomes.tolist() == [[1.0, 0.0, 0.0]]


# ----------------------------------------------------------------------------------------- keys


def test_keys_by_verifier_and_temperature() -> None:
    assert calibration_key(0.0, is_seeded=False) == (COUPLED, "greedy")
    assert calibration_key(0.7, is_seeded=True) == (COUPLED, "medium")
    assert calibration_key(0.3, is_seeded=False) == (REJECTION, "low")
    assert calibration_key(1.0, is_seeded=False) == (REJECTION, "high")


def test_what_was_not_fitted_takes_the_nearest_fit() -> None:
    calibration = Calibration(
        {
            CalibrationKey(COUPLED, "greedy"): straight((2.0, 3.0), (0.2, 0.3)),
            CalibrationKey(COUPLED, "high"): straight((4.0, 5.0), (0.4, 0.5)),
        }
    )

    def at(verifier: str, bucket: str, count: int = 2) -> LogitScaling:
        return calibration.scaling(CalibrationKey(verifier, bucket), count)

    assert at(COUPLED, "low") == straight((2.0, 3.0), (0.2, 0.3))
    assert at(COUPLED, "medium") == straight((4.0, 5.0), (0.4, 0.5))
    assert at(COUPLED, "high", 4) == straight((4.0, 5.0, 5.0, 5.0), (0.4, 0.5, 0.5, 0.5))
    assert at(REJECTION, "high") == LogitScaling.identity(2)


# ---------------------------------------------------------------------------------- offline fit


def test_scaling_by_hand() -> None:
    confidences = np.array([[0.0, 0.2], [0.999, 1.0]])
    assert LogitScaling.identity(2).apply(confidences) == pytest.approx(confidences, abs=1e-5)
    assert np.isfinite(logit(confidences)).all()
    scaled = straight((2.0, 0.5), (-1.0, 0.5)).apply(np.array([[0.9, 0.2]]))
    # logit 0.9 = ln 9, halved less 1; logit 0.2 = -ln 4, doubled and a half more.
    assert scaled[0] == pytest.approx([3 / (3 + np.e), np.exp(0.5) / (16 + np.exp(0.5))])


def test_a_map_is_straight_between_its_points_and_beyond_them() -> None:
    line = LogitMap((0.0, 1.0, 3.0), (2.0, 2.5, 6.5))
    raw = np.array([[-2.0, 0.0, 0.5], [1.0, 2.0, 4.0]])
    assert line.apply(raw) == pytest.approx(np.array([[1.0, 2.0, 2.25], [2.5, 4.5, 8.5]]))
    assert line.value_and_slope(raw)[1] == pytest.approx(np.array([[0.5] * 3, [0.5, 2.0, 2.0]]))
    both = LogitScaling((line, LogitMap.straight(2.0, -1.0)))
    scaled = logit(both.apply(sigmoid(np.stack((raw, raw), axis=-1))))
    assert scaled == pytest.approx(np.stack((line.apply(raw), raw / 2 - 1), axis=-1))
    assert LogitScaling(()).apply(np.zeros((3, 0))).shape == (3, 0)
    moved = line.moved(np.log(2.0), -1.0)  # logits are halved first
    assert moved.apply(2 * raw) == pytest.approx(line.apply(raw) - 1)


@pytest.mark.parametrize("key", [KEY, EXACT_KEY], ids=["coupled", "rejection"])
def test_fit_finds_scale_and_shift_and_holds_on_other_rounds(key: CalibrationKey) -> None:
    scaling = fit_scaling(draw_table(10_000, scale=2.0, shift=0.6, seed=1, key=key))
    for line in scaling.maps[:4]:  # behind, few rounds are left to tell one from another
        true = np.array([-0.3, 0.6, 1.5])
        assert line.apply(2.0 * (true + 0.6)) == pytest.approx(true, abs=0.25)
    heldout = draw_table(40_000, scale=2.0, shift=0.6, seed=2, key=key)
    assert max(errors(heldout, RAW)) > 0.1
    assert max(errors(heldout, scaling)) < 0.02


def test_a_temperature_alone_would_not_mend_a_shift() -> None:
    """What the bias is for: confidences on both sides of one half, and all too high."""
    table = draw_table(10_000, shift=0.8, level=0.0, seed=27)
    scaled = [
        errors(table, straight([float(t)] * BLOCK, [0.0] * BLOCK))[0]
        for t in np.geomspace(0.2, 5, 40)
    ]
    assert min(scaled) > 0.06
    assert errors(table, fit_scaling(table))[0] < 0.02


def test_fit_stays_finite_where_rounds_say_nothing() -> None:
    """All accepted, all alike, some positions without any token."""
    records = [VerificationRecord(KEY, str(i), 2, (0.9, 0.9), 2) for i in range(50)]
    scaling = fit_scaling(RoundTable.from_records(records, 3))
    for line in scaling.maps:
        assert np.isfinite(line.raw + line.calibrated).all()
        assert min(np.diff(line.raw)) > 0
        assert min(np.diff(line.calibrated)) > 0
    assert scaling.maps[2] == LogitMap.identity()
    assert scaling.apply(np.full((1, 3), 0.9))[0, 0] > 0.97
    with pytest.raises(ValueError, match="no rounds"):
        fit_scaling(RoundTable.from_records([], 3))


def test_fit_finds_a_bend() -> None:
    """Unsure confidences say nothing, as where a greedy answer repeats itself; sure ones do."""
    law = LogitScaling((LogitMap((0.0, 1.0, 2.0), (0.4, 0.45, 3.0)),) * BLOCK)
    random = np.random.default_rng(4)
    confidences = sigmoid(random.normal(0.9, 1.0, size=(20_000, BLOCK)))
    counts = np.cumprod(random.random(confidences.shape) < law.apply(confidences), axis=1).sum(1)
    records = [
        VerificationRecord(KEY, str(row), BLOCK, tuple(values.tolist()), int(count))
        for row, (values, count) in enumerate(zip(confidences, counts, strict=True))
    ]
    fitted_on, judged = (
        RoundTable.from_records(half, BLOCK) for half in (records[::2], records[1::2])
    )
    assert max(errors(judged, RAW)) > 0.04
    assert max(errors(judged, fit_scaling(fitted_on))) < 0.02


@pytest.mark.parametrize("where", [0.3, 0.55, 0.8])
def test_the_fits_gradient_is_that_of_its_loss(where: float) -> None:
    table = draw_table(2000, scale=2.0, seed=5)
    loss = _Loss(logit(table.confidences)[:, 1], np.full(2000, where), table.outcomes[:, 1])
    parameters = loss.start + np.linspace(-0.5, 0.5, len(loss.start))
    gradient, _ = loss.terms(parameters)
    for index, step in enumerate(1e-6 * np.eye(len(parameters))):
        slope = (loss.value(parameters + step) - loss.value(parameters - step)) / 2e-6
        assert gradient[index] == pytest.approx(slope, abs=2e-4)


def test_fit_is_sequential() -> None:
    """A later position makes up for what earlier ones cannot: its own confidence is right."""
    random = np.random.default_rng(3)
    chances = 1 / (1 + np.exp(-random.normal(0.5, 1.5, size=20_000)))  # of both positions alike
    accepted = np.cumprod(random.random((20_000, 2)) < chances[:, None], axis=1).sum(1)
    records = [
        VerificationRecord(KEY, str(row), 2, (0.5, chance), num_accepted)  # the first is blind
        for row, (chance, num_accepted) in enumerate(
            zip(chances.tolist(), accepted.tolist(), strict=True)
        )
    ]
    table = RoundTable.from_records(records, 2)
    scaling = fit_scaling(table)
    alone = LogitScaling((scaling.maps[0], LogitMap.identity()))
    assert errors(table, scaling)[1] < errors(table, alone)[1] / 1.5
