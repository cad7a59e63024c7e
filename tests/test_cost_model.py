"""The cost model: what is predicted, and how it follows what is measured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.speculation.cost_model import CostModel
from cluster.speculation.verify_curve import VerifyCurve

TOKENS = np.array([1, 8, 64, 128])
CONTEXTS = np.array([0, 1000, 4000])


def make_curve(scale: float = 1.0) -> VerifyCurve:
    return VerifyCurve.fit(
        TOKENS.tolist(), CONTEXTS.tolist(), scale * true_seconds(TOKENS[:, None], CONTEXTS)
    )


def true_seconds(tokens: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    return 0.004 + 2e-4 * tokens + 2e-6 * contexts


def predict(model: CostModel, tokens: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """``[tokens, contexts]`` seconds."""
    return np.stack([model.verify_seconds(tokens, int(size)) for size in contexts], axis=1)


def test_verify_curve_is_interpolated_and_extended() -> None:
    model = CostModel({10: 1.0, 20: 2.0, 40: 2.5})
    assert model.verify_seconds([1, 10, 15, 30, 60]).tolist() == [1.0, 1.0, 1.5, 2.25, 3.0]


def test_context_costs_what_the_curve_says() -> None:
    model = CostModel(make_curve())
    contexts = np.array([0, 500, 2500])
    np.testing.assert_allclose(
        predict(model, np.array([1, 36]), contexts), true_seconds(np.array([[1], [36]]), contexts)
    )
    cheap = model.expected_goodput(num_requests=2, survival_sum=[0, 1], num_tokens=[2, 3])
    dear = model.expected_goodput(
        num_requests=2, survival_sum=[0, 1], num_tokens=[2, 3], num_context_tokens=4000
    )
    assert np.all(dear < cheap)
    assert dear[1] / dear[0] > cheap[1] / cheap[0]


passes = st.tuples(st.integers(1, 300), st.integers(0, 9000), st.floats(1e-4, 10))


@given(st.lists(passes, max_size=30))
def test_curve_stays_monotone_and_positive(observed: list[tuple[int, int, float]]) -> None:
    model = CostModel(make_curve())
    for num_tokens, num_context_tokens, seconds in observed:
        model.observe_verify(num_tokens, seconds, num_context_tokens=num_context_tokens)
    table = predict(model, np.arange(1, 400), np.arange(0, 12_000, 500))
    assert np.all(np.diff(table, axis=0) >= -1e-12)
    assert np.all(np.diff(table, axis=1) >= -1e-12)
    assert np.all(table > 0)


def test_curve_converges_to_what_is_measured() -> None:
    model = CostModel({1: 0.1, 64: 0.2, 128: 0.4})
    for _ in range(600):
        for num_tokens in (1, 40, 64, 128, 256):
            model.observe_verify(num_tokens, 0.01 * num_tokens)
    measured = model.verify_seconds([40, 64, 128, 256])
    np.testing.assert_allclose(measured, [0.4, 0.64, 1.28, 2.56], rtol=0.1)


def test_a_slower_machine_slows_every_size_and_recovers() -> None:
    """A noisy neighbour is seen at one size, and it concerns all."""
    model = CostModel(make_curve())
    expected = true_seconds(TOKENS[:, None], CONTEXTS)
    slowed = 3 * true_seconds(np.array(8), np.array(1000))
    for _ in range(60):
        model.observe_verify(8, float(slowed), num_context_tokens=1000)
    ratio = predict(model, TOKENS, CONTEXTS) / expected
    np.testing.assert_allclose(ratio, 3.0, rtol=0.15)
    for _ in range(60):
        model.observe_verify(8, float(slowed) / 3, num_context_tokens=1000)
    ratio = predict(model, TOKENS, CONTEXTS) / expected
    np.testing.assert_allclose(ratio, 1.0, rtol=0.15)


def test_what_stays_at_one_size_is_learnt_there() -> None:
    """A size that was measured wrong is put right, although the others are as predicted."""
    wrong = true_seconds(TOKENS[:, None], CONTEXTS)
    wrong[2] *= 0.5
    model = CostModel(VerifyCurve.fit(TOKENS.tolist(), CONTEXTS.tolist(), wrong))
    generator = np.random.default_rng(0)
    for _ in range(4000):
        tokens, context = generator.choice(TOKENS), generator.choice(CONTEXTS)
        seconds = float(true_seconds(tokens, context)) * generator.uniform(0.95, 1.05)
        model.observe_verify(int(tokens), seconds, num_context_tokens=int(context))
    ratio = predict(model, TOKENS, CONTEXTS) / true_seconds(TOKENS[:, None], CONTEXTS)
    np.testing.assert_allclose(ratio, 1.0, atol=0.12)


@pytest.mark.parametrize("seconds", [1e-9, 1e3, 0.0, -1.0, float("nan"), float("inf")])
def test_one_strange_step_changes_little(seconds: float) -> None:
    model = CostModel(make_curve())
    before = predict(model, TOKENS, CONTEXTS)
    model.observe_verify(30, seconds, num_context_tokens=700)
    ratio = predict(model, TOKENS, CONTEXTS) / before
    assert np.all((ratio < 2**0.111) & (ratio > 2**-0.111))


def test_a_new_curve_keeps_what_is_known_of_the_machine() -> None:
    model = CostModel(make_curve(scale=5.0), draft_seconds=0.001)
    for _ in range(60):
        seconds = 2 * 5 * float(true_seconds(np.array(8), np.array(0)))
        model.observe_verify(8, seconds)
    model.replace_curve(make_curve())
    ratio = model.verify_seconds(TOKENS, 0) / true_seconds(TOKENS, np.array(0))
    np.testing.assert_allclose(ratio, 2.0, rtol=0.15)
    assert model.draft_seconds == 0.001


def test_draft_time_lowers_goodput() -> None:
    model = CostModel({1: 1.0}, draft_seconds=1.0, smoothing=0.5)
    goodput = model.expected_goodput(num_requests=2, survival_sum=[0, 2], num_tokens=[2, 6])
    assert goodput.tolist() == [1.0, 2.0]
    model.num_groups = 2  # a pass of 1 s and a round of 1 s, but for two groups in turn
    goodput = model.expected_goodput(num_requests=2, survival_sum=[0, 2], num_tokens=[2, 6])
    assert goodput.tolist() == [2.0, 4.0]
    model.draft_seconds = 3.0
    goodput = model.expected_goodput(num_requests=2, survival_sum=[0, 2], num_tokens=[2, 6])
    assert goodput.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "curve", [{}, {0: 1.0}, {1: 0.0}, {1: float("inf")}, {1: float("nan")}, {1: -1.0, 2: 1.0}]
)
def test_impossible_curves_are_refused(curve: dict[int, float]) -> None:
    with pytest.raises(ConfigError, match=r"tokens|seconds"):
        CostModel(curve)


@pytest.mark.parametrize("options", [{"draft_seconds": -1.0}, {"smoothing": 0.0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        CostModel({1: 1.0}, **options)


def test_host_work_is_learnt_and_no_hiccup_is() -> None:
    model = CostModel({1: 0.01})
    bare = float(model.pass_seconds(1, 0, draft_seconds=0.005, num_groups=1))
    for _ in range(100):
        model.observe_host(0.002, bare)
    assert model.host_seconds == pytest.approx(0.002, rel=1e-3)
    one, two = (
        float(model.pass_seconds(1, 0, draft_seconds=0.005, num_groups=groups)) for groups in (1, 2)
    )
    assert one == pytest.approx(bare + model.host_seconds)
    assert two == pytest.approx(0.01 + model.host_seconds)
    assert float(model.verify_seconds(1)) == pytest.approx(0.01)
    model.observe_host(10.0, bare)  # ten seconds of something else
    assert model.host_seconds < 0.002 + 0.11 * bare
    for _ in range(100):
        model.observe_host(-0.004, bare)
    assert model.host_seconds == 0.0
