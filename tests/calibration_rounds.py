"""Rounds whose confidences are wrong by a known scale and shift, and the error of a scaling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.speculation.calibration import LogitMap, LogitScaling, survival
from cluster.speculation.record import COUPLED, REJECTION, CalibrationKey, VerificationRecord
from cluster.speculation.reliability import RoundTable, calibration_error

BLOCK = 7
KEY = CalibrationKey(COUPLED, "high")
EXACT_KEY = CalibrationKey(REJECTION, "high")
RAW = LogitScaling.identity(BLOCK)


def straight(temperatures: Sequence[float], biases: Sequence[float]) -> LogitScaling:
    """A temperature and a bias for each position."""
    return LogitScaling(tuple(map(LogitMap.straight, temperatures, biases)))


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


def errors(table: RoundTable, scaling: LogitScaling) -> list[float]:
    """Calibration error of the survival by position, under ``scaling``."""
    chances = survival(scaling.apply(table.confidences))
    return [
        calibration_error(chances[:, k], table.is_accepted[:, k] * 1.0)
        for k in range(table.num_positions)
    ]
