"""Calibration of confidences: metrics, the offline fit, and its correction while serving."""

from __future__ import annotations

import time

import numpy as np
import pytest

from cluster.speculation import online_calibration
from cluster.speculation.calibration import (
    Calibration,
    LogitScaling,
    fit_scaling,
    logit,
    survival,
)
from cluster.speculation.online_calibration import MAX_DRIFT, OnlineCalibration
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

BLOCK = 7
KEY = CalibrationKey(COUPLED, "high")
EXACT_KEY = CalibrationKey(REJECTION, "high")


def draw_records(
    num_rounds: int,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    seed: int = 0,
    key: CalibrationKey = KEY,
    num_admitted: int = BLOCK,
    level: float = 0.9,
) -> list[VerificationRecord]:
    """Rounds whose confidences have logits ``scale`` times (true ones + ``shift``)."""
    random = np.random.default_rng(seed)
    logits = random.normal(level, 1.0, size=(num_rounds, BLOCK))
    chances = 1 / (1 + np.exp(-logits))
    confidences = 1 / (1 + np.exp(-(logits + shift) * scale))
    accepted = np.cumprod(random.random(chances.shape) < chances, axis=1)[:, :num_admitted].sum(1)
    return [
        VerificationRecord(
            key=key,
            request_id=str(row // 8),
            block_size=BLOCK,
            confidences=tuple(confidences[row, :num_admitted].tolist()),
            num_accepted_tokens=int(accepted[row]),
            acceptance=tuple(chances[row, :num_admitted].tolist())
            if key.verifier == REJECTION
            else (),
        )
        for row in range(num_rounds)
    ]


def draw_table(num_rounds: int, **options: object) -> RoundTable:
    return RoundTable.from_records(draw_records(num_rounds, **options), BLOCK)  # type: ignore[arg-type]


RAW = LogitScaling.identity(BLOCK)


def errors(table: RoundTable, scaling: LogitScaling) -> list[float]:
    chances = survival(scaling.apply(table.confidences))
    return [
        calibration_error(chances[:, k], table.is_accepted[:, k] * 1.0)
        for k in range(table.num_positions)
    ]


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
            CalibrationKey(COUPLED, "greedy"): LogitScaling((2.0, 3.0), (0.2, 0.3)),
            CalibrationKey(COUPLED, "high"): LogitScaling((4.0, 5.0), (0.4, 0.5)),
        }
    )

    def at(verifier: str, bucket: str, count: int = 2) -> LogitScaling:
        return calibration.scaling(CalibrationKey(verifier, bucket), count)

    assert at(COUPLED, "low") == LogitScaling((2.0, 3.0), (0.2, 0.3))
    assert at(COUPLED, "medium") == LogitScaling((4.0, 5.0), (0.4, 0.5))
    assert at(COUPLED, "high", 4) == LogitScaling((4.0, 5.0, 5.0, 5.0), (0.4, 0.5, 0.5, 0.5))
    assert at(REJECTION, "high") == LogitScaling((1.0, 1.0), (0.0, 0.0))


# ---------------------------------------------------------------------------------- offline fit


def test_scaling_by_hand() -> None:
    confidences = np.array([[0.0, 0.2], [0.999, 1.0]])
    assert LogitScaling.identity(2).apply(confidences) == pytest.approx(confidences, abs=1e-5)
    assert np.isfinite(logit(confidences)).all()
    scaled = LogitScaling((2.0, 0.5), (-1.0, 0.5)).apply(np.array([[0.9, 0.2]]))
    # logit 0.9 = ln 9, halved less 1; logit 0.2 = -ln 4, doubled and a half more.
    assert scaled[0] == pytest.approx([3 / (3 + np.e), np.exp(0.5) / (16 + np.exp(0.5))])
    rising = np.array([[0.0], [0.2], [0.999], [1.0]])
    assert (np.diff(LogitScaling((3.0,), (-2.0,)).apply(rising)[:, 0]) > 0).all()  # order stays


