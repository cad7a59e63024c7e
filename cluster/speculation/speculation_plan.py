"""What speculating would bring: the best round that can be planned before anything is drafted.

Passes take the time of all their tokens, but that which chunks of prompts add to plain passes is no
mode's: they have to be computed once whatever is decided, and no way to decode saves any of it. So
it is left out where ways to decode are compared; else speculation would seem cheap beside long
chunks, and would be switched off and on with each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.speculation.cost_model import CostModel
from cluster.speculation.survival_profile import SurvivalProfile

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# Up to so many draft tokens each number is looked at, beyond it every eighth.
_ALL_UP_TO = 16


@dataclass(frozen=True, kw_only=True)
class PassLoad:
    """What passes have to do anyway, all groups together.

    Attributes:
        num_requests: sequences that sample.
        num_drafting: those of them that may be drafted for.
        num_base_tokens: batch tokens without guesses, prompt chunks included.
        num_context_tokens: cached tokens of all sequences.
        is_crowded: requests wait for a place.
    """

    num_requests: int
    num_drafting: int
    num_base_tokens: int
    num_context_tokens: int
    is_crowded: bool = False


@dataclass(frozen=True, kw_only=True)
class SpeculationPlan:
    """The best round for a load.

    Attributes:
        goodput: expected tokens per second of decoding, all groups together.
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
    """Expected tokens per second of decoding without speculation."""
    seconds = float(cost_model.verify_seconds(load.num_requests, load.num_context_tokens))
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
    and then drafted for while the other groups have their turn; less what chunks of prompts would
    add to a plain pass.

    Args:
        load: of all groups; they are taken to be equal.
        profile: survival of earlier rounds.
        cost_model: what passes cost.
        draft_seconds: round trip of a round, by sessions and tokens.
        max_draft_tokens: at least 1.
        num_groups: that take turns, at least 1.
    """
    if max_draft_tokens < 1:
        raise ValueError("max_draft_tokens must be at least 1")
    num_drafting = -(-load.num_drafting // num_groups)
    num_requests = load.num_requests / num_groups
    # Three sequences in two groups are one and a half a group, and bring no more than that.
    share = load.num_drafting / (num_groups * num_drafting)
    counts = np.full(max_draft_tokens, num_drafting, dtype=np.int64)
    survival = np.concatenate(profile.expected(counts))
    positions = np.repeat(np.arange(max_draft_tokens), num_drafting)
    order = np.argsort(-survival, kind="stable")
    lengths = _lengths(max_draft_tokens)
    round_trip_s = [draft_seconds(num_drafting, length) for length in lengths]
    # ``[lengths, budgets]``: the likeliest guesses first, of those that are drafted. Where a length
    # has no such guess, its budget is the one before once more.
    is_drafted = positions[order] < np.asarray(lengths)[:, None]
    survival_sum = share * _sums(is_drafted * survival[order])
    seconds = cost_model.pass_seconds(
        load.num_base_tokens / num_groups + share * _sums(is_drafted),
        load.num_context_tokens / num_groups,
        draft_seconds=np.asarray(round_trip_s)[:, None],
        num_groups=num_groups,
    )
    context = load.num_context_tokens / num_groups
    prompts_s = cost_model.verify_seconds(load.num_base_tokens / num_groups, context)
    prompts_s -= cost_model.verify_seconds(num_requests, context)
    goodput = (num_requests + survival_sum) / (seconds - prompts_s)
    best, budget = divmod(int(goodput.argmax()), goodput.shape[1])
    return SpeculationPlan(
        goodput=float(goodput[best, budget]),
        num_draft_tokens=lengths[best],
        draft_seconds=round_trip_s[best],
        num_accepted=float(survival_sum[best, budget]),
        pass_seconds=float(seconds[best, budget]),
    )


def _sums(values: Floats | Mask) -> Floats:
    """``[rows, columns + 1]`` of the first 0, 1, ... columns of each row."""
    sums = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums


def _lengths(longest: int) -> list[int]:
    """Draft lengths to choose from, ``longest`` among them."""
    every = range(1, min(longest, _ALL_UP_TO) + 1)
    return sorted({*every, *range(_ALL_UP_TO, longest, 8), longest}) if longest > 0 else []
