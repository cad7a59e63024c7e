"""What of a model lies on which shard, by its configuration alone. Free of torch, for the CLI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import ConfigError


def stage_layers(num_layers: int, num_stages: int, stage: int) -> range:
    """The decoder layers of one pipeline stage: contiguous, sizes differing by at most one.

    Earlier stages get the smaller share, as the first one also embeds and samples.

    Raises:
        ConfigError: more stages than layers.
    """
    if num_stages > num_layers:
        raise ConfigError(
            "target.pipeline_parallel_size", f"is {num_stages}, the model has {num_layers} layers"
        )
    base, larger = divmod(num_layers, num_stages)
    sizes = [base + (index >= num_stages - larger) for index in range(num_stages)]
    start = sum(sizes[:stage])
    return range(start, start + sizes[stage])


def check_heads(model_config: Mapping[str, Any], tensor_parallel_size: int) -> None:
    """Checks that attention heads can be shared out evenly; keys that are absent are not checked.

    Raises:
        ConfigError: names the model's key that does not divide.
    """
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = model_config.get(key)
        if heads is not None and heads % tensor_parallel_size:
            raise ConfigError(
                "target.tensor_parallel_size",
                f"{tensor_parallel_size} does not divide the model's {key} ({heads})",
            )