@pytest.mark.parametrize("key", [KEY, EXACT_KEY], ids=["coupled", "rejection"])
def test_fit_finds_scale_and_shift_and_holds_on_other_rounds(key: CalibrationKey) -> None:
    scaling = fit_scaling(draw_table(20_000, scale=2.0, shift=0.6, seed=1, key=key))
    # Behind, few rounds are left to tell one scaling from another.
    assert scaling.temperatures[:4] == pytest.approx([2.0] * 4, rel=0.25)
    assert scaling.biases[:4] == pytest.approx([-0.6] * 4, abs=0.2)
    heldout = draw_table(40_000, scale=2.0, shift=0.6, seed=2, key=key)
    assert max(errors(heldout, RAW)) > 0.1
    assert max(errors(heldout, scaling)) < 0.02


def test_a_temperature_alone_would_not_mend_a_shift() -> None:
    """What the bias is for: confidences on both sides of one half, and all too high."""
    table = draw_table(20_000, shift=0.8, level=0.0, seed=27)
    scaled = [
        errors(table, LogitScaling((float(t),) * BLOCK, RAW.biases))[0]
        for t in np.geomspace(0.2, 5, 40)
    ]
    assert min(scaled) > 0.06
    assert errors(table, fit_scaling(table))[0] < 0.02


def test_fit_stays_finite_where_rounds_say_nothing() -> None:
    """All accepted, all alike, some positions without any token."""
    records = [VerificationRecord(KEY, str(i), 2, (0.9, 0.9), 2) for i in range(50)]
    scaling = fit_scaling(RoundTable.from_records(records, 3))
    assert np.isfinite(scaling.temperatures + scaling.biases).all()
    assert (scaling.temperatures[2], scaling.biases[2]) == (1.0, 0.0)
    assert scaling.apply(np.full((1, 3), 0.9))[0, 0] > 0.97
    with pytest.raises(ValueError, match="no rounds"):
        fit_scaling(RoundTable.from_records([], 3))


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
    assert scaling.temperatures[1] < 0.8
    alone = LogitScaling((scaling.temperatures[0], 1.0), (scaling.biases[0], 0.0))
    assert errors(table, scaling)[1] < errors(table, alone)[1] / 1.5


# --------------------------------------------------------------------------------------- online


def feed(online: OnlineCalibration, records: list[VerificationRecord]) -> None:
    for record in records:
        online.observe(record)


@pytest.mark.parametrize("key", [KEY, EXACT_KEY], ids=["coupled", "rejection"])
@pytest.mark.parametrize("num_admitted", [BLOCK, 4])
def test_doubled_logits_are_brought_back_within_2000_rounds(
    key: CalibrationKey, num_admitted: int
) -> None:
    offline = fit_scaling(draw_table(20_000, seed=4, key=key))  # on the right scale
    online = OnlineCalibration(Calibration({key: offline}))
    judged = draw_table(40_000, scale=2.0, seed=5, key=key)
    assert max(errors(judged, offline)) > 0.06
    feed(online, draw_records(2000, scale=2.0, seed=6, key=key, num_admitted=num_admitted))
    after = errors(judged, online.scaling(key, BLOCK))[:num_admitted]
    assert max(after) < 0.04
    assert 1.5 < online.drift < 2.5
    # Positions that were never admitted are not known about, and stay.
    moved = online.scaling(key, BLOCK)
    assert moved.temperatures[num_admitted:] == pytest.approx(offline.temperatures[num_admitted:])
    assert moved.biases[num_admitted:] == pytest.approx(offline.biases[num_admitted:])


def test_a_shift_of_the_odds_is_brought_back_too() -> None:
    offline = fit_scaling(draw_table(20_000, seed=4))
    online = OnlineCalibration(Calibration({KEY: offline}))
    judged = draw_table(40_000, shift=0.8, seed=5)
    assert max(errors(judged, offline)) > 0.1
    feed(online, draw_records(2000, shift=0.8, seed=6))
    assert max(errors(judged, online.scaling(KEY, BLOCK))) < 0.04
    assert online.scaling(KEY, BLOCK).biases[0] == pytest.approx(-0.8, abs=0.3)


