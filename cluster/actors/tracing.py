"""Where a part's process sends its spans."""

from __future__ import annotations

from cluster import tracing
from cluster.config import ClusterConfig


def start_tracing(config: ClusterConfig, part: str, instance: str) -> None:
    """Begins to trace, where the configuration says so; ``part`` is router, replica or drafter.

    Raises:
        ConfigError: the extra ``tracing`` is not installed here.
    """
    if config.tracing is not None:
        tracing.start(
            config.tracing.endpoint,
            service=f"dspark-{part}",
            instance=instance,
            sample_ratio=config.tracing.sample_ratio,
        )
