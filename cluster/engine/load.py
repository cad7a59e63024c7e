"""How busy an engine is."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.engine.pace import PaceStats
from cluster.request import SpeculationStats


@dataclass(frozen=True)
class PrefixCacheStats:
    """What prefix caching has found so far, and what it holds now.

    Attributes:
        num_queried_tokens: of requests when they first started, resumed tokens included.
        num_hit_tokens: how many of them were found.
        num_cached_pages: pages that can be found, also while requests hold them.
        num_evicted_pages: pages that could be found and were taken for something else, in all.
    """

    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_cached_pages: int = 0
    num_evicted_pages: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the tokens that were found, 0..1."""
        return self.num_hit_tokens / max(self.num_queried_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class SpeculationLoad:
    """How a replica speculates now, and what it asks of drafters.

    Attributes:
        mode: plain, speculative or grouped (``SpeculationMode``).
        reason: why, in words for people.
        reason_code: why, as one of few words (``SwitchReason``).
        num_flips: times that speculation went off or on.
        seconds_in_state: since the mode in force was entered.
        seconds_in_mode: in each mode since the start.
        draft_seconds_per_second: drafters' passes for this replica, over time: drafters it keeps
            busy. A pass that several replicas share counts for each.
        draft_queue_seconds: expected wait of a round on its drafter.
        draft_network_seconds: a round's way there and back.
        goodput: tokens per second expected with speculation, at the load of the last step.
        goodput_plain: the same without.
        goodput_added_drafter: with speculation and a drafter more; ``goodput_removed_drafter``:
            with one fewer (but one).
    """

    mode: str = "plain"
    reason: str = ""
    reason_code: str = "not_configured"
    num_flips: int = 0
    seconds_in_state: float = 0.0
    seconds_in_mode: dict[str, float] = field(default_factory=dict)
    draft_seconds_per_second: float = 0.0
    draft_queue_seconds: float = 0.0
    draft_network_seconds: float = 0.0
    goodput: float = 0.0
    goodput_plain: float = 0.0
    goodput_added_drafter: float = 0.0
    goodput_removed_drafter: float = 0.0


@dataclass(frozen=True)
class EngineLoad:
    """What a replica reports of itself; times and shares are of the moment of the report.

    Attributes:
        speculation_state: on or off; ``speculation`` says more.
        kv_cache_usage: share of pages that running requests hold; what is only cached is free.
        num_free_tokens: that fit into the pages nobody holds.
        num_queued_tokens: to be computed for what runs and waits, expected outputs included.
        mean_output_tokens: of requests that ended lately.
        num_prompt_tokens: of requests that have an output.
        num_requests_by_budget: [i]: requests of which a pass with output verified i draft tokens;
            goes on changing.
        num_taken_in: requests that were submitted before this report, refused ones included.
        calibration_error: of the confidences as served (``OnlineCalibration.error``); ``None``
            before enough was verified.
        calibration_drift: largest factor of a temperature in force, or of odds, over its fit.
        paced: how well steps keep a device profile's time; ``None``: they take what they take.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_free_tokens: int = 0
    num_queued_tokens: int = 0
    mean_output_tokens: float = 0.0
    num_taken_in: int = 0
    num_output_tokens: int = 0
    num_prompt_tokens: int = 0
    num_requests_by_budget: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    prefix_cache: PrefixCacheStats = field(default_factory=PrefixCacheStats)
    speculation_state: str = "off"
    speculation_reason: str = ""
    speculation: SpeculationLoad = field(default_factory=SpeculationLoad)
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    calibration_error: float | None = None
    calibration_drift: float = 1.0
    paced: PaceStats | None = None