def test_stationary_outcomes_do_not_make_it_wander() -> None:
    offline = fit_scaling(draw_table(20_000, seed=7))
    online = OnlineCalibration(Calibration({KEY: offline}))
    judged = draw_table(40_000, seed=8)
    before = max(errors(judged, offline))
    for seed in range(10, 20):
        feed(online, draw_records(2000, seed=seed))
        assert online.drift < 1.35
        assert max(errors(judged, online.scaling(KEY, BLOCK))) < before + 0.02
    assert online.error is not None
    assert online.error < 0.03


def test_drift_is_bounded_whatever_happens() -> None:
    """Confidence says yes, the verifier always no: no scaling within the bound makes that right."""
    online = OnlineCalibration(Calibration({KEY: RAW}))
    record = VerificationRecord(KEY, "a", BLOCK, (0.9,) * BLOCK, 0)
    feed(online, [record] * 5000)
    assert online.drift == pytest.approx(MAX_DRIFT)
    assert online.error is not None
    assert online.error > 0.3  # and the metric says that it is not


def test_certain_confidences_stay_finite_under_a_small_temperature() -> None:
    """A chance of acceptance that rounds to 1 has an exact 0 for a denominator."""
    online = OnlineCalibration(Calibration({KEY: LogitScaling((0.3,) * BLOCK, RAW.biases)}))
    record = VerificationRecord(KEY, "a", BLOCK, (1.0,) * BLOCK, BLOCK)
    feed(online, [record, record._replace(num_accepted_tokens=0)] * 600)
    moved = online.scaling(KEY, BLOCK)
    assert np.isfinite(moved.temperatures + moved.biases).all()
    assert online.drift > 1.5  # and it learns that they are too sure


def test_error_tells_wrong_from_right_while_fixed() -> None:
    right, wrong = (OnlineCalibration(Calibration(), is_fixed=True) for _ in range(2))
    assert right.error is None
    feed(right, draw_records(2000, seed=21))
    feed(wrong, draw_records(2000, seed=21, scale=2.0))
    assert right.error is not None
    assert wrong.error is not None
    assert right.error < 0.03
    assert wrong.error > 0.06
    assert wrong.drift == 1.0


def test_positions_that_were_not_admitted_are_not_taken_for_rejected() -> None:
    online = OnlineCalibration(Calibration())
    feed(online, draw_records(2304, seed=26, num_admitted=4))
    assert online.error is not None
    assert online.error < 0.03


def test_keys_are_kept_apart() -> None:
    online = OnlineCalibration(Calibration())
    feed(online, draw_records(2000, seed=22, scale=2.0))
    assert online.scaling(EXACT_KEY, BLOCK) == RAW


def test_a_longer_block_starts_the_key_anew() -> None:
    online = OnlineCalibration(Calibration())
    short = [r._replace(block_size=4, confidences=r.confidences[:4]) for r in draw_records(600)]
    feed(online, [r._replace(num_accepted_tokens=min(r.num_accepted_tokens, 4)) for r in short])
    feed(online, draw_records(2000, scale=2.0, seed=23))
    moved = online.scaling(KEY, BLOCK)
    assert len(moved) == BLOCK
    assert moved.temperatures[:4] == pytest.approx([2.0] * 4, rel=0.3)


def test_memory_is_bounded() -> None:
    online = OnlineCalibration(Calibration())
    feed(online, draw_records(3000, seed=24))
    (window,) = online._windows.values()
    assert len(window.pending) < online_calibration._UPDATE_ROUNDS
    assert len(window._logits) == online_calibration._WINDOW_ROUNDS


def test_cost_of_a_round_is_negligible() -> None:
    """Twenty microseconds a round on an idle core; ten times that here, where others compute."""
    records = draw_records(4096, seed=25)
    online = OnlineCalibration(Calibration())
    start = time.thread_time()
    feed(online, records)
    assert (time.thread_time() - start) / len(records) < 200e-6
