"""Tables of measured times over two sizes, which never fall with more of either.

What curves of the target (``VerifyCurve``) and of drafters (``DraftCurve``) have in common: rows
and columns are rising sizes, entries are seconds.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import ConfigError

Floats = npt.NDArray[np.float64]
Sizes = npt.NDArray[Any] | Sequence[float]  # of any shape


# Of one pass. What comes from elsewhere could overflow what is made of it otherwise.
_LONGEST_S = 86400.0


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
    if not np.all(np.isfinite(table)) or table[0, 0] <= 0 or table.max() > _LONGEST_S:
        raise ConfigError("seconds", f"must be positive and at most {_LONGEST_S:g}")
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


class Lookup:
    """A table's values at one place at a time, which are asked for all the time: without arrays.

    Bilinear between points, flat below the first ones; beyond the last ones it goes on with the
    last segments' slope (the mean over the other axis, so that it stays monotone).
    """

    def __init__(self, table: Floats, rows: Floats, columns: Floats) -> None:
        self._table: list[list[float]] = table.tolist()
        self._rows: list[float] = rows.tolist()
        self._columns: list[float] = columns.tolist()
        self._arrays = table, rows, columns

    def at(self, row: float, column: float) -> float:
        """The value there."""
        left, right, share = place(self._columns, column)
        above, below, row_share = place(self._rows, row)
        upper, lower = self._table[above], self._table[below]
        start = upper[left] + share * (upper[right] - upper[left])
        end = lower[left] + share * (lower[right] - lower[left])
        value = start + row_share * (end - start)
        if row > self._rows[-1]:
            value += self._slopes[0] * (row - self._rows[-1])
        if column > self._columns[-1]:
            value += self._slopes[1] * (column - self._columns[-1])
        return value

    @functools.cached_property
    def _slopes(self) -> tuple[float, float]:
        """Beyond the last row, and beyond the last column."""
        table, rows, columns = self._arrays
        return _last_slope(rows, table), _last_slope(columns, table.T)


def interpolate(
    table: Floats, rows: Floats, columns: Floats, at_rows: npt.ArrayLike, at_column: float
) -> Floats:
    """As ``Lookup.at``, at ``at_rows`` (any shape) and one column."""
    left, right, share = place(columns, at_column)
    beyond = 0.0
    if at_column > columns[-1]:
        beyond = _last_slope(columns, table.T) * (at_column - float(columns[-1]))
    wanted = np.asarray(at_rows, dtype=np.float64)
    start, end = table[:, left], table[:, right]
    values = np.interp(wanted, rows, start + share * (end - start))
    if wanted.size and wanted.max() > rows[-1]:
        values = values + _last_slope(rows, table) * np.maximum(wanted - rows[-1], 0.0)
    return np.asarray(values + beyond)


def place(axis: Sequence[float] | Floats, value: float) -> tuple[int, int, float]:
    """The points of an axis around a value, and the share of the way between them; ends hold."""
    right = bisect_left(axis, value)
    if 0 < right < len(axis):
        start = axis[right - 1]
        return right - 1, right, (value - start) / (axis[right] - start)
    end = min(right, len(axis) - 1)
    return end, end, 0.0


def _last_slope(axis: Floats, table: Floats) -> float:
    """Seconds a unit of ``axis`` (rows of ``table``) on its last segment, mean of the columns."""
    if len(axis) == 1:
        return 0.0
    return float((table[-1] - table[-2]).mean() / (axis[-1] - axis[-2]))
