"""What speculating would bring, and how many tokens to draft for it."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.speculation.cost_model import CostModel
from cluster.speculation.draft_cost import DraftCost
from cluster.speculation.draft_curve import DraftCurve
from cluster.speculation.speculation_plan import PassLoad, plain_goodput, plan_speculation
from cluster.speculation.survival_profile import SurvivalProfile

KNEE = CostModel({1: 1.0, 32: 1.0, 64: 2.0})  # flat up to 32 tokens, then linear


def profile_of(*survival: float) -> SurvivalProfile:
    profile = SurvivalProfile()
    for _ in range(50):
        profile.observe(np.asarray([survival] * 4), np.full(4, len(survival)))
    return profile


def load_of(
    num_requests: int, num_drafting: int | None = None, num_prompt_tokens: int = 0
) -> PassLoad:
    return PassLoad(
        num_requests=num_requests,
        num_drafting=num_requests if num_drafting is None else num_drafting,
        num_base_tokens=num_requests + num_prompt_tokens,
        num_context_tokens=0,
    )


def plan(  # type: ignore[no-untyped-def]
    num_requests: int,
    draft_s: float,
    num_groups: int = 1,
    cost_model: CostModel = KNEE,
    num_prompt_tokens: int = 0,
):
    return plan_speculation(
        load_of(num_requests, num_prompt_tokens=num_prompt_tokens),
        profile=profile_of(0.8, 0.6, 0.4, 0.2),
        cost_model=cost_model,
        draft_seconds=lambda sessions, tokens: draft_s,
        max_draft_tokens=4,
        num_groups=num_groups,
    )


def test_where_verifying_is_flat_the_whole_block_is_worth_it() -> None:
    best = plan(2, 0.5)
    assert best.num_draft_tokens == 4
    assert best.num_accepted == pytest.approx(4.0)
    assert best.goodput == pytest.approx((2 + 4) / 1.5)
    assert best.pass_seconds == pytest.approx(1.5)
    assert plain_goodput(load_of(2), KNEE) == pytest.approx(2.0)


def test_under_load_less_is_drafted_and_at_last_it_does_not_pay() -> None:
    tokens = [plan(n, 0.1).num_draft_tokens for n in (2, 8, 16, 64)]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] == 4
    gains = [plan(n, 0.1).goodput / plain_goodput(load_of(n), KNEE) for n in (2, 8, 16, 64)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 2
    assert gains[-1] < 1.1


def test_tokens_that_are_slow_to_draft_are_not_asked_for() -> None:
    best = plan_speculation(
        load_of(2),
        profile=profile_of(0.8, 0.1, 0.1, 0.1),
        cost_model=KNEE,
        draft_seconds=lambda sessions, tokens: 0.2 * tokens,
        max_draft_tokens=4,
        num_groups=1,
    )
    assert best.num_draft_tokens == 1


def test_chunks_of_prompts_favour_no_way_to_decode() -> None:
    linear = CostModel({1: 0.11, 1001: 10.11})
    alone, beside = plan(16, 0.02, 1, linear), plan(16, 0.02, 1, linear, num_prompt_tokens=400)
    assert beside.goodput == pytest.approx(alone.goodput)
    assert beside.num_draft_tokens == alone.num_draft_tokens
    assert beside.pass_seconds == pytest.approx(alone.pass_seconds + 4.0)  # they take their time
    plain = plain_goodput(load_of(16), linear)
    assert plain_goodput(load_of(16, num_prompt_tokens=400), linear) == pytest.approx(plain)
    # With them a pass is behind the knee of its curve, where guesses cost time.
    assert plan(8, 0.1, num_prompt_tokens=64).goodput < plan(8, 0.1).goodput


def test_groups_hide_drafting_where_passes_are_not_flat() -> None:
    linear = CostModel({1: 0.1, 100: 10.0})
    assert plan(16, 1.0, 2, linear).goodput > 1.1 * plan(16, 1.0, 1, linear).goodput
    # On a flat curve two passes cost twice as much as one.
    assert plan(4, 0.5, 2).goodput < plan(4, 0.5, 1).goodput


def test_three_sequences_are_not_drafted_for_as_four() -> None:
    flat = CostModel({1: 1.0})
    one, two = (plan(3, 1.0, groups, flat).goodput for groups in (1, 2))
    assert two == pytest.approx(
        one
    )  # a round as long as a pass: two groups hide it all, for nothing


@pytest.mark.parametrize("block", [1, 16, 17, 128])
def test_the_longest_draft_is_among_those_to_choose_from(block: int) -> None:
    best = plan_speculation(
        load_of(1),
        profile=profile_of(*[0.99] * block),
        cost_model=CostModel({1: 1.0, 256: 1.0}),
        draft_seconds=lambda sessions, tokens: 0.1,
        max_draft_tokens=block,
        num_groups=1,
    )
    assert best.num_draft_tokens == block


def test_unknown_positions_are_expected_to_be_like_the_others() -> None:
    expected = SurvivalProfile().expected(np.asarray([1, 1, 1]))
    values = [float(column[0]) for column in expected]
    assert 0 < values[2] < values[1] < values[0] < 1


def test_the_profile_follows_what_is_seen_and_keeps_the_spread() -> None:
    profile = SurvivalProfile()
    for _ in range(200):
        profile.observe(np.asarray([[0.9, 0.8], [0.1, 0.05]]), np.asarray([2, 2]))
    first, second = profile.expected(np.asarray([2, 2]))
    np.testing.assert_allclose(first, [0.9, 0.1], atol=0.05)
    np.testing.assert_allclose(second, [0.8, 0.05], atol=0.05)
    for _ in range(200):  # shorter blocks say nothing of what is behind them
        profile.observe(np.asarray([[0.5, 0.0]]), np.asarray([1]))
    first, second = profile.expected(np.asarray([1, 1]))
    assert first[0] == pytest.approx(0.5, abs=0.05)
    assert second[0] == pytest.approx((0.8 + 0.05) / 2, abs=0.1)


def test_draft_cost_learns_scale_network_and_a_queue_that_is_forgotten() -> None:
    cost = DraftCost(DraftCurve.of_sessions({1: 0.001, 9: 0.009}))
    assert cost.round_trip_s(1, 4, 0.0) == pytest.approx(0.001)
    for step in range(200):
        cost.observe(5, 4, compute_s=0.010, queue_s=0.02, network_s=0.003, now=step * 0.01)
    assert cost.compute_s(5, 4) == pytest.approx(0.010, rel=0.01)
    assert cost.compute_s(9, 4) == pytest.approx(0.018, rel=0.01)
    assert cost.network_s == pytest.approx(0.003)
    assert cost.round_trip_s(5, 4, 2.0) == pytest.approx(0.033, rel=0.02)
    assert cost.round_trip_s(5, 4, 60.0) == pytest.approx(0.013, rel=0.02)
    cost.observe(5, 4, compute_s=float("nan"), queue_s=0.0, network_s=0.0, now=61.0)
    cost.observe(5, 4, compute_s=-1.0, queue_s=0.0, network_s=0.0, now=61.0)
    assert cost.compute_s(5, 4) == pytest.approx(0.010, rel=0.01)
