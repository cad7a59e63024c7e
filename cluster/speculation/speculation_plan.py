"""What speculating would bring: the best round that can be planned before anything is drafted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cluster.speculation.cost_model import CostModel
from cluster.speculation.survival_profile import SurvivalProfile


@dataclass(frozen=True, kw_only=True)
class PassLoad:
    """What passes have to do anyway, all groups together.

    Attributes:
        num_requests: sequences that sample.
        num_drafting: those of them that may be drafted for.
        num_base_tokens: batch tokens without guesses, prompt chunks included.
        num_context_tokens: cached tokens of all sequences.
    """

    num_requests: int
    num_drafting: int
    num_base_tokens: int
    num_context_tokens: int


@dataclass(frozen=True, kw_only=True)
class SpeculationPlan:
    """The best round for a load.

    Attributes:
        goodput: expected tokens per second, all groups together.
        num_draft_tokens: to ask of the drafter for each sequence; at least 1.
        draft_seconds: expected round trip of a group's round.
        num_accepted: guesses that are expected to be accepted in a group's pass.
        pass_seconds: expected time of a group's pass, visible drafting included.
    """

    goodput: float
    num_draft_tokens: int
    draft_seconds: float
    num_accepted: float
    pass_seconds: float


def plain_goodput(load: PassLoad, cost_model: CostModel) -> float:
    """Expected tokens per second without speculation."""
    seconds = float(cost_model.verify_seconds(load.num_base_tokens, load.num_context_tokens))
    return load.num_requests / seconds


def plan_speculation(
    load: PassLoad,
    *,
    profile: SurvivalProfile,
    cost_model: CostModel,
    draft_seconds: Callable[[float, int], float],
    max_draft_tokens: int,
    num_groups: int,
) -> SpeculationPlan:
    """Chooses how many tokens to draft, so that the best budget for them brings the most.

    The joint objective of drafting and verifying (DESIGN, rule 5): expected tokens of a pass over
    the larger of the pass's own time and its share of a whole cycle, in which a group is verified
    and then drafted for while the other groups have their turn.

    Args:
        load: of all groups; they are taken to be equal.
        profile: survival of earlier rounds.
        cost_model: what passes cost.
        draft_seconds: round trip of a round, by sessions and tokens.
        max_draft_tokens: at least 1.
        num_groups: that take turns, at least 1.
    """
    num_drafting = -(-load.num_drafting // num_groups)
    num_requests = load.num_requests / num_groups
    counts = np.full(max_draft_tokens, num_drafting, dtype=np.int64)
    survival = np.concatenate(profile.expected(counts))
    positions = np.repeat(np.arange(max_draft_tokens), num_drafting)
    order = np.argsort(-survival, kind="stable")
    survival, positions = survival[order], positions[order]
    best: SpeculationPlan | None = None
    for num_tokens in range(1, max_draft_tokens + 1):
        taken = survival if num_tokens == max_draft_tokens else survival[positions < num_tokens]
        survival_sum = np.concatenate([[0.0], np.cumsum(taken)])
        round_trip_s = draft_seconds(num_drafting, num_tokens)
        seconds = cost_model.pass_seconds(
            load.num_base_tokens / num_groups + np.arange(len(survival_sum)),
            load.num_context_tokens / num_groups,
            draft_seconds=round_trip_s,
            num_groups=num_groups,
        )
        goodput = (num_requests + survival_sum) / seconds
        budget = int(goodput.argmax())
        if best is None or goodput[budget] > best.goodput:
            best = SpeculationPlan(
                goodput=float(goodput[budget]),
                num_draft_tokens=num_tokens,
                draft_seconds=round_trip_s,
                num_accepted=float(survival_sum[budget]),
                pass_seconds=float(seconds[budget]),
            )
    if best is None:
        raise ValueError("max_draft_tokens must be at least 1")
    return best
