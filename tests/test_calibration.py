"""Calibration of confidences: metrics, the offline fit, and its correction while serving."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from cluster.speculation import online_calibration
from cluster.speculation.calibration import (
    Calibration,
    apply_temperatures,
    fit_temperatures,
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
    seed: int = 0,
    key: CalibrationKey = KEY,
    num_admitted: int = BLOCK,
    level: float = 0.9,
) -> list[VerificationRecord]:
    """Rounds whose confidences have logits ``scale`` times those of the true chances."""
    random = np.random.default_rng(seed)
    logits = random.normal(level, 1.0, size=(num_rounds, BLOCK))
    chances = 1 / (1 + np.exp(-logits))
    confidences = 1 / (1 + np.exp(-logits * scale))
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


def errors(table: RoundTable, temperatures: np.ndarray | tuple[float, ...] | float) -> list[float]:
    chances = survival(apply_temperatures(table.confidences, temperatures))
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
            CalibrationKey(COUPLED, "greedy"): (2.0, 3.0),
            CalibrationKey(COUPLED, "high"): (4.0, 5.0),
        }
    )

    def at(verifier: str, bucket: str, count: int = 2) -> list[float]:
        return calibration.temperatures(CalibrationKey(verifier, bucket), count).tolist()

    assert at(COUPLED, "low") == [2.0, 3.0]
    assert at(COUPLED, "medium") == [4.0, 5.0]
    assert at(COUPLED, "high", 4) == [4.0, 5.0, 5.0, 5.0]
    assert at(REJECTION, "high") == [1.0, 1.0]


# ---------------------------------------------------------------------------------- offline fit


def test_temperature_one_changes_nothing_and_ends_stay_finite() -> None:
    confidences = np.array([0.0, 0.2, 0.999, 1.0])
    assert apply_temperatures(confidences, 1.0) == pytest.approx(confidences, abs=1e-5)
    assert np.isfinite(logit(confidences)).all()
    softer = apply_temperatures(confidences, 3.0)
    assert (np.diff(softer) > 0).all()  # the order stays


@pytest.mark.parametrize("key", [KEY, EXACT_KEY], ids=["coupled", "rejection"])
def test_fit_finds_the_scale_and_holds_on_other_rounds(key: CalibrationKey) -> None:
    temperatures = fit_temperatures(draw_table(20_000, scale=2.0, seed=1, key=key))
    # Behind, few rounds are left to tell one temperature from another.
    assert temperatures[:4] == pytest.approx([2.0] * 4, rel=0.25)
    heldout = draw_table(40_000, scale=2.0, seed=2, key=key)
    assert max(errors(heldout, 1.0)) > 0.05
    assert max(errors(heldout, temperatures)) < 0.02


def test_fit_is_sequential() -> None:
    """A later position makes up for what earlier ones cannot: its own confidence is right."""
    table = draw_table(20_000, seed=3)
    wrong = np.full_like(table.confidences, 0.5)
    wrong[:, 1:] = table.confidences[:, 1:]  # the first position says nothing, and too little
    blind = replace(table, confidences=wrong)
    temperatures = fit_temperatures(blind)
    assert temperatures[1] < 0.8  # it alone would be right with 1
    assert errors(blind, temperatures)[1] < errors(blind, 1.0)[1] / 1.5


# --------------------------------------------------------------------------------------- online


def feed(online: OnlineCalibration, records: list[VerificationRecord]) -> None:
    for record in records:
        online.observe(record)


@pytest.mark.parametrize("key", [KEY, EXACT_KEY], ids=["coupled", "rejection"])
@pytest.mark.parametrize("num_admitted", [BLOCK, 4])
def test_doubled_logits_are_brought_back_within_2000_rounds(
    key: CalibrationKey, num_admitted: int
) -> None:
    offline = fit_temperatures(draw_table(20_000, seed=4, key=key))  # on the right scale
    online = OnlineCalibration(Calibration({key: offline}))
    judged = draw_table(40_000, scale=2.0, seed=5, key=key)
    assert max(errors(judged, offline)) > 0.06
    feed(online, draw_records(2000, scale=2.0, seed=6, key=key, num_admitted=num_admitted))
    after = errors(judged, online.temperatures(key, BLOCK))[:num_admitted]
    assert max(after) < 0.04
    assert 1.5 < online.drift < 2.5
    # Positions that were never admitted are not known about, and stay.
    rest = online.temperatures(key, BLOCK)[num_admitted:]
    assert rest == pytest.approx(offline[num_admitted:])


def test_stationary_outcomes_do_not_make_it_wander() -> None:
    offline = fit_temperatures(draw_table(20_000, seed=7))
    online = OnlineCalibration(Calibration({KEY: offline}))
    judged = draw_table(40_000, seed=8)
    before = max(errors(judged, offline))
    for seed in range(10, 20):
        feed(online, draw_records(2000, seed=seed))
        assert online.drift < 1.35
        assert max(errors(judged, online.temperatures(KEY, BLOCK))) < before + 0.01
    assert online.error is not None
    assert online.error < 0.03


def test_drift_is_bounded_whatever_happens() -> None:
    """Confidence says yes, the verifier always no: no temperature makes that right."""
    online = OnlineCalibration(Calibration({KEY: (1.0,) * BLOCK}))
    record = VerificationRecord(KEY, "a", BLOCK, (0.9,) * BLOCK, 0)
    feed(online, [record] * 5000)
    assert online.drift == pytest.approx(MAX_DRIFT)
    assert online.error is not None
    assert online.error > 0.3  # and the metric says that it is not


def test_certain_confidences_stay_finite_under_a_small_temperature() -> None:
    """A chance of acceptance that rounds to 1 has an exact 0 for a denominator."""
    online = OnlineCalibration(Calibration({KEY: (0.3,) * BLOCK}))
    record = VerificationRecord(KEY, "a", BLOCK, (1.0,) * BLOCK, BLOCK)
    feed(online, [record, record._replace(num_accepted_tokens=0)] * 600)
    assert np.isfinite(online.temperatures(KEY, BLOCK)).all()
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
    assert online.temperatures(EXACT_KEY, BLOCK).tolist() == [1.0] * BLOCK


def test_a_longer_block_starts_the_key_anew() -> None:
    online = OnlineCalibration(Calibration())
    short = [r._replace(block_size=4, confidences=r.confidences[:4]) for r in draw_records(600)]
    feed(online, [r._replace(num_accepted_tokens=min(r.num_accepted_tokens, 4)) for r in short])
    feed(online, draw_records(2000, scale=2.0, seed=23))
    assert online.temperatures(KEY, BLOCK) == pytest.approx([2.0] * BLOCK, rel=0.3)


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
