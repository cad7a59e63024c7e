"""Loads the target's network from its checkpoint, and refuses what cannot be served."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster.engine.compressed_cache import COMPRESSED_LAYER_TYPES
from cluster.errors import CheckpointError, ConfigError
from cluster.models.tensor_headers import read_headers

# Whose layers give their cache one latent a token, and expand it with ``kv_b_proj``.
LATENT_MODEL_TYPES = frozenset({"deepseek_v3"})
_PAGED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_LOGIT_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def load_model(
    path: str, dtype: torch.dtype, attention: str, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The whole model on the CPU, without gradients.

    Args:
        path: checkpoint folder or hub id.
        attention: its name in transformers' ``AttentionInterface``.

    Raises:
        CheckpointError: it cannot be read, or weights are missing or of another shape.
    """
    if Path(path).is_dir():
        read_headers(Path(path))  # names the file and the tensor, which transformers does not
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(path, None, str(error).split("\n")[0]) from error
    for kind in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(kind, ()))
        if keys:
            raise CheckpointError(path, keys[0], kind.replace("_", " "))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def check_servable(model: PreTrainedModel, *, is_compressed: bool) -> None:
    """Refuses what would be served wrongly without any sign of it.

    Args:
        is_compressed: served by ``CompressedCaches``, else by a paged ``KVCache``.

    Raises:
        ConfigError: names the architecture and what it needs.
    """
    architecture = type(model).__name__
    decoder = model.get_decoder()
    text_config = decoder.config
    for part in ("embed_tokens", "layers", "norm"):
        if not hasattr(decoder, part):
            raise ConfigError(
                "target.model", f"{architecture} cannot be served: its decoder has no '{part}'"
            )
    if getattr(model, "_is_stateful", False) and not is_compressed:
        raise ConfigError(
            "target.model",
            f"{architecture} cannot be served: its layers keep a state besides keys and values",
        )
    is_quantised = getattr(text_config, "quantization_config", None) is not None
    if text_config.model_type in LATENT_MODEL_TYPES and is_quantised:
        raise ConfigError(
            "target.model",
            f"{architecture} cannot be served quantised: its attention is computed with the "
            "weights of kv_b_proj themselves",
        )
    layer_types = COMPRESSED_LAYER_TYPES if is_compressed else _PAGED_LAYER_TYPES
    unknown = set(getattr(text_config, "layer_types", None) or ()) - layer_types
    if unknown:
        raise ConfigError(
            "target.model",
            f"{architecture} cannot be served: layers of type {', '.join(sorted(unknown))}",
        )
    for key in _LOGIT_FACTORS:
        if getattr(text_config, key, None) not in (None, 1):
            raise ConfigError(
                "target.model", f"{architecture} cannot be served: it scales logits by '{key}'"
            )
