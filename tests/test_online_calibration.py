"""Calibration while serving: it follows the outcomes, within bounds, and finds its way back."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import pytest

from cluster.bench.mis_scaled import mis_scaled_figures
from cluster.speculation import online_calibration
from cluster.speculation.calibration import (
    Calibration,
    LogitMap,
    LogitScaling,
    sigmoid,
    survival,
)
from cluster.speculation.calibration_fit import fit_scaling
from cluster.speculation.online_calibration import MAX_DRIFT, OnlineCalibration
from cluster.speculation.record import CalibrationKey, VerificationRecord
from cluster.speculation.reliability import RoundTable
from tests.calibration_rounds import (
    BLOCK,
    EXACT_KEY,
    KEY,
    RAW,
    draw_records,
    draw_table,
    errors,
    straight,
)


@cache
def fitted(key: CalibrationKey) -> LogitScaling:
    """An offline fit on rounds whose confidences are right."""
    return fit_scaling(draw_table(10_000, seed=4, key=key))


def feed(online: OnlineCalibration, records: list[VerificationRecord]) -> None:
    for record in records:
        online.observe(record)


@pytest.mark.parametrize("key", [KEY, EXACT_KEY], ids=["coupled", "rejection"])
@pytest.mark.parametrize("num_admitted", [BLOCK, 4])
def test_doubled_logits_are_brought_back_within_2000_rounds(
    key: CalibrationKey, num_admitted: int
) -> None:
    offline = fitted(key)  # on the right scale
    online = OnlineCalibration(Calibration({key: offline}))
    judged = draw_table(40_000, scale=2.0, seed=5, key=key)
    assert max(errors(judged, offline)) > 0.06
    feed(online, draw_records(2000, scale=2.0, seed=6, key=key, num_admitted=num_admitted))
    after = errors(judged, online.scaling(key, BLOCK))[:num_admitted]
    assert max(after) < 0.04
    assert 1.5 < online.drift < 2.5
    # Positions that were never admitted are not known about, and stay.
    assert online.scaling(key, BLOCK).maps[num_admitted:] == offline.maps[num_admitted:]


@pytest.mark.parametrize("key", [KEY, EXACT_KEY], ids=["coupled", "rejection"])
def test_the_suite_shows_it_on_rounds_that_it_has(key: CalibrationKey) -> None:
    found = mis_scaled_figures(draw_table(20_000, seed=7, key=key), key, fitted(key))
    assert found is not None
    assert (found["learnt_rounds"], found["judged_rounds"]) == (2000, 18_000)
    assert max(found["before"]) > 0.06
    assert max(found["after"]) < 0.04
    assert mis_scaled_figures(draw_table(2500, seed=7, key=key), key, fitted(key)) is None


def test_a_bend_is_kept_under_another_scale() -> None:
    """What doubled logits need is another temperature before the map, and the same map."""
    bent = LogitScaling((LogitMap((0.0, 1.0, 2.0), (0.4, 0.8, 3.0)),) * BLOCK)
    random = np.random.default_rng(29)
    logits = random.normal(0.9, 1.0, size=(22_000, BLOCK))
    chances = bent.apply(sigmoid(logits))
    counts = np.cumprod(random.random(chances.shape) < chances, axis=1).sum(1)
    records = [
        VerificationRecord(KEY, str(row), BLOCK, tuple(sigmoid(2 * values).tolist()), int(count))
        for row, (values, count) in enumerate(zip(logits, counts, strict=True))
    ]
    online = OnlineCalibration(Calibration({KEY: bent}))
    judged = RoundTable.from_records(records[2000:], BLOCK)
    before = max(errors(judged, bent))
    feed(online, records[:2000])
    assert max(errors(judged, online.scaling(KEY, BLOCK))) < 0.04 < before


def test_a_shift_of_the_odds_is_brought_back_too() -> None:
    offline = fitted(KEY)
    online = OnlineCalibration(Calibration({KEY: offline}))
    judged = draw_table(40_000, shift=0.8, seed=5)
    assert max(errors(judged, offline)) > 0.1
    feed(online, draw_records(2000, shift=0.8, seed=6))
    assert max(errors(judged, online.scaling(KEY, BLOCK))) < 0.04
    moved = online.scaling(KEY, 1).maps[0].apply(np.array([0.8]))
    assert moved == pytest.approx([0.0], abs=0.2)


def test_stationary_outcomes_do_not_make_it_wander() -> None:
    offline = fitted(KEY)
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
    online = OnlineCalibration(Calibration({KEY: straight((0.3,) * BLOCK, (0.0,) * BLOCK)}))
    record = VerificationRecord(KEY, "a", BLOCK, (1.0,) * BLOCK, BLOCK)
    feed(online, [record, record._replace(num_accepted_tokens=0)] * 600)
    for line in online.scaling(KEY, BLOCK).maps:
        assert np.isfinite(line.raw + line.calibrated).all()
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


def test_a_few_outcomes_are_no_error_yet() -> None:
    online = OnlineCalibration(Calibration(), is_fixed=True)
    feed(online, draw_records(1920, seed=27, num_admitted=1))
    wrong = VerificationRecord(KEY, "a", BLOCK, (0.99, 0.99), 1)
    feed(online, [wrong] * 128)
    assert online.error is not None
    assert online.error < 0.03


def serve(
    online: OnlineCalibration, num_rounds: int, *, shift: float, threshold: float, seed: int
) -> float:
    """Admits what is expected to survive with more than ``threshold``, as a planner does.

    Args:
        shift: of the log-odds of acceptance, against what the drafter says.

    Returns:
        Admitted tokens a round.
    """
    random = np.random.default_rng(seed)
    total = 0
    for _ in range(num_rounds // 64):
        logits = random.normal(1.5, 1.5, size=(64, BLOCK))
        is_right = random.random(logits.shape) < sigmoid(logits + shift)
        confidences = sigmoid(logits)
        chances = survival(online.scaling(KEY, BLOCK).apply(confidences))
        admitted = (chances > threshold).sum(axis=1)
        total += int(admitted.sum())
        for row, count in enumerate(admitted.tolist()):
            num_accepted = int(np.cumprod(is_right[row, :count]).sum())
            values = tuple(confidences[row, :count].tolist())
            online.observe(VerificationRecord(KEY, "a", BLOCK, values, num_accepted))
    return total / num_rounds


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_a_drafter_that_was_bad_for_a_while_is_found_good_again(threshold: float) -> None:
    """Also where nothing of it was worth its time meanwhile, so that nothing spoke for it."""
    online = OnlineCalibration(Calibration())
    good = serve(online, 2048, shift=0.0, threshold=threshold, seed=30)
    serve(online, 4096, shift=-4.0, threshold=threshold, seed=31)
    bad = serve(online, 4096, shift=-4.0, threshold=threshold, seed=32)
    serve(online, 2560, shift=0.0, threshold=threshold, seed=33)
    again = serve(online, 2048, shift=0.0, threshold=threshold, seed=34)
    assert bad < 0.25 * good  # of which it takes a part to see that it is still bad
    assert again > 0.85 * good


def test_rounds_without_a_proposal_age_nothing() -> None:
    online = OnlineCalibration(Calibration())
    feed(online, draw_records(2000, scale=2.0, seed=28))
    before = online.scaling(KEY, BLOCK)
    feed(online, [VerificationRecord(KEY, "a", 0, (), 0)] * 4096)
    assert online.scaling(KEY, BLOCK) == before


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
    for line in moved.maps[:4]:
        assert np.diff(line.apply(np.array([0.0, 2.0]))) == pytest.approx([1.0], abs=0.35)


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
