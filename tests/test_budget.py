"""Budgets: the planners' choices, their legality, and the cost model under them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.speculation.budget import BudgetPlanner, FixedBudget, GreedyBudget, SearchBudget
from cluster.speculation.cost_model import CostModel
from cluster.speculation.verify_curve import VerifyCurve

FLAT = CostModel({1: 0.01})
LINEAR = CostModel({1: 4.0, 101: 104.0})  # 3 + tokens seconds


def plan(
    planner: BudgetPlanner,
    confidences: list[list[float]],
    cost_model: CostModel,
    *,
    num_prefill_tokens: int = 0,
    num_context_tokens: int = 0,
) -> list[int]:
    num_columns = max(len(row) for row in confidences)
    padded = [row + [float("nan")] * (num_columns - len(row)) for row in confidences]
    return planner.plan(
        np.array(padded, dtype=np.float64).reshape(len(confidences), num_columns),
        np.array([len(row) for row in confidences]),
        cost_model=cost_model,
        num_requests=len(confidences),
        num_base_tokens=len(confidences) + num_prefill_tokens,
        num_context_tokens=num_context_tokens,
    ).tolist()


def naive_greedy(confidences: list[list[float]], cost_model: CostModel) -> list[int]:
    """Algorithm 1 as one would write it down, one candidate at a time."""
    candidates = []
    for row, values in enumerate(confidences):
        for k in range(len(values)):
            candidates.append((-float(np.prod(values[: k + 1])), k, row))
    lengths = [0] * len(confidences)
    tokens = expected = float(len(confidences))
    best = expected / (cost_model.draft_seconds + float(cost_model.verify_seconds(tokens)))
    for negative_survival, k, row in sorted(candidates):
        tokens, expected = tokens + 1, expected - negative_survival
        goodput = expected / (cost_model.draft_seconds + float(cost_model.verify_seconds(tokens)))
        if goodput < best:
            break
        best, lengths[row] = goodput, k + 1
    return lengths


confidence = st.sampled_from([0.0, 0.125, 0.5, 0.75, 0.875, 1.0])
batches = st.lists(st.lists(confidence, max_size=4), min_size=1, max_size=5)
curves = st.lists(st.sampled_from([0.0, 0.25, 1.0, 4.0]), min_size=3, max_size=12).map(
    lambda rises: CostModel({n + 1: 1 + sum(rises[:n]) for n in range(len(rises))})
)


@settings(deadline=None)
@given(batches, curves)
def test_greedy_is_algorithm_1(confidences: list[list[float]], cost_model: CostModel) -> None:
    assert plan(GreedyBudget(), confidences, cost_model) == naive_greedy(confidences, cost_model)


@settings(deadline=None)
@given(batches, curves, st.data())
def test_later_confidences_of_a_request_never_change_earlier_admission(
    confidences: list[list[float]], cost_model: CostModel, data: st.DataObject
) -> None:
    """Rule 3: with c_1 ... c_k fixed, what comes behind cannot decide about token k."""
    row = data.draw(st.integers(0, len(confidences) - 1))
    k = data.draw(st.integers(0, len(confidences[row])))
    tail = data.draw(
        st.lists(confidence, min_size=len(confidences[row]) - k, max_size=len(confidences[row]) - k)
    )
    other = [*confidences[:row], confidences[row][:k] + tail, *confidences[row + 1 :]]
    search, other_search = SearchBudget(), SearchBudget()
    plan(search, confidences, cost_model)
    plan(other_search, confidences, cost_model)  # the same past
    for planner, other_planner in ((GreedyBudget(), GreedyBudget()), (search, other_search)):
        before = plan(planner, confidences, cost_model)[row]
        after = plan(other_planner, other, cost_model)[row]
        assert min(before, k) == min(after, k)


@pytest.mark.parametrize("make", [GreedyBudget, SearchBudget, lambda: FixedBudget(4)])
def test_flat_curve_verifies_whole_blocks(make: type[BudgetPlanner]) -> None:
    planner = make()
    for _ in range(2):
        assert plan(planner, [[0.9, 0.1, 0.01], [], [0.3]], FLAT) == [3, 0, 1]


def test_fixed_budget_caps_each_request() -> None:
    assert plan(FixedBudget(2), [[0.0] * 3, [1.0]], LINEAR) == [2, 1]
    assert plan(FixedBudget(0), [[1.0] * 3], FLAT) == [0]


def test_greedy_prefers_likelier_tokens_across_requests() -> None:
    cost_model = CostModel({1: 1.0, 2: 1.0, 4: 1.0, 5: 9.0})
    assert plan(GreedyBudget(), [[0.9, 0.8], [0.5, 0.5]], cost_model) == [2, 0]


def test_ties_go_to_the_smaller_position() -> None:
    cost_model = CostModel({1: 1.0, 4: 1.0, 5: 9.0})
    assert plan(GreedyBudget(), [[0.5, 1.0], [0.5, 1.0]], cost_model) == [1, 1]


def test_prefill_in_the_batch_moves_the_budget_with_the_curve() -> None:
    knee = CostModel({1: 1.0, 50: 1.0, 150: 101.0})
    assert plan(GreedyBudget(), [[0.9, 0.9]] * 10, knee) == [2] * 10
    assert plan(GreedyBudget(), [[0.9, 0.9]] * 10, knee, num_prefill_tokens=45) == [0] * 10


@pytest.mark.parametrize("make", [GreedyBudget, SearchBudget])
def test_guesses_pay_more_at_long_contexts(make: type[BudgetPlanner]) -> None:
    """Reading the context is paid once a step: guesses beside it cost relatively less."""
    cost_model = CostModel(
        VerifyCurve.fit(
            [1, 101], [0, 1000], [[1.0, 101.0], [101.0, 201.0]]
        )  # tokens + context / 10
    )
    for context, wanted in ((0, [0, 0]), (1000, [2, 2])):
        planner = make()
        for _ in range(2):
            chosen = plan(planner, [[0.9, 0.7]] * 2, cost_model, num_context_tokens=context)
        assert chosen == wanted


def test_search_sees_past_a_step_that_stops_greedy() -> None:
    step = CostModel({1: 1.0, 2: 1.9, 5: 1.9})
    confidences = [[0.8, 0.9, 0.9, 0.9]]
    assert plan(GreedyBudget(), confidences, step) == [0]
    search = SearchBudget()
    assert plan(search, confidences, step) == [0]  # nothing is known yet: as greedy
    assert plan(search, confidences, step) == [4]


def test_search_takes_its_total_from_earlier_rounds_only() -> None:
    first, second = SearchBudget(), SearchBudget()
    for search in (first, second):
        plan(search, [[0.9, 0.9], [0.9, 0.9]], LINEAR)
    likely = plan(first, [[0.9, 0.9], [0.9, 0.9]], LINEAR)
    unlikely = plan(second, [[0.1, 0.1], [0.1, 0.2]], LINEAR)
    assert sum(likely) == sum(unlikely) > 0


def test_search_follows_a_changing_number_of_requests() -> None:
    search = SearchBudget()
    plan(search, [[0.9, 0.5]] * 8, FLAT)
    assert plan(search, [[0.9, 0.5]] * 3, FLAT) == [2, 2, 2]
    assert plan(search, [[]], FLAT) == [0]
    assert plan(search, [[0.9, 0.5]] * 20, FLAT) == [2] * 20


def test_no_requests_is_an_empty_plan() -> None:
    for planner in (GreedyBudget(), SearchBudget(), FixedBudget(3)):
        empty = np.zeros((0, 4))
        result = planner.plan(
            empty, np.zeros(0, np.int64), cost_model=FLAT, num_requests=0, num_base_tokens=512
        )
        assert result.shape == (0,)
