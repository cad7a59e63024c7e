"""What of a model lies on which shard, by its configuration alone. Free of torch, for the CLI.

A model's configuration is the mapping of its ``config.json``; of a wrapper for several kinds of
input its ``text_config`` counts. Keys that are absent are not checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import ConfigError

# Their caches keep more than keys and values by position, so one shard holds all of a sequence.
UNSPLIT_MODEL_TYPES = frozenset({"deepseek_v4"})


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


def key_sources(model_config: Mapping[str, Any]) -> dict[int, int]:
    """Layers that have no keys and values of their own, and the layer whose they read.

    The last ``num_kv_shared_layers`` layers read those of the last layer of their own type before
    them (Gemma 4).
    """
    text_config = model_config.get("text_config") or model_config
    num_shared = text_config.get("num_kv_shared_layers") or 0
    layer_types = text_config.get("layer_types") or []
    first_shared = len(layer_types) - num_shared
    last_of_type = {layer_types[index]: index for index in range(first_shared)}
    return {
        index: last_of_type[layer_types[index]] for index in range(first_shared, len(layer_types))
    }


def check_split(
    model_config: Mapping[str, Any], *, tensor_parallel_size: int, pipeline_parallel_size: int
) -> None:
    """Checks that a model can be cut as configured.

    Raises:
        ConfigError: names the key, and what of the model is in the way.
    """
    text_config = model_config.get("text_config") or model_config
    sizes = {
        "target.tensor_parallel_size": tensor_parallel_size,
        "target.pipeline_parallel_size": pipeline_parallel_size,
    }
    model_type = text_config.get("model_type")
    for key, size in sizes.items():
        if size > 1 and model_type in UNSPLIT_MODEL_TYPES:
            raise ConfigError(key, f"is {size}; {model_type} is served by one shard only")
    _check_heads(text_config, tensor_parallel_size)
    if pipeline_parallel_size > 1:
        _check_stages(text_config, pipeline_parallel_size)


def _check_heads(text_config: Mapping[str, Any], tensor_parallel_size: int) -> None:
    """Attention heads must be shared out evenly, in layers that differ from the rest too."""
    per_layer = (text_config.get("per_layer_config") or {}).values()
    for values in (text_config, *per_layer):
        for key in ("num_attention_heads", "num_key_value_heads"):
            heads = values.get(key)
            if heads is not None and heads % tensor_parallel_size:
                raise ConfigError(
                    "target.tensor_parallel_size",
                    f"{tensor_parallel_size} does not divide the model's {key} ({heads})",
                )


def _check_stages(text_config: Mapping[str, Any], num_stages: int) -> None:
    num_layers = text_config.get("num_hidden_layers")
    if num_layers is None:
        return
    stages = [stage_layers(num_layers, num_stages, stage) for stage in range(num_stages)]
    for layer, source in key_sources(text_config).items():
        if not any(layer in stage and source in stage for stage in stages):
            raise ConfigError(
                "target.pipeline_parallel_size",
                f"is {num_stages}; layer {layer} reads the keys of layer {source} "
                "(num_kv_shared_layers), which lies on another stage",
            )
    if text_config.get("hidden_size_per_layer_input"):
        raise ConfigError(
            "target.pipeline_parallel_size",
            f"is {num_stages}; per-layer inputs (hidden_size_per_layer_input) need a single stage",
        )
