"""The verify curve: fitting, interpolation, and its form in files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.speculation.verify_curve import CurveOrigin, VerifyCurve

ORIGIN = CurveOrigin(
    target_digest="ab" * 32,
    tensor_parallel_size=2,
    pipeline_parallel_size=1,
    dtype="float32",
    device="cpu",
    num_threads=1,
    deterministic=False,
    execution="compiled",
    processor="a CPU",
    cores=2,
    accelerator="",
    torch="2.13.0",
    transformers="5.23.0",
    dspark="0.1",
    measured_at="2026-11-23T17:00:00+00:00",
)
TOKENS, CONTEXTS = [1, 2, 8, 32, 128], [0, 256, 4096]


def plane(tokens: Any, contexts: Any) -> Any:
    return 5.0 + 0.25 * np.asarray(tokens) + 0.001 * np.asarray(contexts)


def make_curve() -> VerifyCurve:
    table = plane(np.array(TOKENS)[:, None], np.array(CONTEXTS))
    return VerifyCurve.fit(TOKENS, CONTEXTS, table, ORIGIN)


def table_of(curve: VerifyCurve, tokens: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """``[tokens, contexts]`` seconds."""
    return np.stack([curve.seconds(tokens, float(size)) for size in contexts], axis=1)


def test_a_plane_is_interpolated_and_extended_exactly() -> None:
    tokens = np.array([1, 3, 8, 20, 100, 128, 500])
    contexts = np.array([0, 100, 256, 3000, 4096, 20_000])
    found = table_of(make_curve(), tokens, contexts)
    np.testing.assert_allclose(found, plane(tokens[:, None], contexts))
    assert float(make_curve().seconds(4)) == plane(4, 0)


def test_between_points_it_is_bilinear() -> None:
    curve = VerifyCurve.fit([1, 3], [0, 10], [[1.0, 2.0], [3.0, 10.0]])
    assert float(curve.seconds(2, 5)) == (1 + 2 + 3 + 10) / 4
    assert float(curve.seconds(2.5, 10)) == 2 + 0.75 * 8


tables = st.integers(1, 5).flatmap(
    lambda rows: st.integers(1, 4).flatmap(
        lambda columns: st.lists(
            st.lists(st.floats(1e-4, 1e2), min_size=columns, max_size=columns),
            min_size=rows,
            max_size=rows,
        )
    )
)


@given(tables, st.randoms())
def test_any_measurement_gives_a_monotone_curve_no_higher_than_it(
    values: list[list[float]], random: Random
) -> None:
    table = np.array(values)
    for column in range(1, table.shape[1]):
        for row in random.sample(range(len(table)), random.randrange(len(table))):
            table[row, column] = np.nan
    tokens = [2**k for k in range(len(table))]
    contexts = [100 * k for k in range(len(table[0]))]
    curve = VerifyCurve.fit(tokens, contexts, table)
    assert np.all((curve.table <= table) | np.isnan(table))
    values = table_of(curve, np.linspace(1, 40, 50), np.linspace(0, 600, 50))
    assert np.all(np.diff(values, axis=0) >= -1e-9 * values.max())
    assert np.all(np.diff(values, axis=1) >= -1e-9 * values.max())


@given(tables, st.integers(0, 60), st.integers(0, 900))
def test_a_size_alone_costs_what_it_does_among_others(
    values: list[list[float]], tokens: int, context: int
) -> None:
    sizes, contexts = [2**k for k in range(len(values))], [100 * k for k in range(len(values[0]))]
    curve = VerifyCurve.fit(sizes, contexts, values)
    assert curve.seconds(tokens, context) == pytest.approx(curve.seconds([tokens], context)[0])


def test_one_disturbed_measurement_moves_no_other_point() -> None:
    table = plane(np.array(TOKENS)[:, None], np.array(CONTEXTS))
    table[1, 0] *= 50
    fitted = VerifyCurve.fit(TOKENS, CONTEXTS, table).table
    undisturbed = np.ones_like(table, dtype=bool)
    undisturbed[1, 0] = False
    np.testing.assert_array_equal(fitted[undisturbed], make_curve().table[undisturbed])
    assert fitted[1, 0] == min(table[2, 0], table[1, 1])


def test_what_was_not_measured_adds_what_its_neighbour_adds() -> None:
    nan = float("nan")
    curve = VerifyCurve.fit(
        [1, 2, 4, 8], [0, 100], [[1.0, nan], [2.0, nan], [3.0, 3.5], [9.0, nan]]
    )
    assert curve.table[:, 1].tolist() == [1.5, 2.5, 3.5, 9.5]


@pytest.mark.parametrize(
    "table", [[[float("nan"), 1.0]], [[1.0, float("nan")]], [], [[]], [[1.0, 2.0, 3.0]]]
)
def test_too_few_measurements_are_refused(table: list[list[float]]) -> None:
    with pytest.raises(ConfigError, match="seconds"):
        VerifyCurve.fit([1], [0, 100], table)


def test_correction_moves_what_is_near_and_keeps_order() -> None:
    curve = make_curve()
    raised = curve.corrected(8, 256, 1.5).table
    assert raised[2, 1] == 1.5 * curve.table[2, 1]
    assert np.all(raised >= curve.table)
    np.testing.assert_array_equal(raised[:2], curve.table[:2])
    lowered = curve.corrected(8, 256, 0.2).table
    assert lowered[2, 1] == 0.2 * curve.table[2, 1]
    assert np.all(lowered <= curve.table)
    np.testing.assert_array_equal(lowered[3:], curve.table[3:])


# ------------------------------------------------------------------------------ files


def test_json_round_trip_is_exact() -> None:
    curve = make_curve()
    again = VerifyCurve.from_dict(json.loads(json.dumps(curve.to_dict())))
    np.testing.assert_array_equal(again.table, curve.table)
    np.testing.assert_array_equal(again.tokens, curve.tokens)
    np.testing.assert_array_equal(again.context_tokens, curve.context_tokens)
    assert again.origin == ORIGIN
    assert VerifyCurve.from_dict(VerifyCurve.of_tokens({1: 2.0}).to_dict()).origin is None


def change(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: {**values, **changes}


def change_origin(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda values: {**values, "origin": {**values["origin"], **changes}}


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda values: {k: v for k, v in values.items() if k != key}


@pytest.mark.parametrize(
    ("break_it", "key"),
    [
        (lambda values: [values], "verify curve"),
        (change(format="something else"), "format"),
        (change(version=2), "version"),
        (without("tokens"), "tokens"),
        (without("seconds"), "seconds"),
        (change(tokens="1, 2, 8, 32, 128"), "tokens"),
        (change(tokens=[1, 8, 2, 32, 128]), "tokens"),
        (change(tokens=[0, 2, 8, 32, 128]), "tokens"),
        (change(tokens=[]), "tokens"),
        (change(context_tokens=[0, 256, None]), "context_tokens"),
        (change(context_tokens=[[0, 256, 4096]]), "context_tokens"),
        (change(seconds=[[1.0, 2.0, 3.0]] * 4), "seconds"),
        (change(seconds=[[1.0, 2.0, 3.0]] * 4 + [[1.0]]), "seconds"),
        (change(seconds=[[1.0, 3.0, 2.0]] * 5), "seconds"),
        (change(seconds=[[1.0, 2.0, float("nan")]] * 5), "seconds"),
        (change(seconds=[[0.0, 2.0, 3.0]] * 5), "seconds"),
        (change(seconds=[["a", "b", "c"]] * 5), "seconds"),
        (change(origin=3), "origin"),
        (change_origin(cores="two"), "origin.cores"),
        (change_origin(deterministic=1), "origin.deterministic"),
        (change_origin(weather="fine"), "origin.weather"),
        (change(origin={"cores": 2}), "origin.target_digest"),
    ],
)
def test_bad_files_are_refused_by_key(break_it: Callable[[Any], Any], key: str) -> None:
    values = break_it(json.loads(json.dumps(make_curve().to_dict())))
    with pytest.raises(ConfigError) as caught:
        VerifyCurve.from_dict(values)
    assert caught.value.key == key


def test_identity_is_all_but_versions_and_time() -> None:
    later = dataclasses.replace(ORIGIN, measured_at="later", torch="3.0", dspark="2")
    assert later.identity == ORIGIN.identity
    for changes in ({"num_threads": 2}, {"tensor_parallel_size": 1}, {"processor": "another"}):
        assert dataclasses.replace(ORIGIN, **changes).identity != ORIGIN.identity


def test_a_time_that_no_pass_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 86400"):
        VerifyCurve.of_tokens({1: 1.0, 2: 1e300})
