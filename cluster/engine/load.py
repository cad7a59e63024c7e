"""How busy an engine is."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.request import SpeculationStats


@dataclass(frozen=True)
class EngineLoad:
    """What a replica reports of itself; times and shares are of the moment of the report.

    Attributes:
        kv_cache_usage: share of pages that running requests hold; what is only cached is free.
        num_prefix_queried_tokens: tokens of requests when they first started.
        num_prefix_hit_tokens: how many of them were found in the prefix cache.
        num_cached_pages: pages that a prompt with the same beginning would find, held ones too.
        num_evicted_pages: pages that were cached and taken for something else, in all.
        calibration_error: of the confidences as served (``OnlineCalibration.error``); ``None``
            before enough was verified.
        calibration_drift: largest factor between a temperature in force and its offline fit.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_queried_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_cached_pages: int = 0
    num_evicted_pages: int = 0
    speculation_state: str = "off"
    speculation_reason: str = ""
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    calibration_error: float | None = None
    calibration_drift: float = 1.0
