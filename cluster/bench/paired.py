"""Two sides measured in turn: medians, their ratio, and an interval of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_NUM_RESAMPLES = 10_000
_DIGITS = 4


def paired_ratio(ours: Sequence[float], peers: Sequence[float]) -> dict[str, Any]:
    """Figures of paired runs.

    Args:
        ours, peers: the same quantity, one value a run, positive; run i of both sides was measured
            back to back, so what slows the machine for a while hits both.

    Returns:
        ``ours`` and ``peer``: medians; ``ratio``: the median over runs of ours / peer, with
        ``ratio_low`` and ``ratio_high``: its 95% bootstrap interval over runs.

    Raises:
        ValueError: no run, or not as many on both sides.
    """
    if len(ours) != len(peers) or not ours:
        raise ValueError(f"{len(ours)} and {len(peers)} runs cannot be paired")
    ratios = np.asarray(ours, dtype=np.float64) / np.asarray(peers, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(ratios), (_NUM_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), (0.025, 0.975))
    return {
        "ours": round(float(np.median(ours)), _DIGITS),
        "peer": round(float(np.median(peers)), _DIGITS),
        "ratio": round(float(np.median(ratios)), _DIGITS),
        "ratio_low": round(float(low), _DIGITS),
        "ratio_high": round(float(high), _DIGITS),
        "runs": len(ratios),
    }
