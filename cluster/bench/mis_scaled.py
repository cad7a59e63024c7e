"""What online calibration makes of a confidence head that is wrong on purpose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from cluster.speculation.calibration import Calibration, LogitScaling, logit, sigmoid, survival
from cluster.speculation.online_calibration import OnlineCalibration
from cluster.speculation.record import CalibrationKey, VerificationRecord
from cluster.speculation.reliability import RoundTable, calibration_error

LEARNT_ROUNDS = 2000
_FACTOR = 2.0
_LEAST_JUDGED = 1000  # the noise of fewer is as large as what is looked for


def mis_scaled_figures(
    table: RoundTable, key: CalibrationKey, scaling: LogitScaling
) -> dict[str, Any] | None:
    """Doubles every logit, lets online calibration see the first 2,000 rounds, and judges it on
    the rounds of requests that it saw nothing of.

    Args:
        table: rounds in the order in which they were verified.
        key: how they were verified.
        scaling: the offline fit, for logits as they are.

    Returns:
        Calibration errors by position before and after, and the rounds that they are of; ``None``
        where there are too few.
    """
    seen = np.unique(table.request_index[:LEARNT_ROUNDS])
    judged = ~np.isin(table.request_index, seen)
    if judged.sum() < _LEAST_JUDGED:
        return None
    confidences = sigmoid(_FACTOR * logit(table.confidences))
    online = OnlineCalibration(Calibration({key: scaling}))
    for record in _records(table, confidences, key, range(LEARNT_ROUNDS)):
        online.observe(record)
    learnt = online.scaling(key, table.num_positions)
    return {
        "learnt_rounds": LEARNT_ROUNDS,
        "judged_rounds": int(judged.sum()),
        "before": _errors(table, confidences, judged, scaling),
        "after": _errors(table, confidences, judged, learnt),
    }


def _records(
    table: RoundTable, confidences: np.ndarray, key: CalibrationKey, rows: Iterable[int]
) -> Iterable[VerificationRecord]:
    for row in rows:
        size = int(table.num_drafted[row])
        exact = () if table.acceptance is None else table.acceptance[row, :size].tolist()
        yield VerificationRecord(
            key=key,
            request_id=table.request_ids[table.request_index[row]],
            block_size=size,
            confidences=tuple(confidences[row, :size].tolist()),
            num_accepted_tokens=int(table.num_accepted[row]),
            acceptance=tuple(exact),
        )


def _errors(
    table: RoundTable, confidences: np.ndarray, judged: np.ndarray, scaling: LogitScaling
) -> list[float | None]:
    chances, errors = survival(scaling.apply(confidences)), []
    for k in range(table.num_positions):
        rows = judged & table.is_drafted[:, k]
        outcomes = table.is_accepted[rows, k].astype(np.float64)
        errors.append(
            round(calibration_error(chances[rows, k], outcomes), 4) if rows.any() else None
        )
    return errors
