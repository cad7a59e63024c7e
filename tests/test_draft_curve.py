"""What a drafter's round costs by the number of its sessions."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import ConfigError
from cluster.speculation.draft_curve import DraftCurve


def test_seconds_are_linear_between_points_flat_below_and_go_on_behind() -> None:
    curve = DraftCurve.of_sessions({8: 0.003, 2: 0.001, 16: 0.007})
    assert curve.seconds(1) == pytest.approx(0.001)
    assert curve.seconds(5) == pytest.approx(0.002)
    np.testing.assert_allclose(curve.seconds([16, 24]), [0.007, 0.011])


def test_a_single_point_is_a_constant() -> None:
    np.testing.assert_allclose(DraftCurve.of_sessions({1: 0.004}).seconds([1, 64]), 0.004)


def test_a_curve_survives_its_dictionary() -> None:
    curve = DraftCurve.of_sessions({1: 0.001, 8: 0.002})
    again = DraftCurve.from_dict(curve.to_dict())
    np.testing.assert_array_equal(again.sessions, curve.sessions)
    np.testing.assert_array_equal(again.table, curve.table)
    assert curve.scaled(3.0).seconds(8) == pytest.approx(0.006)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ([], "draft curve"),
        ({"seconds": [1.0]}, "sessions"),
        ({"sessions": [1], "seconds": ["fast"]}, "seconds"),
        ({"sessions": [0], "seconds": [1.0]}, "sessions"),
        ({"sessions": [2, 1], "seconds": [1.0, 2.0]}, "sessions"),
        ({"sessions": [1, 2], "seconds": [1.0]}, "seconds"),
        ({"sessions": [1, 2], "seconds": [2.0, 1.0]}, "seconds"),
        ({"sessions": [1], "seconds": [0.0]}, "seconds"),
        ({"sessions": [], "seconds": []}, "sessions"),
    ],
)
def test_a_broken_curve_is_refused_by_its_key(values: object, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        DraftCurve.from_dict(values)
    assert error.value.key == key
