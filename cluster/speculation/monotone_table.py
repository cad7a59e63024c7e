"""Tables of measured times over two sizes, which never fall with more of either.

What curves of the target (``VerifyCurve``) and of drafters (``DraftCurve``) have in common: rows
and columns are rising sizes, entries are seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import ConfigError

Floats = npt.NDArray[np.float64]


def check_axis(name: str, axis: Floats, lowest: float) -> None:
    """Raises: ConfigError: ``axis`` is no rising list of finite sizes from ``lowest`` on."""
    if axis.ndim != 1 or len(axis) == 0 or not np.all(np.isfinite(axis)):
        raise ConfigError(name, "must be a list of at least one finite number")
    if axis[0] < lowest or np.any(np.diff(axis) <= 0):
        raise ConfigError(name, f"must rise from at least {lowest:g}")


def check_table(table: Floats, rows: Floats, columns: Floats, sizes: str) -> None:
    """Raises: ConfigError: ``table`` does not fit its axes, or falls. ``sizes`` names the axes."""
    shape = (len(rows), len(columns))
    if table.shape != shape:
        raise ConfigError("seconds", f"must have {shape[0]} rows of {shape[1]} numbers")
    if not np.all(np.isfinite(table)) or table[0, 0] <= 0:
        raise ConfigError("seconds", "must be positive and finite")
    if any(np.any(np.diff(table, axis=axis) < 0) for axis in (0, 1)):
        raise ConfigError("seconds", f"must not fall with more {sizes}")


def read_numbers(key: str, values: Any) -> Floats:
    """An array of a JSON list. Raises: ConfigError: it holds other things, or is ragged."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise ConfigError(key, "rows must be of equal length") from None
    if array.dtype.kind not in "iuf":
        raise ConfigError(key, "must hold numbers only")
    return array.astype(np.float64)


def lifted(table: Floats) -> Floats:
    """The least monotone table that is nowhere below ``table``."""
    return np.maximum.accumulate(np.maximum.accumulate(table, axis=0), axis=1)


def pulled_down(table: Floats) -> Floats:
    """The greatest monotone table that is nowhere above ``table``."""
    return np.minimum.accumulate(np.minimum.accumulate(table[::-1, ::-1], axis=0), axis=1)[
        ::-1, ::-1
    ]


def interpolate(
    table: Floats, rows: Floats, columns: Floats, at_rows: npt.ArrayLike, at_column: float
) -> Floats:
    """Values at ``at_rows`` (any shape) and one column.

    Bilinear between points, flat below the first ones; beyond the last ones it goes on with the
    last segments' slope (the mean over the other axis, so that it stays monotone).
    """
    left, right, share = place(columns, at_column)
    beyond = 0.0
    if at_column > columns[-1] and len(columns) > 1:
        beyond = _last_slope(columns, table.T) * (at_column - float(columns[-1]))
    one: object = at_rows
    if isinstance(one, (int, float)) and one <= rows[-1]:
        # One place within the rows, which is asked for all the time: without arrays.
        row, next_row, row_share = place(rows, one)
        low = _between(float(table[row, left]), float(table[row, right]), share)
        high = _between(float(table[next_row, left]), float(table[next_row, right]), share)
        return np.asarray(_between(low, high, row_share) + beyond)
    wanted = np.asarray(at_rows, dtype=np.float64)
    start, end = table[:, left], table[:, right]
    values = np.interp(wanted, rows, start + share * (end - start))
    if wanted.size and wanted.max() > rows[-1]:
        values = values + _last_slope(rows, table) * np.maximum(wanted - rows[-1], 0.0)
    return np.asarray(values + beyond)


def place(axis: Floats, value: float) -> tuple[int, int, float]:
    """The points of an axis around a value, and the share of the way between them; ends hold."""
    right = int(axis.searchsorted(value))
    if right == 0:
        return 0, 0, 0.0
    if right == len(axis):
        return right - 1, right - 1, 0.0
    start = float(axis[right - 1])
    return right - 1, right, (value - start) / (float(axis[right]) - start)


def _between(start: float, end: float, share: float) -> float:
    return start + share * (end - start)


def _last_slope(axis: Floats, table: Floats) -> float:
    """Seconds a unit of ``axis`` (rows of ``table``) on its last segment, mean of the columns."""
    if len(axis) == 1:
        return 0.0
    return float((table[-1] - table[-2]).mean() / (axis[-1] - axis[-2]))
