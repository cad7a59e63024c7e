"""What a simulated replica speculates with."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.simulation.acceptance import AcceptanceModel
from cluster.simulation.draft_links import DraftLinks
from cluster.speculation.budget import BudgetPlanner
from cluster.speculation.speculation_policy import SpeculationPolicy
from cluster.speculation.survival_profile import SurvivalProfile


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """The policies of a replica, and what they decide about.

    Attributes:
        budget: plans each round.
        profile: survival in earlier rounds.
        is_profile_kept: ``budget`` keeps ``profile`` current.
        max_tokens: of a round.
        timeout_s: longest wait for a round.
    """

    policy: SpeculationPolicy
    budget: BudgetPlanner
    profile: SurvivalProfile
    is_profile_kept: bool
    links: DraftLinks
    acceptance: AcceptanceModel
    max_tokens: int
    timeout_s: float
