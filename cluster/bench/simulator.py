"""Suite ``simulator``: what a fleet was predicted to do, against what was measured.

The prediction is made from profiles and statistics of acceptance alone (``dspark simulate``), the
measurement is a run of ``dspark bench frontier`` on parts that are paced by the same profiles.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.bench.report import Report
from cluster.bench.simulate import ADAPTIVE, PLAIN, Workload, simulate
from cluster.errors import DataError
from cluster.simulation.fleet import Fleet
from cluster.simulation.simulation import Detail

_BAR = 0.10
_DAY_BAR_S = 300.0
_DIGITS = 4

Rows = list[dict[str, Any]]


def compare(predicted: Rows, measured: Rows, trace: dict[str, Any] | None = None) -> Report:
    """Puts every measured point beside its prediction.

    It passes where all of them lie within 10%, and the trace, if there is one, took under 300 s of
    processor time.

    Args:
        predicted, measured: rows as ``frontier`` has them.
        trace: figures of ``time_trace``.

    Raises:
        DataError: a measured point was not predicted, or nothing was measured.
    """
    points = [
        point for row in measured for point in _points(row, _row_of(predicted, row["concurrency"]))
    ]
    if not points:
        raise DataError("measured", None, "has no row")
    worst = max(points, key=lambda point: abs(point["ratio"] - 1))
    error = round(abs(worst["ratio"] - 1), _DIGITS)
    seconds = None if trace is None else trace["trace_seconds"]
    figures = {
        "worst_error": error,
        "worst_point": f"{worst['way']} at {worst['concurrency']}",
        "within_10_percent": sum(abs(point["ratio"] - 1) <= _BAR for point in points),
        "points": len(points),
        "trace_seconds": seconds,
        **{f"trace_{name}": value for name, value in (trace or {}).items() if name == "requests"},
        "rows": points,
    }
    return Report(
        suite="simulator",
        figures=figures,
        passed=error <= _BAR and (seconds is None or seconds < _DAY_BAR_S),
    )


def time_trace(fleet: Fleet, workload: Workload, detail: Detail) -> dict[str, Any]:
    """Simulates a workload; returns the processor's seconds for all of it, and its requests."""
    start = time.process_time()
    found = simulate(fleet, workload, detail)
    return {
        "trace_seconds": round(time.process_time() - start, 1),
        "requests": found["requests"],
        "throughput": found["throughput"],
    }


def read_rows(path: Path) -> Rows:
    """The rows of a report of ``dspark bench frontier`` or ``dspark simulate``, written by --json.

    Raises:
        DataError: it cannot be read or is none.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["figures"]["rows"]
        for row in rows:
            float(row["concurrency"] + row[ADAPTIVE] + sum(row["fixed"].values()))
    except OSError as error:
        raise DataError(str(path), None, f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(str(path), None, "has no rows of a frontier") from None
    return list(rows)


def note_points(rows: Rows, note: Callable[[str], None]) -> None:
    """A line for each concurrency."""
    for concurrency in dict.fromkeys(row["concurrency"] for row in rows):
        ratios = [
            f"{row['way']} {row['ratio']:.3f}" for row in rows if row["concurrency"] == concurrency
        ]
        note(f"{concurrency} requests, predicted over measured: {', '.join(ratios)}")


def _row_of(rows: Rows, concurrency: int) -> dict[str, Any]:
    for row in rows:
        if row["concurrency"] == concurrency:
            return row
    raise DataError("predicted", None, f"has no row for {concurrency} requests")


def _points(measured: dict[str, Any], predicted: dict[str, Any]) -> Rows:
    ways = {ADAPTIVE: measured[ADAPTIVE]} | measured["fixed"]
    known = {ADAPTIVE: predicted[ADAPTIVE]} | predicted["fixed"]
    if missing := [way for way in ways if way not in known]:
        raise DataError("predicted", None, f"has nothing for {missing[0]} tokens in every pass")
    return [
        {
            "concurrency": measured["concurrency"],
            "way": way if way in (ADAPTIVE, PLAIN) else f"fixed {way}",
            "predicted": round(known[way], 2),
            "measured": round(value, 2),
            "ratio": round(known[way] / value, _DIGITS) if value > 0 else float("inf"),
        }
        for way, value in ways.items()
    ]
