"""What a simulated replica computes with."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.simulation.fleet import TargetFleet
from cluster.speculation.cost_model import CostModel
from cluster.speculation.verify_curve import VerifyCurve


@dataclass(frozen=True, kw_only=True)
class Device:
    """A target, and the host that runs its loop.

    Attributes:
        curve: true seconds of a pass; the cost model has to find out.
        prefix_hit_rate: share of prompt tokens that need not be computed.
        stretch_s: passes that do not differ are computed together for as long as this; 0: never.
    """

    settings: TargetFleet
    curve: VerifyCurve
    cost_model: CostModel
    prefix_hit_rate: float = 0.0
    stretch_s: float = 0.0

    def pass_seconds(
        self, num_tokens: int, num_context_tokens: float, num_sequences: int, *, has_round: bool
    ) -> float:
        """True seconds of a pass, the host's time with it included."""
        settings = self.settings
        host_ms = settings.host_step_ms + settings.host_sequence_ms * num_sequences
        host_ms += settings.host_round_ms if has_round else 0.0
        return float(self.curve.seconds(num_tokens, num_context_tokens)) + host_ms / 1e3
