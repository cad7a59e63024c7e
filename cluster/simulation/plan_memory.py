"""Plans that were made for about the same load, for fleets in which they are made all the time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cluster.simulation.events import Events
from cluster.speculation.cost_model import CostModel
from cluster.speculation.speculation_plan import (
    PassLoad,
    SpeculationPlan,
    plain_goodput,
    plan_speculation,
)
from cluster.speculation.survival_profile import SurvivalProfile

_LIFETIME_S = 30.0
_STEPS_PER_OCTAVE = 4


@dataclass(frozen=True, slots=True)
class _Remembered:
    made_s: float
    plan: SpeculationPlan
    plain: float


class PlanMemory:
    """``plan_speculation`` for replicas that share a cost model and a survival profile.

    A plan is made for a load that is rounded (tokens beyond one a request and contexts to a quarter
    of an octave, a round's time likewise), and is kept for 30 s. What it promises is scaled by what
    plain passes promise for the true load.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self._plans: dict[tuple[int, ...], _Remembered] = {}

    def __call__(
        self,
        load: PassLoad,
        *,
        profile: SurvivalProfile,
        cost_model: CostModel,
        draft_seconds: Callable[[float, int], float],
        max_draft_tokens: int,
        num_groups: int,
    ) -> SpeculationPlan:
        """As ``plan_speculation``."""
        round_s = draft_seconds(-(-load.num_drafting // num_groups), max_draft_tokens)
        prompt_tokens = load.num_base_tokens - load.num_requests
        steps = (
            _step(prompt_tokens + 1),
            _step(load.num_context_tokens + 1),
            _step(round_s),
        )
        key = (load.num_requests, load.num_drafting, max_draft_tokens, num_groups, *steps)
        former = self._plans.get(key)
        if former is None or self._events.now - former.made_s > _LIFETIME_S:
            rounded = PassLoad(
                num_requests=load.num_requests,
                num_drafting=load.num_drafting,
                num_base_tokens=load.num_requests + round(_value(steps[0]) - 1),
                num_context_tokens=round(_value(steps[1]) - 1),
            )
            plan = plan_speculation(
                rounded,
                profile=profile,
                cost_model=cost_model,
                draft_seconds=draft_seconds,
                max_draft_tokens=max_draft_tokens,
                num_groups=num_groups,
            )
            former = _Remembered(self._events.now, plan, plain_goodput(rounded, cost_model))
            self._plans[key] = former
        plan, scale = former.plan, plain_goodput(load, cost_model) / former.plain
        return SpeculationPlan(
            goodput=plan.goodput * scale,
            num_draft_tokens=plan.num_draft_tokens,
            draft_seconds=plan.draft_seconds,
            num_accepted=plan.num_accepted,
            pass_seconds=plan.pass_seconds,
        )


def _step(value: float) -> int:
    return round(_STEPS_PER_OCTAVE * math.log2(value))


def _value(step: int) -> float:
    return float(2.0 ** (step / _STEPS_PER_OCTAVE))
