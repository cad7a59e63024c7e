"""One value at a time and many at once are the same values."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.speculation.monotone_table import Lookup, interpolate, lifted

_AXES = st.lists(st.integers(0, 64), min_size=1, max_size=5, unique=True).map(sorted)
_PLACES = st.floats(0, 200)


@given(_AXES, _AXES, st.data())
def test_a_lookup_is_an_interpolation(rows: list[int], columns: list[int], data) -> None:
    seconds = st.floats(1e-4, 1.0)
    shape = [st.lists(seconds, min_size=len(columns), max_size=len(columns))] * len(rows)
    table = lifted(np.array(data.draw(st.tuples(*shape)), dtype=np.float64))
    axes = np.array(rows, dtype=np.float64), np.array(columns, dtype=np.float64)
    at_rows, column = data.draw(st.lists(_PLACES, min_size=1, max_size=8)), data.draw(_PLACES)
    lookup = Lookup(table, *axes)
    many = interpolate(table, *axes, at_rows, column)
    for row, value in zip(at_rows, many.tolist(), strict=True):
        assert math.isclose(lookup.at(row, column), value, rel_tol=1e-9)
        assert value >= table.min() * (1 - 1e-9)
