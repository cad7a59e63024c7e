"""What a drafter's pass costs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.speculation.draft_curve import DraftCurve


def test_between_points_it_is_linear_and_beyond_it_goes_on() -> None:
    curve = DraftCurve.fit([1, 5], [1, 3], [[1.0, 3.0], [5.0, 7.0]])
    assert curve.seconds(3, 2) == pytest.approx(4.0)
    assert curve.seconds(9, 3) == pytest.approx(11.0)
    assert curve.seconds(1, 5) == pytest.approx(5.0)
    assert curve.seconds(5) == pytest.approx(7.0)


def test_what_a_larger_pass_took_bounds_a_smaller_one() -> None:
    curve = DraftCurve.of_sessions({1: 9.0, 4: 2.0, 8: 3.0})
    assert [curve.seconds(n) for n in (1, 4, 8)] == [2.0, 2.0, 3.0]


@given(
    table=st.lists(st.lists(st.floats(1e-4, 10), min_size=2, max_size=2), min_size=3, max_size=3),
    sizes=st.tuples(st.floats(1, 40), st.floats(1, 40)),
    tokens=st.tuples(st.floats(1, 12), st.floats(1, 12)),
)
def test_it_never_falls(
    table: list[list[float]], sizes: tuple[float, float], tokens: tuple[float, float]
) -> None:
    curve = DraftCurve.fit([1, 4, 16], [1, 7], table)
    small = curve.seconds(min(sizes), min(tokens))
    assert 0 < small <= curve.seconds(max(sizes), max(tokens)) * (1 + 1e-12)


def test_it_survives_json() -> None:
    curve = DraftCurve.fit([1, 8], [1, 7], [[0.001, 0.002], [0.003, 0.004]])
    again = DraftCurve.from_dict(json.loads(json.dumps(curve.to_dict())))
    assert DraftCurve.from_dict({"sessions": [1, 2], "seconds": [1, 3]}).seconds(1.5) == 2.0
    assert np.array_equal(again.table, curve.table)
    assert curve.scaled(2.0).seconds(8, 7) == pytest.approx(0.008)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"sessions": [2, 1]}, "sessions"),
        ({"tokens": [0]}, "tokens"),
        ({"seconds": [[1.0], ["a"]]}, "seconds"),
        ({"seconds": [[2.0], [1.0]]}, "seconds"),
        ({"seconds": [[1.0]]}, "seconds"),
        ({"seconds": [[float("nan")], [1.0]]}, "seconds"),
    ],
)
def test_what_is_no_curve_is_refused_by_key(change: dict[str, object], key: str) -> None:
    values = DraftCurve.of_sessions({1: 1.0, 2: 2.0}).to_dict()
    with pytest.raises(ConfigError) as caught:
        DraftCurve.from_dict({**values, **change})
    assert caught.value.key == key
